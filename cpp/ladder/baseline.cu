// SPDX-License-Identifier: Apache-2.0
// Rung 1: attention as the formula is written. One query per block; a thread computes whole scalar products, one key
// after another, and then one column of the output; every load is of one element, every sum in float32.
#include "ladder/ladder.h"
#include "ladder/parts.cuh"

namespace flashcore::ladder {
namespace {

constexpr int threads = 128, warps = threads / 32;

template <class Element, int head_dim>
__global__ void __launch_bounds__(threads)
    baseline_kernel(__grid_constant__ ForwardParams const p, __grid_constant__ PlainScore const score) {
  Place const place = Place::of(p, 1);
  Mask const mask = mask_of(p);
  int const query = place.tile;
  int const first = mask.first_key(query), keys = mask.end_key(query) - first;
  Element const* const k = rows_of<Element>(p.k, place.sequence, place.head / p.group) + first * p.k.row_stride;
  Element const* const v = rows_of<Element>(p.v, place.sequence, place.head / p.group) + first * p.v.row_stride;

  extern __shared__ float weights[];  // of each key that the query sees; its score at first
  __shared__ __align__(16) float q[head_dim];
  __shared__ float maxima[warps], sums[warps], partial[threads];

  Element const* const query_row = rows_of<Element>(p.q, place.sequence, place.head) + query * p.q.row_stride;
  for (int d = threadIdx.x; d < head_dim; d += threads) q[d] = to_float(query_row[d]);
  __syncthreads();

  float top = minus_infinity();
  for (int key = threadIdx.x; key < keys; key += threads) {
    Element const* const row = k + key * p.k.row_stride;
    float s = 0.0f;
#pragma unroll 32
    for (int d = 0; d < head_dim; ++d) s += q[d] * to_float(row[d]);
    weights[key] = s;
    top = fmaxf(top, s);
  }
  top = reduce_block<warps>(top, maxima, Max{});

  float sum = 0.0f;
  for (int key = threadIdx.x; key < keys; key += threads) {  // a thread's own scores
    float const weight = exp2_of((weights[key] - top) * score.factor);
    weights[key] = weight;
    sum += weight;
  }
  sum = reduce_block<warps>(sum, sums, Sum{});  // its __syncthreads shows all weights to all threads

  // A thread a column, of every `parts`-th key.
  constexpr int parts = threads / head_dim;
  int const column = threadIdx.x % head_dim;
  float o = 0.0f;
#pragma unroll 8
  for (int key = threadIdx.x / head_dim; key < keys; key += parts) {
    o += weights[key] * to_float(v[key * p.v.row_stride + column]);
  }
  partial[threadIdx.x] = o;
  __syncthreads();
  if (threadIdx.x < head_dim) {
#pragma unroll
    for (int i = 1; i < parts; ++i) o += partial[i * head_dim + column];
    Element* const out = rows_of<Element>(p.o, place.sequence, place.head) + query * p.o.row_stride;
    out[column] = from_float<Element>(sum == 0.0f ? 0.0f : o / sum);
  }
}

}  // namespace

void baseline(const ForwardParams& p, DType dtype, void* stream) {
  instance(dtype, p.head_dim, [&](auto element, auto head_dim) {
    launch(baseline_kernel<decltype(element), head_dim>, p, 1, threads, 4 * p.seqlen_k, stream);
  });
}

}  // namespace flashcore::ladder

// SPDX-License-Identifier: Apache-2.0
// Rung 2: the baseline with 16-byte loads of keys and values: an eighth of the load instructions. Still one query per
// block and a thread a key; in the second product a thread now has eight columns.
#include "ladder/ladder.h"
#include "ladder/weighted_values.cuh"

namespace flashcore::ladder {
namespace {

constexpr int warps = 4, threads = 32 * warps;

template <class Element, int head_dim>
__global__ void __launch_bounds__(threads)
    vectorized_kernel(__grid_constant__ ForwardParams const p, __grid_constant__ PlainScore const score) {
  Place const place = Place::of(p, 1);
  Mask const mask = mask_of(p);
  int const query = place.tile;
  int const first = mask.first_key(query), keys = mask.end_key(query) - first;
  Element const* const k = rows_of<Element>(p.k, place.sequence, place.head / p.group) + first * p.k.row_stride;
  Element const* const v = rows_of<Element>(p.v, place.sequence, place.head / p.group) + first * p.v.row_stride;

  extern __shared__ float weights[];
  __shared__ __align__(16) float q[head_dim];
  __shared__ ValuesShared<head_dim, warps> shared;

  Element const* const query_row = rows_of<Element>(p.q, place.sequence, place.head) + query * p.q.row_stride;
  for (int d = threadIdx.x; d < head_dim; d += threads) q[d] = to_float(query_row[d]);
  __syncthreads();

  float top = minus_infinity();
  for (int key = threadIdx.x; key < keys; key += threads) {
    Element const* const row = k + key * p.k.row_stride;
    float s[2] = {};  // two sums: the additions wait for one another half as long
#pragma unroll 8
    for (int d = 0; d < head_dim; d += 8) {
      float x[8];
      widen<Element>(load16(row + d), x);
#pragma unroll
      for (int i = 0; i < 8; ++i) s[i % 2] += q[d + i] * x[i];
    }
    weights[key] = s[0] + s[1];
    top = fmaxf(top, s[0] + s[1]);
  }
  Element* const out = rows_of<Element>(p.o, place.sequence, place.head) + query * p.o.row_stride;
  softmax_and_values<Element>(weights, keys, top, score.factor, v, p.v.row_stride, out, shared);
}

}  // namespace

void vectorized(const ForwardParams& p, DType dtype, void* stream) {
  instance(dtype, p.head_dim, [&](auto element, auto head_dim) {
    launch(vectorized_kernel<decltype(element), head_dim>, p, 1, threads, 4 * p.seqlen_k, stream);
  });
}

}  // namespace flashcore::ladder

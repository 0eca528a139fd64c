// SPDX-License-Identifier: Apache-2.0
// Rung 4: one query per block, and its scores, weights and output never leave registers. A row of keys or values is
// read by head_dim / 8 lanes side by side; lanes add up their parts of a score by shuffles, the online softmax runs in
// each warp by itself, and the warps' results meet once, at the end.
#include "ladder/ladder.h"
#include "ladder/parts.cuh"

namespace flashcore::ladder {
namespace {

constexpr int warps = 4, threads = 32 * warps;
constexpr int rows = 8;  // that a lane loads at once

// Eight sums over eight lanes at once, by exchanging halves: lane i (of each eight) gets the sum of s[i] over them.
__device__ __forceinline__ float reduce_and_spread(float (&s)[rows], int lane) {
#pragma unroll
  for (int half = rows / 2; half > 0; half /= 2) {
    bool const upper = lane & half;
#pragma unroll
    for (int i = 0; i < half; ++i) {
      float const given = upper ? s[i] : s[i + half];
      s[i] = (upper ? s[i + half] : s[i]) + __shfl_xor_sync(0xffffffffu, given, half);
    }
  }
  return s[0];
}

template <class Element, int head_dim>
__global__ void __launch_bounds__(threads)
    register_fusion_kernel(__grid_constant__ ForwardParams const p, __grid_constant__ PlainScore const score) {
  constexpr int lanes = head_dim / 8;       // of a row
  constexpr int rows_a_load = 32 / lanes;   // of a warp
  constexpr int step = rows * rows_a_load;  // keys that a warp takes at once
  Place const place = Place::of(p, 1);
  Mask const mask = mask_of(p);
  int const query = place.tile;
  int const first = mask.first_key(query), keys = mask.end_key(query) - first;
  int const warp = threadIdx.x / 32, lane = threadIdx.x % 32, column = lane % lanes * 8, own_row = lane / lanes;
  Element const* const k =
      rows_of<Element>(p.k, place.sequence, place.head / p.group) + first * p.k.row_stride + column;
  Element const* const v =
      rows_of<Element>(p.v, place.sequence, place.head / p.group) + first * p.v.row_stride + column;

  float q[8];
  widen<Element>(load16(rows_of<Element>(p.q, place.sequence, place.head) + query * p.q.row_stride + column), q);

  // This lane's rows of a step: row r is key base + r · rows_a_load + own_row; past the last key any row, whose weight
  // will be zero.
  auto const load = [&](uint4(&packed)[rows], Element const* array, int64_t stride, int base) {
    if (base + step <= keys) {
      Element const* row = array + (base + own_row) * stride;
#pragma unroll
      for (int r = 0; r < rows; ++r, row += rows_a_load * stride) packed[r] = load16(row);
    } else {
#pragma unroll
      for (int r = 0; r < rows; ++r) {
        packed[r] = load16(array + min_of(base + r * rows_a_load + own_row, keys - 1) * stride);
      }
    }
  };

  SoftmaxRow state;  // the sum is this lane's own until the end
  float o[8] = {};   // eight columns, of the keys of this lane's rows
  for (int base = warp * step; base < keys; base += warps * step) {
    uint4 packed[rows];
    load(packed, k, p.k.row_stride, base);
    float s[rows];
#pragma unroll
    for (int r = 0; r < rows; ++r) {
      float x[8];
      widen<Element>(packed[r], x);
      s[r] = q[0] * x[0];
#pragma unroll
      for (int i = 1; i < 8; ++i) s[r] += q[i] * x[i];
    }
    load(packed, v, p.v.row_stride, base);

    // Lane i of each eight has row i's score (with 16 lanes a row, two lanes have the same one).
    float const sum = reduce_lanes<rows, lanes>(reduce_and_spread(s, lane), Sum{});
    float const own = base + lane % rows * rows_a_load + own_row < keys ? sum : minus_infinity();
    if (__any_sync(0xffffffffu, own > state.max)) {
      float const ratio = state.raise(fmaxf(state.max, reduce_lanes(own, Max{})), score.factor);
#pragma unroll
      for (int i = 0; i < 8; ++i) o[i] *= ratio;
    }
    float const weight = exp2_of((own - state.max) * score.factor);
    if (lane % lanes < rows) state.sum += weight;
#pragma unroll
    for (int r = 0; r < rows; ++r) {
      float const row_weight = __shfl_sync(0xffffffffu, weight, r, lanes);
      float x[8];
      widen<Element>(packed[r], x);
#pragma unroll
      for (int i = 0; i < 8; ++i) o[i] += row_weight * x[i];
    }
  }

  // The warp's sums, then the block's, each warp's weighted by how far its maximum is below the largest.
  __shared__ float maxima[warps], sums[warps], partial[warps][head_dim];
  state.sum = reduce_lanes(state.sum, Sum{});
#pragma unroll
  for (int i = 0; i < 8; ++i) o[i] = reduce_lanes<lanes>(o[i], Sum{});
  if (lane < lanes) {
#pragma unroll
    for (int i = 0; i < 8; ++i) partial[warp][column + i] = o[i];
  }
  if (lane == 0) {
    maxima[warp] = state.max;
    sums[warp] = state.sum;
  }
  __syncthreads();
  if (threadIdx.x < head_dim) {
    float top = maxima[0];
#pragma unroll
    for (int w = 1; w < warps; ++w) top = fmaxf(top, maxima[w]);
    float total = 0.0f, result = 0.0f;
#pragma unroll
    for (int w = 0; w < warps; ++w) {  // a warp that saw no key has maximum −inf and counts for nothing
      float const ratio = maxima[w] == minus_infinity() ? 0.0f : exp2_of((maxima[w] - top) * score.factor);
      total += ratio * sums[w];
      result += ratio * partial[w][threadIdx.x];
    }
    Element* const out = rows_of<Element>(p.o, place.sequence, place.head) + query * p.o.row_stride;
    out[threadIdx.x] = from_float<Element>(total == 0.0f ? 0.0f : result / total);
  }
}

}  // namespace

void register_fusion(const ForwardParams& p, DType dtype, void* stream) {
  instance(dtype, p.head_dim, [&](auto element, auto head_dim) {
    launch(register_fusion_kernel<decltype(element), head_dim>, p, 1, threads, 0, stream);
  });
}

}  // namespace flashcore::ladder

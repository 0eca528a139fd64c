// SPDX-License-Identifier: Apache-2.0
// What rungs 2 and 3 share: one query's softmax over scores in shared memory, and its second product by 16-byte loads.
#pragma once

#include "ladder/parts.cuh"

namespace flashcore::ladder {

// Shared memory of softmax_and_values.
template <int head_dim, int warps>
struct ValuesShared {
  float maxima[warps], sums[warps];
  float partial[warps][head_dim];
};

// out = softmax(scores) · V for one query. `weights` holds the scores of `keys` keys and is overwritten; `top` is the
// largest of those that this thread has computed. Eight columns a thread, head_dim / 8 lanes a row of values.
template <class Element, int head_dim, int warps>
__device__ __forceinline__ void softmax_and_values(float* weights, int keys, float top, float factor, Element const* v,
                                                   int64_t stride, Element* out,
                                                   ValuesShared<head_dim, warps>& shared) {
  constexpr int threads = 32 * warps, lanes = head_dim / 8, rows = threads / lanes;
  top = reduce_block<warps>(top, shared.maxima, Max{});  // its __syncthreads shows all scores to all threads

  float sum = 0.0f;
  for (int key = threadIdx.x; key < keys; key += threads) {
    float const weight = exp2_of((weights[key] - top) * factor);
    weights[key] = weight;
    sum += weight;
  }
  sum = reduce_block<warps>(sum, shared.sums, Sum{});  // and all weights

  float o[8] = {};
  Element const* const columns = v + threadIdx.x % lanes * 8;
#pragma unroll 4
  for (int key = threadIdx.x / lanes; key < keys; key += rows) {
    float x[8];
    widen<Element>(load16(columns + key * stride), x);
    float const weight = weights[key];
#pragma unroll
    for (int i = 0; i < 8; ++i) o[i] += weight * x[i];
  }
#pragma unroll
  for (int i = 0; i < 8; ++i) o[i] = reduce_lanes<lanes>(o[i], Sum{});
  int const lane = threadIdx.x % 32;
  if (lane < lanes) {
#pragma unroll
    for (int i = 0; i < 8; ++i) shared.partial[threadIdx.x / 32][lane * 8 + i] = o[i];
  }
  __syncthreads();
  if (threadIdx.x < head_dim) {
    float total = 0.0f;
#pragma unroll
    for (int w = 0; w < warps; ++w) total += shared.partial[w][threadIdx.x];
    out[threadIdx.x] = from_float<Element>(sum == 0.0f ? 0.0f : total / sum);
  }
}

}  // namespace flashcore::ladder

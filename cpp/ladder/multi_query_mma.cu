// SPDX-License-Identifier: Apache-2.0
// Rung 6: 16 queries per block and both products on the tensor cores. Scores lie in shared memory, where a thread a row
// looks for the row's maximum, all threads compute the exponentials, and a thread a row adds up the weights.
#include "ladder/ladder.h"
#include "ladder/tensor_core_tiles.cuh"

namespace flashcore::ladder {
namespace {

constexpr int rows = tile_q / warps;  // of a warp's first lanes

struct SerialSoftmax {
  SoftmaxRow state;  // of row(), where has_row()

  __device__ static bool has_row() { return threadIdx.x % 32 < rows; }
  __device__ static int row() { return threadIdx.x / 32 * rows + threadIdx.x % 32; }

  template <class Element>
  __device__ __forceinline__ void weigh(SoftmaxShared& shared, float factor) {
    if (has_row()) {
      float top[4] = {state.max, state.max, state.max, state.max};  // four maxima at once: they wait less
#pragma unroll
      for (int key = 0; key < tile_k; key += 4) {
        float4 const four = *reinterpret_cast<float4 const*>(&shared.scores[row()][key]);
        top[0] = fmaxf(top[0], four.x);
        top[1] = fmaxf(top[1], four.y);
        top[2] = fmaxf(top[2], four.z);
        top[3] = fmaxf(top[3], four.w);
      }
      shared.ratio[row()] = state.raise(fmaxf(fmaxf(top[0], top[1]), fmaxf(top[2], top[3])), factor);
      shared.offset[row()] = SoftmaxRow::offset(state.max, factor);
    }
    __syncthreads();
#pragma unroll
    for (int i = 0; i < tile_q * tile_k / 2 / threads; ++i) {
      int const pair = i * threads + threadIdx.x, r = pair / (tile_k / 2), key = pair % (tile_k / 2) * 2;
      float2& scores = *reinterpret_cast<float2*>(&shared.scores[r][key]);
      float const offset = shared.offset[r];
      float2 const weights = {exp2_of(scores.x * factor - offset), exp2_of(scores.y * factor - offset)};
      scores = weights;
      *reinterpret_cast<uint32_t*>(shared.weights + SharedTile<tile_k>::offset(r, key / 8) + key % 8 * 2) =
          Precision<Element>::pack(weights.x, weights.y);
    }
  }

  __device__ __forceinline__ void add(SoftmaxShared& shared) {
    if (!has_row()) return;
    float sum[4] = {};
#pragma unroll
    for (int key = 0; key < tile_k; key += 4) {
      float4 const four = *reinterpret_cast<float4 const*>(&shared.scores[row()][key]);
      sum[0] += four.x;
      sum[1] += four.y;
      sum[2] += four.z;
      sum[3] += four.w;
    }
    state.sum += (sum[0] + sum[1]) + (sum[2] + sum[3]);
  }

  __device__ __forceinline__ void finish(SoftmaxShared& shared) const {
    if (has_row()) shared.inverse[row()] = state.inverse_sum();
  }
};

}  // namespace

void multi_query_mma(const ForwardParams& p, DType dtype, void* stream) {
  instance(dtype, p.head_dim, [&](auto element, auto head_dim) {
    launch(tensor_core_tiles_kernel<decltype(element), head_dim, SerialSoftmax>, p, tile_q, threads,
           sizeof(TilesShared<head_dim>), stream);
  });
}

}  // namespace flashcore::ladder

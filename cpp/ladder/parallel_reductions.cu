// SPDX-License-Identifier: Apache-2.0
// Rung 7: rung 6 without its serial loops. Eight lanes share a row of scores: its maximum and its sum take three
// shuffles, each lane has the weights of its own scores at once, and one of the barriers between warps is gone.
#include "ladder/ladder.h"
#include "ladder/tensor_core_tiles.cuh"

namespace flashcore::ladder {
namespace {

constexpr int lanes = threads / tile_q;  // of a row
static_assert(lanes == 8 && tile_k == 8 * lanes);

struct ParallelSoftmax {
  SoftmaxRow state;  // of row(); the sum is of this lane's own keys until the end

  __device__ static int row() { return threadIdx.x / lanes; }

  template <class Element>
  __device__ __forceinline__ void weigh(SoftmaxShared& shared, float factor) {
    // Keys 4 l to 4 l + 3 of each half of the row: lanes side by side read what lies side by side.
    int const lane = threadIdx.x % lanes;
    float4 scores[2];
    float top = state.max;
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      scores[half] = *reinterpret_cast<float4 const*>(&shared.scores[row()][half * tile_k / 2 + lane * 4]);
      top = fmaxf(top, fmaxf(fmaxf(scores[half].x, scores[half].y), fmaxf(scores[half].z, scores[half].w)));
    }
    float const ratio = state.raise(reduce_lanes<1, lanes>(top, Max{}), factor);
    float const offset = SoftmaxRow::offset(state.max, factor);
    if (lane == 0) shared.ratio[row()] = ratio;
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      float const w[4] = {exp2_of(scores[half].x * factor - offset), exp2_of(scores[half].y * factor - offset),
                          exp2_of(scores[half].z * factor - offset), exp2_of(scores[half].w * factor - offset)};
      state.sum += (w[0] + w[1]) + (w[2] + w[3]);
      int const chunk = half * (tile_k / 2 / 8) + lane / 2;
      *reinterpret_cast<uint2*>(shared.weights + SharedTile<tile_k>::offset(row(), chunk) + lane % 2 * 8) = {
          Precision<Element>::pack(w[0], w[1]), Precision<Element>::pack(w[2], w[3])};
    }
  }

  __device__ __forceinline__ void add(SoftmaxShared&) const {}

  __device__ __forceinline__ void finish(SoftmaxShared& shared) {
    state.sum = reduce_lanes<1, lanes>(state.sum, Sum{});
    if (threadIdx.x % lanes == 0) shared.inverse[row()] = state.inverse_sum();
  }
};

}  // namespace

void parallel_reductions(const ForwardParams& p, DType dtype, void* stream) {
  instance(dtype, p.head_dim, [&](auto element, auto head_dim) {
    launch(tensor_core_tiles_kernel<decltype(element), head_dim, ParallelSoftmax>, p, tile_q, threads,
           sizeof(TilesShared<head_dim>), stream);
  });
}

}  // namespace flashcore::ladder

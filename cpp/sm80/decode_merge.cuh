// SPDX-License-Identifier: Apache-2.0
// The kernel that merges the parts of the decode kernels' items, whatever finds an item's parts.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include "attention/combine.h"
#include "core/cuda_check.h"
#include "sm80/decode_params.h"

namespace flashcore::sm80 {

constexpr int merge_warps = 4;
constexpr int merge_columns = 128;  // of a block: four a lane

__device__ __forceinline__ void store_rounded(__half* to, float low, float high) {
  *reinterpret_cast<__half2*>(to) = __floats2half2_rn(low, high);
}
__device__ __forceinline__ void store_rounded(__nv_bfloat16* to, float low, float high) {
  *reinterpret_cast<__nv_bfloat162*>(to) = __floats2bfloat162_rn(low, high);
}

// One block for a row of the output and 128 of its columns: merges its parts, if it has any, warp w taking parts w, w +
// 4, and so on. The grid has batch · heads_k · rows times ceil(head_dim / 128) blocks.
//
// `Find` says where: find(p, sequence, line, lane), called by whole warps, gives an item's `count` of parts and their
// slot_of(i).
template <class Element, class Find>
__global__ void __launch_bounds__(32 * merge_warps)
    merge_kernel(__grid_constant__ DecodeParams const p, __grid_constant__ Find const find) {
  let_dependents_launch();
  int const warp = threadIdx.x / 32, lane = threadIdx.x % 32, first_column = blockIdx.y * merge_columns;
  int const pair = blockIdx.x / p.rows, row = blockIdx.x - pair * p.rows;
  int const sequence = pair / p.heads_k, head_k = pair - sequence * p.heads_k;
  int const line = head_k * p.row_tiles + row / p.tile_rows;
  auto const parts = find(p, sequence, line, lane);
  wait_for_primary();
  if (parts.count == 1) return;

  // 32 parts at a time: lane l has the log-sum-exp of the l-th, each warp the columns of its eight, four a lane. A larger
  // one among later parts than before shrinks what has been summed.
  constexpr int parts_a_warp = 32 / merge_warps;
  int const lane_column = first_column + lane * 4;
  float4 sum{0.0f, 0.0f, 0.0f, 0.0f};
  float weights = 0.0f, max_lse = minus_infinity();
#pragma unroll 1
  for (int base = 0; base < parts.count; base += 32) {
    auto const place = [&](int i) { return parts.slot_of(base + i) * p.part_rows + row % p.tile_rows; };
    float const lse = base + lane < parts.count ? __ldcg(p.part_lse + place(lane)) : minus_infinity();
    float4 x[parts_a_warp];
#pragma unroll
    for (int j = 0; j < parts_a_warp; ++j) {
      int const i = warp + merge_warps * j;
      x[j] = {0.0f, 0.0f, 0.0f, 0.0f};
      if (base + i < parts.count && lane_column < p.head_dim) {
        x[j] = __ldcg(reinterpret_cast<float4 const*>(p.part_out + place(i) * p.head_dim + lane_column));
      }
    }
    float top = lse;
    auto const take = [&](float y) { top = y > top || y != y ? y : top; };  // a NaN stays
#pragma unroll
    for (int step = 16; step > 0; step /= 2) take(__shfl_xor_sync(0xffffffffu, top, step));
    take(max_lse);
    float const shrunk = part_weight(max_lse, top), lane_weight = part_weight(lse, top);
    max_lse = top;
    weights *= shrunk;
    sum.x *= shrunk, sum.y *= shrunk, sum.z *= shrunk, sum.w *= shrunk;
#pragma unroll
    for (int j = 0; j < parts_a_warp; ++j) {
      float const weight = __shfl_sync(0xffffffffu, lane_weight, warp + merge_warps * j);
      weights += weight;
      sum.x += weight * x[j].x, sum.y += weight * x[j].y, sum.z += weight * x[j].z, sum.w += weight * x[j].w;
    }
  }

  __shared__ float4 warp_sum[merge_warps][32];
  __shared__ float warp_weights[merge_warps];
  warp_sum[warp][lane] = sum;
  if (lane == 0) warp_weights[warp] = weights;
  __syncthreads();
  float total = 0.0f;
#pragma unroll
  for (int w = 0; w < merge_warps; ++w) total += warp_weights[w];
  float const inverse = total == 0.0f ? 0.0f : 1.0f / total;

  int const token = row / p.group, head = head_k * p.group + (row - token * p.group);
  int const column = first_column + threadIdx.x * 2;
  if (threadIdx.x < merge_columns / 2 && column < p.head_dim) {
    float2 y{0.0f, 0.0f};
#pragma unroll
    for (int w = 0; w < merge_warps; ++w) {
      float2 const part = reinterpret_cast<float2 const*>(warp_sum[w])[threadIdx.x];
      y.x += part.x;
      y.y += part.y;
    }
    Element* const out =
        static_cast<Element*>(p.o.data) + sequence * p.o.batch_stride + token * p.o.row_stride + head * p.o.head_stride;
    store_rounded(out + column, y.x * inverse, y.y * inverse);
  }
  if (threadIdx.x == 0 && first_column == 0 && p.lse != nullptr) {
    p.lse[(int64_t{sequence} * p.heads_q + head) * p.seqlen_q + token] = merged_lse(max_lse, total);
  }
}

// `dependent`: started while the decode kernel still runs (programmatic dependent launch).
template <class Element, class Find>
void launch_merge(DecodeParams const& params, Find const& find, bool dependent, cudaStream_t stream) {
  cudaLaunchConfig_t config{};
  config.gridDim = dim3(static_cast<unsigned>(int64_t{params.batch} * params.heads_k * params.rows),
                        static_cast<unsigned>(ceil_div(params.head_dim, merge_columns)));
  config.blockDim = dim3(32 * merge_warps);
  config.stream = stream;
  cudaLaunchAttribute attribute{};
  attribute.id = cudaLaunchAttributeProgrammaticStreamSerialization;
  attribute.val.programmaticStreamSerializationAllowed = 1;
  config.attrs = &attribute;
  config.numAttrs = dependent;
  cuda_check(cudaLaunchKernelEx(&config, merge_kernel<Element, Find>, params, find),
             "launching the merge of the decode kernel");
}

}  // namespace flashcore::sm80

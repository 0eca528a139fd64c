// SPDX-License-Identifier: Apache-2.0
// The kernel that merges the parts of the decode kernels' items, whatever finds an item's parts.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include "attention/combine.h"
#include "attention/dependent.cuh"
#include "core/cuda_check.h"
#include "sm80/decode_params.h"

namespace flashcore::sm80 {

constexpr int merge_warps = 4;      // of a block, at most
constexpr int merge_columns = 128;  // of a block: four a lane

__device__ __forceinline__ void store_rounded(__half* to, float low, float high) {
  *reinterpret_cast<__half2*>(to) = __floats2half2_rn(low, high);
}
__device__ __forceinline__ void store_rounded(__nv_bfloat16* to, float low, float high) {
  *reinterpret_cast<__nv_bfloat162*>(to) = __floats2bfloat162_rn(low, high);
}

// A warp for a row of the output and 128 of its columns: merges its parts, if it has several. The grid has
// ceil(batch · heads_k · rows / warps of a block) times ceil(head_dim / 128) blocks.
//
// `Find` says where: find(p, sequence, line, lane), called by whole warps, gives an item's `count` of parts and their
// slot_of(i).
template <class Element, class Find>
__global__ void __launch_bounds__(32 * merge_warps)
    merge_kernel(__grid_constant__ DecodeParams const p, __grid_constant__ Find const find) {
  launch_dependents();
  int const warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  int const column = blockIdx.y * merge_columns + lane * 4;
  int64_t const number = int64_t{blockIdx.x} * (blockDim.x / 32) + warp;
  bool const exists = number < int64_t{p.batch} * p.heads_k * p.rows;
  int const pair = exists ? static_cast<int>(number / p.rows) : 0, row = exists ? static_cast<int>(number % p.rows) : 0;
  int const sequence = pair / p.heads_k, head_k = pair - sequence * p.heads_k;
  auto const parts = find(p, sequence, head_k * p.row_tiles + row / p.tile_rows, lane);
  wait_for_prerequisites();
  if (!exists || parts.count == 1) return;

  // 32 parts at a time: lane l has the log-sum-exp of the l-th, and four columns of all, of eight at once. A larger one
  // among later parts than before shrinks what has been summed.
  constexpr int at_once = 8;
  float4 sum{0.0f, 0.0f, 0.0f, 0.0f};
  float weights = 0.0f, max_lse = minus_infinity();
#pragma unroll 1
  for (int base = 0; base < parts.count; base += 32) {
    auto const place = [&](int i) { return parts.slot_of(base + i) * p.part_rows + row % p.tile_rows; };
    float const lse = base + lane < parts.count ? __ldcg(p.part_lse + place(lane)) : minus_infinity();
    float top = lse;
    auto const take = [&](float y) { top = y > top || y != y ? y : top; };  // a NaN stays
    float shrunk = 1.0f, lane_weight = 0.0f;
#pragma unroll 1
    for (int first = 0; first < 32 && base + first < parts.count; first += at_once) {
      float4 x[at_once];
#pragma unroll
      for (int j = 0; j < at_once; ++j) {
        x[j] = {0.0f, 0.0f, 0.0f, 0.0f};
        if (base + first + j < parts.count && column < p.head_dim) {
          x[j] = __ldcg(reinterpret_cast<float4 const*>(p.part_out + place(first + j) * p.head_dim + column));
        }
      }
      if (first == 0) {
#pragma unroll
        for (int step = 16; step > 0; step /= 2) take(__shfl_xor_sync(0xffffffffu, top, step));
        take(max_lse);
        shrunk = part_weight(max_lse, top);
        lane_weight = part_weight(lse, top);
        max_lse = top;
        weights *= shrunk;
        sum.x *= shrunk, sum.y *= shrunk, sum.z *= shrunk, sum.w *= shrunk;
      }
#pragma unroll
      for (int j = 0; j < at_once; ++j) {
        float const weight = __shfl_sync(0xffffffffu, lane_weight, first + j);
        weights += weight;
        sum.x += weight * x[j].x, sum.y += weight * x[j].y, sum.z += weight * x[j].z, sum.w += weight * x[j].w;
      }
    }
  }

  float const inverse = weights == 0.0f ? 0.0f : 1.0f / weights;
  int const token = row / p.group, head = head_k * p.group + (row - token * p.group);
  if (column < p.head_dim) {
    Element* const out =
        static_cast<Element*>(p.o.data) + sequence * p.o.batch_stride + token * p.o.row_stride + head * p.o.head_stride;
    store_rounded(out + column, sum.x * inverse, sum.y * inverse);
    store_rounded(out + column + 2, sum.z * inverse, sum.w * inverse);
  }
  if (lane == 0 && blockIdx.y == 0 && p.lse != nullptr) {
    p.lse[(int64_t{sequence} * p.heads_q + head) * p.seqlen_q + token] = merged_lse(max_lse, weights);
  }
}

// `dependent`: started while the decode kernel still runs (programmatic dependent launch).
template <class Element, class Find>
void launch_merge(DecodeParams const& params, Find const& find, bool dependent, cudaStream_t stream,
                  int warps = merge_warps) {
  cudaLaunchConfig_t config{};
  int64_t const rows = int64_t{params.batch} * params.heads_k * params.rows;
  config.gridDim = dim3(static_cast<unsigned>((rows + warps - 1) / warps),
                        static_cast<unsigned>(ceil_div(params.head_dim, merge_columns)));
  config.blockDim = dim3(static_cast<unsigned>(32 * warps));
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

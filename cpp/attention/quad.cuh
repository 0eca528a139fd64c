// SPDX-License-Identifier: Apache-2.0
// Reductions over the four lanes that share a row of an MMA accumulator, on every machine of the GPU.
#pragma once

namespace flashcore {

// The largest over the quad, and its sum. All of the warp's lanes call them.
__device__ __forceinline__ float quad_max(float x) {
  x = fmaxf(x, __shfl_xor_sync(0xffffffffu, x, 1));
  return fmaxf(x, __shfl_xor_sync(0xffffffffu, x, 2));
}
__device__ __forceinline__ float quad_sum(float x) {
  x += __shfl_xor_sync(0xffffffffu, x, 1);
  return x + __shfl_xor_sync(0xffffffffu, x, 2);
}

}  // namespace flashcore

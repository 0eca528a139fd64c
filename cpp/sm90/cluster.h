// SPDX-License-Identifier: Apache-2.0
// The blocks of a cluster: their barrier, and the addresses of each other's shared memory. CuTe's own are
// without the memory clobber that the compiler has to see.
#pragma once

#include <cstdint>

namespace flashcore::sm90 {

__device__ __forceinline__ void cluster_arrive_relaxed() {
  asm volatile("barrier.cluster.arrive.relaxed.aligned;" ::: "memory");
}
__device__ __forceinline__ void cluster_wait_acquire() {
  asm volatile("barrier.cluster.wait.acquire.aligned;" ::: "memory");
}
// The address of what lies at `address` of this block's shared memory in that of the cluster's block `rank`.
__device__ __forceinline__ uint32_t in_block(uint32_t address, int rank) {
  uint32_t result;
  asm volatile("mapa.shared::cluster.u32 %0, %1, %2;" : "=r"(result) : "r"(address), "r"(rank));
  return result;
}

}  // namespace flashcore::sm90

// SPDX-License-Identifier: Apache-2.0
// sm90_decode_turned, the decode kernel for one long sequence on compute capability 9.0. wgmma has 64 rows: here these
// are keys, then columns of the output, and the products have as few columns as there are rows of queries. Two groups
// of four warps take the block's tiles in turn, each with a ring and a producer of its own, so that one multiplies
// while the other waits for its softmax. README.md beside this file tells what that gains, and where sm90_decode is
// faster.
#pragma once

#include "sm90/decode_launch.cuh"
#include "sm90/decode_producer.cuh"
#include "sm90/decode_turned_consumers.cuh"

namespace flashcore::sm90 {

template <class Config>
__global__ void __launch_bounds__(Config::threads, Config::blocks_a_unit)
    decode_turned_kernel(__grid_constant__ DecodeArguments const a) {
  extern __shared__ __align__(1024) char memory[];
  typename Config::Memory const shared{memory, a.p.stages};
  int const warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  if (warp >= Config::warps) {  // a producer, which uses its group's barriers before the consumers wait for it
    int const group = warp - Config::warps;
    if (lane == 0 && group == 0) {
      asm volatile("prefetch.tensormap [%0];" ::"l"(&a.k) : "memory");
      asm volatile("prefetch.tensormap [%0];" ::"l"(&a.v) : "memory");
    }
    if (lane < shared.slots()) {
      shared.full(group)[lane].init(1);
      shared.empty(group)[lane].init(Config::key_warps);
    }
    if (lane == 0) shared.weights_read(group).init(Config::key_warps);
    if (lane == 0 && group == 0 && a.log_cluster > 0) shared.received_all()->init(1);
    cutlass::arch::fence_barrier_init();
    __syncwarp();
  }
  if (a.prefetched > 0 && warp < Config::warps) prefetch<Config>(a);

  typename Config::Work work;
  if (warp >= Config::warps) {
    work.clear();
    int const group = warp - Config::warps;
    produce<Config>(a, shared, group, lane);
    if (group > 0) wait_as_producer<Config>();
  } else {
    consume<Config>(a, shared, work, warp, lane);
  }
  // The cluster's blocks have read their stages when all their warps have come here.
  if (a.log_cluster > 0) cluster_arrive_relaxed();
  if (shared.part().sequence < 0) {
    if (a.log_cluster > 0) cluster_wait_acquire();
    return;
  }
  finish<Config>(a, shared, work, warp, lane, warp < Config::warps);
  if (a.log_cluster > 0 && warp >= Config::warps) cluster_wait_acquire();
}

template <class Config>
void run_decode_turned(DecodeParams const& p, Plan const& plan, cudaStream_t stream) {
  launch_decode<Config>(decode_turned_kernel<Config>, p, plan, stream);
}

}  // namespace flashcore::sm90

// SPDX-License-Identifier: Apache-2.0
// sm90_decode, a decode kernel for compute capability 9.0: a few queries a sequence over a long cache, which is bound
// by reading the cache. A block has a part of the keys of one sequence and key head. Its producer warp keeps a ring of
// tiles of keys and values full through TMA, and four consumer warps multiply what has come. README.md beside this file
// tells how the keys are divided and who merges.
//
// Every instruction is fetched once a block, and at the end of a short part nothing hides that: loops that run once or
// twice are not unrolled, and divisions are of 32 bits.
#pragma once

#include "sm90/decode_consumers.cuh"
#include "sm90/decode_launch.cuh"
#include "sm90/decode_producer.cuh"

namespace flashcore::sm90 {

template <class Config>
__global__ void __launch_bounds__(Config::threads, Config::blocks_a_unit)
    decode_kernel(__grid_constant__ DecodeArguments const a) {
  extern __shared__ __align__(1024) char memory[];
  typename Config::Memory const shared{memory, a.p.stages};
  int const warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  if (warp == Config::warps) {
    if (lane == 0) {
      asm volatile("prefetch.tensormap [%0];" ::"l"(&a.k) : "memory");
      asm volatile("prefetch.tensormap [%0];" ::"l"(&a.v) : "memory");
    }
    if (lane < a.p.stages) {
      shared.full_keys()[lane].init(1);
      shared.full_values()[lane].init(1);
      shared.empty()[lane].init(Config::warps);
    }
    if (lane == 0 && a.log_cluster > 0) shared.received_all()->init(1);
    cutlass::arch::fence_barrier_init();
    __syncwarp();
  }
  if (a.log_cluster > 0) cluster_arrive_relaxed();
  if (a.prefetched > 0 && warp < Config::warps) prefetch<Config>(a);

  typename Config::Work work;
  if (warp == Config::warps) {
    work.clear();
    produce<Config>(a, shared, 0, lane);
  } else {
    consume<Config>(a, shared, work, warp, lane);
  }
  if (shared.part().sequence < 0) {
    if (a.log_cluster > 0) cluster_wait_acquire();
    return;
  }
  finish<Config>(a, shared, work, warp, lane, warp != Config::warps);
}

template <class Config>
void run_decode(DecodeParams const& p, Plan const& plan, cudaStream_t stream) {
  launch_decode<Config>(decode_kernel<Config>, p, plan, stream);
}

}  // namespace flashcore::sm90

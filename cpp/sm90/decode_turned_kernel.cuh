// SPDX-License-Identifier: Apache-2.0
// sm90_decode_turned, the decode kernel on compute capability 9.0 for one sequence, or a few, whose blocks know their
// part of the work without the lengths, and for few rows of several, whose blocks stay. wgmma has 64 rows: here these
// are keys, then columns of the output, and the products have as few columns as there are rows of queries. Two groups
// of four warps take the block's tiles in turn, each with a ring and a producer of its own, so that one multiplies
// while the other waits for its softmax. decode.md beside this file tells what that gains.
#pragma once

#include "sm90/decode_launch.cuh"
#include "sm90/decode_turned_consumers.cuh"
#include "sm90/decode_turned_finish.cuh"
#include "sm90/decode_turned_producer.cuh"

namespace flashcore::sm90 {

template <class Config>
__global__ void __launch_bounds__(Config::threads, Config::blocks_a_unit)
    decode_turned_kernel(__grid_constant__ TurnedArguments const a) {
  extern __shared__ __align__(1024) char memory[];
  TurnedMemory<Config> shared{memory, a.p.stages};
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

  TurnedWork<Config> work;
  TurnedPlace place;
  bool const consumes = warp < Config::warps;
  if (!consumes) {
    work.clear();
    produce<Config>(a, shared, warp - Config::warps, lane);
  } else {
    bool const exists = bring_queries<Config>(a, shared);
    if (Config::tile.walks() && !exists) return;
    if (Config::merges && threadIdx.x == 0) shared.items()[0].parts = 0;
    if (threadIdx.x < Config::groups * Config::rows) shared.references(0)[threadIdx.x] = 0.0f;
    cutlass::arch::fence_view_async_shared();
    consumers_sync(Config::consumers);  // the queries are here, for the products, too
  }
#pragma unroll 1
  for (int number = 0;; ++number) {
    if (consumes) consume<Config>(a, shared, number, work, place, warp, lane);
    // The cluster's blocks have read their slots when all their warps have come here.
    if (a.log_cluster > 0) cluster_arrive_relaxed();
    if (finish<Config>(a, shared, number, work, place, warp, lane, consumes)) break;
  }
  if (a.log_cluster > 0 && warp >= Config::warps) cluster_wait_acquire();
}

template <class Config>
void run_decode_turned(DecodeParams const& p, Plan const& plan, cudaStream_t stream) {
  if constexpr (Config::tile.may_merge() && !Config::merges) {
    if (p.counts != nullptr) return run_decode_turned<typename Config::Merging>(p, plan, stream);
  }
  bool const paged = p.page_table != nullptr;
  int const box_rows = paged ? min_of(Config::tile_k, p.page_size) : Config::tile_k;
  // One box brings all columns of its keys, if these are a whole tile's.
  bool const whole = p.head_dim == 64 * Config::panels && box_rows == Config::tile_k;
  auto const cache = [&](Rows<void const*> const& rows) { return cache_map<Config>(p, rows, box_rows, whole); };
  // A single sequence's clusters leave room for the next call's, whose first tiles then come while these end (4,096
  // keys of dimension 128, 2 / 4 tiles 7.6 / 7.5 us, 32,768 45.0 / 44.4; 4 / 5, in pages of 16 8.2 / 7.8 and 47.8
  // / 47.6, contiguous 7.8 / 7.7 and 44.9 / 45.2). With 65,536 keys that takes 88 to 104, without 88.9.
  int const most_prefetched = paged ? 5 : 4;
  constexpr int most_elements = 32768 * 128;
  bool const prefetches = p.batch == 1 && plan.cluster > 1 && int64_t{p.seqlen_k} * p.head_dim <= most_elements;
  // Blocks that stay start while the merge before works, and bring one tile: 8 sequences of 8,192 keys 89.8 us, without
  // 92.4, with two 90.2.
  bool const walks = p.even == 0;
  TurnedArguments const arguments{cache(p.k),
                                  cache(p.v),
                                  p,
                                  p.parts,
                                  Divisor::of(p.group),
                                  Divisor::of(p.row_tiles),
                                  Divisor::of(p.even),
                                  log2_of_power(box_rows),
                                  paged ? log2_of_power(p.page_size) : 0,
                                  whole ? 1 : Config::panels,
                                  log2_of_power(plan.cluster),
                                  walks        ? 1
                                  : prefetches ? most_prefetched
                                               : 0,
                                  walks,
                                  p.counts,
                                  p.launch};

  launch_decode<decode_turned_kernel<Config>>(plan, Config::threads, arguments, stream,
                                              "preparing the sm90_decode_turned kernel",
                                              "launching the sm90_decode_turned kernel");
}

}  // namespace flashcore::sm90

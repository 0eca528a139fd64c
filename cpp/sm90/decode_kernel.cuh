// SPDX-License-Identifier: Apache-2.0
// The decode kernel for compute capability 9.0: a few queries a sequence over a long cache, which is bound by reading
// the cache. A block has a part of the keys of one sequence and key head. Its producer warp keeps a ring of tiles of
// keys and values full through TMA, and four consumer warps multiply what has come. decode.md beside this file tells
// how the keys are divided and who merges.
//
// Every instruction is fetched once a block, and at the end of a short part nothing hides that: loops that run once or
// twice are not unrolled, and divisions are of 32 bits.
#pragma once

#include "sm90/decode_consumers.cuh"
#include "sm90/decode_finish.cuh"
#include "sm90/decode_launch.cuh"
#include "sm90/decode_producer.cuh"

namespace flashcore::sm90 {

template <class Config>
__global__ void __launch_bounds__(Config::threads, Config::blocks_a_unit)
    decode_kernel(__grid_constant__ DecodeArguments const a) {
  extern __shared__ __align__(1024) char memory[];
  DecodeMemory<Config> const shared{memory, a.p.stages};
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

  Work<Config> work;
  StagePlace place;
  bool const consumes = warp != Config::warps;
  if (!consumes) {
    work.clear();
    produce<Config>(a, shared, lane);
  } else {
    start_consumer<Config>(a, shared);
  }
  if (shared.part(0).sequence < 0) {
    if (a.log_cluster > 0) cluster_wait_acquire();
    return;
  }
#pragma unroll 1
  for (int number = 0;; ++number) {
    if (consumes) consume<Config>(a, shared, shared.part(number), work, place, warp, lane);
    if (finish<Config>(a, shared, number, work, place, warp, lane, consumes)) break;
  }
}

template <class Config>
void run_decode(DecodeParams const& p, Plan const& plan, cudaStream_t stream) {
  bool const paged = p.page_table != nullptr;
  int const box_rows = paged ? min_of(Config::tile_k, p.page_size) : Config::tile_k;
  bool const whole = p.head_dim == 64 * Config::panels;  // panels: one box brings all columns
  auto const cache = [&](Rows<void const*> const& rows) { return cache_map<Config>(p, rows, box_rows, whole); };
  // A single sequence's clusters leave room for the next call's, whose first tiles then come while these end. (4,096
  // keys 9.8 us, 9.2 so, and 9.0 with five tiles; 32,768 47.4, 46.8; but 131,072 176.6, 179.) Where parts are found by
  // the lengths, blocks start while the merge before works, and bring one tile: 8 sequences of 8,192 keys 93.1 us, 91.1
  // so, 93.4 with two.
  constexpr int most_prefetched = 5, most_keys = 65536;
  bool const alone = p.batch == 1 && plan.cluster > 1;
  int const prefetched = alone ? (p.seqlen_k <= most_keys ? most_prefetched : 0) : p.even == 0;
  DecodeArguments const arguments{cache(p.k),
                                  cache(p.v),
                                  p,
                                  p.parts,
                                  Divisor::of(p.group),
                                  Divisor::of(p.row_tiles),
                                  log2_of_power(box_rows),
                                  paged ? log2_of_power(p.page_size) : 0,
                                  whole ? 1 : Config::panels,
                                  p.even > 0 ? Divisor::of(p.even) : Divisor{0},
                                  log2_of_power(plan.cluster),
                                  log2_of_power(plan.shares),
                                  prefetched,
                                  p.even == 0 || prefetched > 0};

  launch_decode<decode_kernel<Config>>(plan, Config::threads, arguments, stream, "preparing the sm90 decode kernel",
                                       "launching the sm90 decode kernel");
}

}  // namespace flashcore::sm90

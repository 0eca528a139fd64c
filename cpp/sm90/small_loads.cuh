// SPDX-License-Identifier: Apache-2.0
// What a block of the kernel for small problems asks for: lines of the arrays in the L2 cache; in shared memory all of
// its queries, keys and values at once.
#pragma once

#include <cute/arch/copy_sm90_tma.hpp>

#include "sm90/dependent_launch.h"
#include "sm90/small_block.cuh"

namespace flashcore::sm90 {

// Asks for the lines of the arrays to be brought into the L2 cache, in the order in which they are needed. The tiles of
// a head divide its keys' and values' rows. Only a multiprocessor's first block does that: the data of the others come
// while that one computes.
template <class Config>
__device__ __forceinline__ void prefetch(SmallArguments<typename Config::Score> const& a, Task const& task) {
  using Element = typename Config::Element;
  uint32_t const block = (blockIdx.z * gridDim.y + blockIdx.y) * gridDim.x + blockIdx.x;
  if (block >= SmallTile::units) return;
  int const thread = threadIdx.x, rank = Warpgroup<Config>::rank();
#pragma unroll 1
  for (int row = thread; rank == 0 && row < task.job.queries * a.pack; row += Config::threads) {
    int const query = query_of(a, row);
    prefetch_row<Element, Config::panels>(a.p.q, task.job.sequence, task.job.head * a.pack + (row - query * a.pack),
                                          task.job.first + query);
  }
  int const tiles = gridDim.y, begin = task.mask.first_key(0), end = task.mask.end_key(a.p.seqlen_q - 1);
  int const first = begin + (rank * Config::threads + thread) * tiles + static_cast<int>(blockIdx.y);
  auto const share_of = [&](auto const& rows) {
#pragma unroll 1
    for (int row = first; row < end; row += Config::cluster * Config::threads * tiles) {
      prefetch_row<Element, Config::panels>(rows, task.job.sequence, task.head_k, row);
    }
  };
  share_of(a.p.k);
  share_of(a.p.v);
}

// One thread of each group of warpgroups that share keys: tells the barriers what will come. The first group's thread
// does so, and below, for the queries.
template <class Config>
__device__ __forceinline__ void expect(SmallArguments<typename Config::Score> const& a,
                                       SmallMemory<Config> const& shared, Warpgroup<Config> warpgroup,
                                       Task const& task) {
  int const group = warpgroup.group();
  if (group == 0) shared.full_queries().arrive_and_expect_tx(a.q_bytes);
#pragma unroll 1
  for (int i = 0; i < task.count(warpgroup.part()) * Config::steps; ++i) {
    shared.full_keys(group, i).arrive_and_expect_tx(Config::kv_bytes);
    if (i % Config::steps == 0) shared.full_values(group, i).arrive_and_expect_tx(Config::steps * Config::kv_bytes);
  }
}

// Asks for all that the group will read, in the order in which it is needed: Q, the keys of a chunk, those of the next
// one, the values of the first ...
template <class Config>
__device__ __forceinline__ void request(SmallArguments<typename Config::Score> const& a,
                                        SmallMemory<Config> const& shared, Warpgroup<Config> warpgroup,
                                        Task const& task) {
  constexpr auto hint = static_cast<uint64_t>(cute::TMA::CacheHintSm90::EVICT_NORMAL);
  constexpr int steps = Config::steps, step = Config::step;
  auto const load = [&](CUtensorMap const& map, Barrier& full, char* to, int panel_bytes, int row, int head) {
#pragma unroll
    for (int panel = 0; panel < Config::panels; ++panel) {
      cute::SM90_TMA_LOAD_5D::copy(&map, reinterpret_cast<uint64_t*>(&full), hint, to + panel * panel_bytes,
                                   panel * panel_columns, 0, row, head, task.job.sequence);
    }
  };
  int const group = warpgroup.group(), part = warpgroup.part();
  int const first = task.begin(part) * steps * step, count = task.count(part) * steps;
  if (group == 0) load(a.q, shared.full_queries(), shared.queries(), Config::q_panel, task.job.first, task.job.head);
#pragma unroll 1
  for (int i = 0; i < count + steps; ++i) {
    if (i < count) {
      load(a.k, shared.full_keys(group, i), shared.keys(group, i), Config::kv_panel, first + i * step, task.head_k);
    }
    int const j = i - steps;
    if (j >= 0 && j % steps == 0) {
      load(a.v, shared.full_values(group, j), shared.values(group, j), Config::kv_panel, first + j * step, task.head_k);
    }
  }
}

}  // namespace flashcore::sm90

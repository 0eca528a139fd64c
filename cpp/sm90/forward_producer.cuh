// SPDX-License-Identifier: Apache-2.0
// The producer of the Hopper forward kernel: which tile of queries comes next, and what TMA brings for it.
#pragma once

#include <cute/arch/copy_sm90_tma.hpp>

#include "sm90/forward_block.cuh"

namespace flashcore::sm90 {

// What TMA tells the L2 cache: keys and values will be read again by other blocks, queries will not.
constexpr uint64_t keep_in_l2 = 0x14f0000000000000, drop_from_l2 = 0x12f0000000000000;

// The block's next tile after `index`. The blocks stay; where tiles can be as uneven as sequences are, a counter gives
// each free block the next one, and otherwise they take tiles in turn, forwards and backwards like a plough, so that
// each gets as many long as short ones; every two rounds begin two blocks further on, so that the same blocks do not
// always get the shortest ones, or the places that stay empty.
template <class Score>
__device__ __forceinline__ uint32_t next_tile(Arguments<Score> const& a, uint32_t index) {
  if (a.p.next_tile != nullptr) return gridDim.x + atomicAdd(a.p.next_tile, 1);
  uint32_t const row = index / gridDim.x + 1, column = (blockIdx.x + (row & ~1u)) % gridDim.x;
  return row * gridDim.x + (row & 1 ? gridDim.x - 1 - column : column);
}

// One thread: tells the consumers each job, asks for its queries and, as the slots empty, for its tiles of keys and
// values, in the order in which the consumers need them: K0 K1 V0 K2 V1 ... V(last).
template <class Config>
__device__ __forceinline__ void produce(Arguments<typename Config::Score> const& a, SharedMemory<Config>& shared) {
  RingPlace<Config::slots> place;
  JobNumber<Config::q_buffers> current;
  auto const load = [&](CUtensorMap const& map, int row, int head, int sequence) {
    shared.empty[place.slot].wait(place.phase ^ 1);
    Barrier& full = shared.full[place.slot];
    full.arrive_and_expect_tx(Config::kv_bytes);
#pragma unroll
    for (int panel = 0; panel < Config::panels; ++panel) {
      cute::SM90_TMA_LOAD_5D::copy(&map, reinterpret_cast<uint64_t*>(&full), keep_in_l2,
                                   shared.kv[place.slot] + panel * Config::kv_panel, panel * Config::panel_columns, 0,
                                   row, head, sequence);
    }
    place.advance();
  };
  // Values come a tile later than their keys: the last ones of a job, where pipelined, after the next job's first keys,
  // if it has any.
  shared.from = 0;
  shared.values.row = -1;
  auto const load_values = [&] {
    TilePlace const& values = shared.values;
    if (values.row < 0) return;
    load(a.v, values.row, values.head, values.sequence);
    shared.values.row = -1;
  };
  auto const wait_for_room = [&] {
    if (current.begins_half()) shared.jobs_done.wait(current.number == 0);
    shared.q_empty[current.slot()].wait(current.phase() ^ 1);
  };
  // Posts the job that has been written, with so many bytes of queries.
  auto const post = [&](int bytes) {
    shared.noted[current.number] = 0;
    asm volatile("" ::: "memory");
    shared.q_full[current.slot()].arrive_and_expect_tx(bytes);
  };
  auto const post_sign = [&](int sign) {
    load_values();
    Job& job = shared.job[current.number];
    wait_for_room();
    job.count = 0;
    job.work.tile = sign;
    post(0);
  };
  int left = 0;  // jobs to be done once more, of those that are known
  auto const collect = [&] {
    post_sign(Job::notes);
    shared.q_empty[current.slot()].wait(current.phase());
    asm volatile("" ::: "memory");
    current.advance();
    left = shared.again_count;
    shared.again_count = 0;
  };
  // Consumers may be as many jobs behind as there are places for queries, and one.
  constexpr int many = sizeof(shared.again) / sizeof(Work) - 4;
#pragma unroll 1
  for (shared.tile = blockIdx.x;;) {
    bool const more = shared.tile / gridDim.x * gridDim.x < a.tiles, once_more = left > 0;
    Work work;
    uint32_t next = shared.tile;
    if (once_more) {
      work = shared.again[--left];
    } else if (!more || *const_cast<int volatile*>(&shared.again_count) >= many) {
      collect();
      if (left == 0 && !more) break;
      continue;
    } else {
      uint32_t const tile = shared.tile;
      // Before this job is asked for: behind it the atomic addition would be one more wait between two jobs. (Variable
      // lengths, one run each, on two H100s: 1.09 of FlashAttention-3's speed so, 1.05 with the addition last.) Its
      // result is not waited for before the job has been posted.
      next = next_tile(a, tile);
      if (tile >= a.tiles || !a.scheduler.work(a.p, tile, work, &shared.from)) {
        shared.tile = next;
        continue;
      }
    }
    Job job = job_of<Config>(a, work);
    job.once_more = once_more;
    KeyRange const& range = job.range;
    int const count = job.count;
    int const sequence = a.p.cu_seqlens_q ? 0 : work.sequence;
    // The job is written down while its queries come. (The barrier may count their bytes before they are announced.)
    wait_for_room();
    if (count > 0) {
#pragma unroll
      for (int panel = 0; panel < Config::panels; ++panel) {
        cute::SM90_TMA_LOAD_5D::copy(&a.q, reinterpret_cast<uint64_t*>(&shared.q_full[current.slot()]), drop_from_l2,
                                     shared.q[current.slot()] + panel * Config::q_panel, panel * Config::panel_columns,
                                     0, work.q_begin + job.first, work.head, sequence);
      }
    }
    shared.job[current.number] = job;
#pragma unroll 1
    for (int i = 0; i < Config::parts; ++i) shared.job[current.number].part[i] = part_of<Config>(a, job, i);
    post(count == 0 ? 0 : a.q_bytes);
    shared.tile = next;
    if (count == 0) {
      load_values();
      current.advance();
      continue;
    }
    int const head_k = a.pack == a.p.group ? work.head : work.head * a.pack / a.p.group;
    auto const row = [&](int i) { return work.k_begin + range.tile(i) * Config::tile_k; };
    current.advance();
#pragma unroll 1
    for (int i = 0; i < count; ++i) {
      load(a.k, row(i), head_k, sequence);
      load_values();
      shared.values = {row(i), head_k, sequence};
    }
    if (!Config::pipelined) load_values();
  }
  post_sign(Job::end);
}

}  // namespace flashcore::sm90

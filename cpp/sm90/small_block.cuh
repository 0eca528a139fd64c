// SPDX-License-Identifier: Apache-2.0
// What a block of the kernel for small problems is made of: its configuration, arguments, task, shared memory and
// warpgroups.
#pragma once

#include "attention/mask.h"
#include "sm90/output_row.cuh"
#include "sm90/references.cuh"
#include "sm90/small_tile.h"

namespace flashcore::sm90 {

// What the kernel is compiled for; small_tiles.inc has the numbers and their reasons.
template <class Element_, int head_dim_, int row_groups_, int key_groups_, int cluster_, int chunk_, int blocks_,
          bool plain_score_>
struct SmallConfig {
  using Element = Element_;
  using Score = std::conditional_t<plain_score_, PlainScore, CappedScore>;
  static constexpr SmallTile tile{head_dim_, row_groups_, key_groups_, cluster_, chunk_, blocks_, plain_score_};
  static constexpr int head_dim = head_dim_, row_groups = row_groups_, key_groups = key_groups_, cluster = cluster_;
  static constexpr int blocks = blocks_, parts = tile.parts();
  static constexpr bool adds_sums = true;  // the rows' sums are added up, not multiplied by a column of ones
  static constexpr bool steady = false;    // weights are relative to references: see Steady

  static constexpr int step = SmallTile::step, steps = tile.steps();  // keys of a product; of these a chunk
  static constexpr int tile_q = tile.tile_q(), threads = tile.threads();
  static constexpr int panels = tile.panels();
  static constexpr int q_panel = tile_q * row_bytes, kv_panel = step * row_bytes;
  static constexpr int q_bytes = tile.q_bytes(), kv_bytes = tile.kv_bytes();
  // The exchange: a part merges and writes a share of the columns of its 64 rows, in pieces of 8 columns, which are
  // four accumulators of a lane: first with the other warpgroup of the same rows, then with the cluster's other blocks.
  static constexpr int group_pieces = head_dim / 8 / key_groups, pieces = group_pieces / cluster;
  static constexpr int piece_bytes = 128 * 16;
  static_assert(head_dim % 64 == 0 && chunk_ % step == 0 && key_groups <= 2 && pieces >= 1);
  static_assert(panels == 1 || steps == 1);  // a chunk's values are one box: its steps lie behind each other
};

// The same without maxima, where there are many rows and nobody asks for their log-sum-exp (references.cuh).
template <class Config>
struct Steady : Config {
  static constexpr bool steady = true, adds_sums = false;
  static_assert(Config::tile.ones_bytes() == ones_bytes);
};

template <class Score>
struct SmallArguments : Arguments<Score> {
  int steps;                                         // of a part's keys, that shared memory has room for
  int values_at, ones_at, received_at, barriers_at;  // where in shared memory these begin
  bool alone;                                        // a block has a multiprocessor for itself
};

// What the block is to do. Lies in shared memory: kept in registers over the products, its numbers would make them
// spill.
struct Task {
  JobPlace job;
  int head_k;
  Mask mask;
  KeyRange range;   // the chunks of keys that the tile sees, which the parts divide evenly
  int share;        // chunks of each part, but for those at the end
  int block_share;  // and of each block

  __device__ __forceinline__ int begin(int part) const { return range.begin + part * share; }
  __device__ __forceinline__ int count(int part) const { return clamp_to(range.end - begin(part), 0, share); }
  // Whether a block of the cluster has keys (the first ones do), and how many of the others.
  __device__ __forceinline__ bool has_keys(int rank) const { return rank * block_share < range.count(); }
  template <int cluster>
  __device__ __forceinline__ int senders(int rank) const {
    int count = 0;
#pragma unroll
    for (int other = 0; other < cluster; ++other) count += other != rank && has_keys(other);
    return count;
  }
};
static_assert(sizeof(Task) <= SmallTile::state_bytes);

// Queries, and keys and values in steps of 64, in panels of 64 columns; what each warpgroup receives, from every sender
// pieces of columns as the lanes hold them and behind them the rows' states.
template <class Config>
struct SmallMemory {
  char* base;
  SmallArguments<typename Config::Score> const& a;

  __device__ __forceinline__ char* queries() const { return base; }
  __device__ __forceinline__ char* keys(int group, int step) const {
    return base + Config::q_bytes + (group * a.steps + step) * Config::kv_bytes;
  }
  __device__ __forceinline__ char* values(int group, int step) const {
    return base + a.values_at + (group * a.steps + step) * Config::kv_bytes;
  }
  __device__ __forceinline__ char* ones() const { return base + a.ones_at; }
  // What a warpgroup receives from its neighbour, and from the `sender`-th of the other blocks.
  __device__ __forceinline__ char* from_neighbour(int warpgroup) const {
    return base + a.received_at + warpgroup * Config::tile.received_bytes();
  }
  __device__ __forceinline__ char* from_block(int warpgroup, int sender) const {
    return from_neighbour(warpgroup) + Config::tile.neighbour_bytes() + sender * Config::tile.block_bytes();
  }

  __device__ __forceinline__ Barrier* barriers() const { return reinterpret_cast<Barrier*>(base + a.barriers_at); }
  __device__ __forceinline__ Barrier& full_queries() const { return barriers()[0]; }
  __device__ __forceinline__ Barrier& full_keys(int group, int step) const {
    return barriers()[1 + group * 2 * SmallTile::most_steps + step];
  }
  // Of the chunk that begins with this step.
  __device__ __forceinline__ Barrier& full_values(int group, int step) const {
    return full_keys(group, SmallTile::most_steps + step);
  }
  __device__ __forceinline__ Barrier& received(int warpgroup) const { return full_keys(Config::key_groups, warpgroup); }
  __device__ __forceinline__ Task& task() const {
    return *reinterpret_cast<Task*>(barriers() + Config::tile.barriers());
  }
  // Which query a row of the tile is: divisions by the heads of a group that nobody has to wait for.
  __device__ __forceinline__ int& query(int row) const {
    return reinterpret_cast<int*>(reinterpret_cast<char*>(&task()) + SmallTile::state_bytes)[row];
  }
};

__device__ __forceinline__ uint32_t address_of(void const* shared) { return cute::cast_smem_ptr_to_uint(shared); }

// A warpgroup: its 64 rows of the tile, and its part of the keys.
template <class Config>
struct Warpgroup {
  int index;

  __device__ __forceinline__ int rows() const { return index / Config::key_groups; }
  __device__ __forceinline__ int group() const { return index % Config::key_groups; }
  __device__ __forceinline__ static int rank() {  // of the block in its cluster
    int x = 0;
    if (Config::cluster > 1) asm volatile("mov.u32 %0, %%ctaid.x;" : "=r"(x));
    return x % Config::cluster;
  }
  __device__ __forceinline__ int part() const { return rank() * Config::key_groups + group(); }
  __device__ __forceinline__ static int thread() { return threadIdx.x % 128; }
};

// The grid is (blocks of a cluster · heads, tiles, sequences), and the tiles with the most keys come first within a
// sequence.
template <class Config>
__device__ __forceinline__ Task this_task(SmallArguments<typename Config::Score> const& a) {
  Task task;
  int const queries = a.scheduler.tile_q, first = static_cast<int>(gridDim.y - 1 - blockIdx.y) * queries;
  int const head = blockIdx.x / Config::cluster;
  task.job = {static_cast<int>(blockIdx.z), head, first, min_of(queries, a.p.seqlen_q - first)};
  task.head_k = a.pack == a.p.group ? head : head * a.pack / a.p.group;
  task.mask = Mask::make(a.p.seqlen_q, a.p.seqlen_k, a.p.window_left, a.p.window_right);
  task.range = task.mask.key_range(first, first + task.job.queries, Config::steps * Config::step);
  task.share = ceil_div(task.range.count(), Config::parts);
  task.block_share = task.share * Config::key_groups;
  return task;
}

// Which of the tile's queries a row belongs to.
template <class Score>
__device__ __forceinline__ int query_of(SmallArguments<Score> const& a, int row) {
  return a.pack == 1 ? row : row / a.pack;
}

}  // namespace flashcore::sm90

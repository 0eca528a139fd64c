// SPDX-License-Identifier: Apache-2.0
// What a block of the Hopper forward kernel is made of: its configuration, arguments, shared memory and jobs.
#pragma once

#include <cutlass/arch/barrier.h>

#include "attention/mask.h"
#include "attention/scheduler.h"
#include "attention/score.h"
#include "core/forward_params.h"
#include "sm90/tensor_core.h"
#include "sm90/tensor_map.h"

namespace flashcore::sm90 {

// What the kernel is compiled for; tiles.inc has the numbers and their reasons.
template <class Element_, int head_dim_, int tile_k_, int warpgroups_, int slots_, bool in_turn_, int q_buffers_,
          bool plain_score_>
struct ForwardConfig {
  using Element = Element_;
  using Score = std::conditional_t<plain_score_, PlainScore, CappedScore>;
  static constexpr int head_dim = head_dim_;
  static constexpr int tile_k = tile_k_;
  static constexpr int warpgroups = warpgroups_;  // consumers, 64 rows of queries each
  static constexpr int slots = slots_;            // of the ring; each holds a tile of keys or of values
  // Warpgroups issue their products one after the other, so that one's softmax meets the others' products.
  static constexpr bool in_turn = in_turn_;
  // Queries as the first product's operand from registers, where there are enough: shared memory is read for keys
  // alone, and the queries' place is free for the next job's as soon as they have been read.
  static constexpr bool queries_in_registers = q_buffers_ == 1 && warpgroups_ == 2 && head_dim_ <= 128;
  // With room for the next job's queries its first scores are computed together with this job's last output.
  static constexpr int q_buffers = q_buffers_;
  static constexpr bool pipelined = q_buffers > 1 || queries_in_registers;
  // A column of ones beside the values makes the second product give the rows' sums. At head dimension 64 these
  // additions are a sixth of the loop's instructions, and the product grows by an eighth. The product adds the rounded
  // weights, which is right for the output and not for the log-sum-exp: see WithLse.
  static constexpr bool sums_by_product = head_dim == 64;
  static constexpr bool adds_sums = !sums_by_product;
  static constexpr int columns = head_dim + (sums_by_product ? 8 : 0);  // of the second product

  // Tiles that every row sees whole leave the rows' references where they are: see `steady_step`.
  static constexpr bool steady = plain_score_;
  // Where no product adds the weights up, they are cut to their type's bits before they are added: the sums must be of
  // the weights that the second product gets, or the largest weight of a peaked row would be rounded in one place and
  // not in the other. `lift` (bits) makes up for the mean of what is cut off: 2^-8 or 2^-11, times the mean of 1 / m
  // over the mantissas m, 1 / (2 ln 2). Calls for the log-sum-exp, whose sums must not be rounded, have no steady tiles
  // then.
  static constexpr bool cuts = !sums_by_product, bfloat = std::is_same_v<Element, __nv_bfloat16>;
  static constexpr uint32_t kept = bfloat ? 0xffff0000 : 0xffffe000;
  static constexpr float lift = cuts ? (bfloat ? 0.004063f : 0.000508f) : 0.0f;
  // The scores of a lane whose exponentials a steady tile begins with, before it waits for the output of the tile
  // before; the compiler is kept from waiting first (`waits_late`, see `steady_step`). Thousands of clocks on an H100
  // (2026-11-26), bf16, 16,384 tokens, full:
  //   128  0 of 64: 5,063; 16: 4,691; 24: 4,640; 32: 4,540; 40: 4,631; 48: 4,688; 64: 4,732
  //   96   two warpgroups, 0 of 64: 5,645; 8: 5,448; 16: 5,378; 24: 5,377; 32: 5,606; 48: 5,580; 64: 5,790
  //   96   three, 0 of 48: 5,461; 4: 5,161; 8: 5,206; 12: 5,296; 16: 5,328; 24: 5,401
  //   64   four warpgroups, 0 of 32: 5,998; 32: 6,448
  //   64   three, 0 of 64: 5,867; 4: 5,838; 8: 5,730; 16: 5,900; 24: 6,025
  //   192  0 of 32: 4,556; 8: 4,109; 16: 4,075; 24: 4,036; 32: 4,149 (at 1,024 tokens 339, 314, 313, 310, 319)
  //   256  8 of 32: 4,329; 16: 4,330; 24: 4,329; 32: 4,326
  static constexpr int early = head_dim == 64    ? (warpgroups == 3 ? 8 : 0)
                               : head_dim == 96  ? (warpgroups == 3 ? 4 : 16)
                               : head_dim == 128 ? 32
                                                 : 24;
  static constexpr bool waits_late = early > 0 && steady;
  static constexpr bool forgets_scores = head_dim == 64 && waits_late;
  // A row's largest weight so far is 2^−slack, and a tile moves the row's reference where one of its weights reaches 2:
  // 1 + slack bits more. bfloat16 has float32's exponents, float16's weights lose bits below 2^−14.
  static constexpr float slack = !steady ? 0.0f : bfloat ? 24.0f : 3.0f;

  static constexpr int tile_q = 64 * warpgroups;
  static constexpr int threads = 128 * (1 + warpgroups);
  // Under a causal mask the first warpgroups of a tile do not see its last keys, and leave them out.
  // (At 256 columns capped scores leave no register for it.)
  static constexpr bool skips = tile_k < tile_q && (pipelined || steady);
  static constexpr int most_skipped = (tile_q - 1) / tile_k;
  // A job's parts that the producer posts. Where two warpgroups skip tiles they work theirs out themselves: the next
  // queries' place is free late, and their coming would wait for the producer (5% of a call of 1,024 tokens at 192).
  static constexpr int parts = !skips ? 1 : warpgroups > 2 ? warpgroups : 0;
  static constexpr int panel_columns = panel_columns_of(head_dim), row_bytes = 2 * panel_columns;
  static constexpr int panel_steps = panel_columns / 16;  // of the first product
  static constexpr int panels = head_dim / panel_columns;
  static constexpr int q_panel = tile_q * row_bytes, kv_panel = tile_k * row_bytes;
  static constexpr int q_bytes = panels * q_panel, kv_bytes = panels * kv_panel;
  static_assert(head_dim % 32 == 0 && tile_k % 16 == 0 && tile_k <= 256 && slots >= 3 && q_buffers <= 2);

  // Registers a thread: an even share at launch, of which the producer warpgroup gives away most.
  static constexpr int launch_registers = 512 / (1 + warpgroups) / 8 * 8;
  static constexpr int producer_registers = warpgroups == 2 ? 40 : 32;
  static constexpr int consumer_registers =
      (launch_registers * (1 + warpgroups) - producer_registers) / warpgroups / 8 * 8;
};

// The same for calls that want the log-sum-exp: it adds the weights before they are rounded, too. The output's sums
// stay the product's, so that it has the same bits with the log-sum-exp and without.
template <class Config>
struct WithLse : Config {
  static constexpr bool adds_sums = true;
  // There are no registers for more than one product's results in use at a time.
  static constexpr int early = 0;
  static constexpr bool waits_late = false, forgets_scores = false;
};

using Barrier = cutlass::arch::ClusterTransactionBarrier;

// Of jobs that the producer has posted. When all consumers have done with half of them, it may use these again.
constexpr int job_places = 8;

// A tile of values: its first row in the array.
struct TilePlace {
  int row, head, sequence;
};

// Which tiles of a job's keys are what, in the order of work.
struct Part {
  int skipped;  // the first ones, which none of a warpgroup's rows sees, while other warpgroups' do
  int masked;   // past these: the mask cuts none
  int exact;    // past these: they do without the online softmax
};

// A tile of queries: row r is query first + r / pack of head `work.head` · pack + r % pack. The producer works out what
// there is to know of it and posts that beside the queries.
struct Job {
  // Instead of a tile, of a job without tiles of keys: that there are no more, or that the consumers shall have noted
  // by the time that they answer which jobs have to be done again.
  static constexpr int end = -1, notes = -2;
  int count;  // of tiles of keys
  // Rows of the first tile of values; fewer than tile_k where the others, which are another sequence's or none's, have
  // to be cleared: only where sequences vary in length.
  int tail;
  int first, queries;
  bool once_more;  // with the online softmax alone
  int64_t out;     // the first row in the output, in elements
  Part part[4];    // each warpgroup's, where Config has more than one
  Work work;
  Mask mask;
  KeyRange range;
};

template <class Config>
struct SharedMemory {
  alignas(1024) char q[Config::q_buffers][Config::q_bytes];
  alignas(1024) char kv[Config::slots][Config::kv_bytes];
  alignas(1024) char ones[Config::sums_by_product ? Config::kv_panel : 16];
  Job job[job_places];  // what the queries are for, of the last jobs in turn
  // Jobs to be done once more, with the exact loop alone, and whether one of the last ones is among them.
  Work again[12];
  int again_count, noted[job_places];
  // The producer's own, for which it has no registers left: its tile, where to look for the next one's sequence, and
  // the values to be loaded next, or row −1.
  uint32_t tile;
  int from;
  TilePlace values;
  Barrier q_full[Config::q_buffers], q_empty[Config::q_buffers];
  // Once for every job_places / 2 jobs, by every lane: compute-sanitizer's racecheck does not see the reads of lanes
  // that another one arrives for.
  Barrier jobs_done;
  Barrier full[Config::slots], empty[Config::slots];
};

template <class Score>
struct Arguments {
  CUtensorMap q, k, v;
  ForwardParams p;
  TileScheduler<true> scheduler;
  uint32_t tiles;  // that the scheduler numbers
  int pack;        // query heads of one key head whose rows share a tile
  int per_row;     // 2^16 / pack, rounded up: rows and packed heads are at most 256
  int q_bytes;     // that TMA brings for a tile of queries
  bool steady;     // whether tiles may leave the references where they are
  Score score;

  // The query, counted from the tile's first, of a row of the tile.
  __device__ __forceinline__ int query(int row) const { return row * per_row >> 16; }

  // Whether only arrays say how many keys a sequence has: rows behind them are another sequence's, or no one's.
  __device__ bool ragged() const { return p.cu_seqlens_k != nullptr || p.seqused_k != nullptr; }
};

// A place in the ring: slots are filled and emptied in turn, and the barriers' phase flips each time around.
template <int slots>
struct RingPlace {
  int slot = 0;
  uint32_t phase = 0;

  __device__ __forceinline__ void advance() {
    if (++slot == slots) {
      slot = 0;
      phase ^= 1;
    }
  }
};

// The number of a job, modulo 8: its place among the last jobs, and that of its queries.
template <int buffers>
struct JobNumber {
  static_assert(job_places % 4 == 0);
  int number = 0;

  __device__ __forceinline__ void advance() { number = (number + 1) % job_places; }
  __device__ __forceinline__ int before() const { return (number + job_places - 1) % job_places; }
  // Of half of the places: whether this is its first job, and its second.
  __device__ __forceinline__ bool begins_half() const { return number % (job_places / 2) == 0; }
  __device__ __forceinline__ bool second_of_half() const { return number % (job_places / 2) == 1; }
  __device__ __forceinline__ int slot() const { return buffers == 1 ? 0 : number & 1; }
  __device__ __forceinline__ uint32_t phase() const { return buffers == 1 ? number & 1 : number >> 1 & 1; }
};

template <class Config>
__device__ __forceinline__ Job job_of(Arguments<typename Config::Score> const& a, Work const& work) {
  Job job;
  job.work = work;
  job.first = work.tile * a.scheduler.tile_q;
  job.queries = min_of(a.scheduler.tile_q, work.seqlen_q - job.first);
  job.mask = Mask::make(work.seqlen_q, work.seqlen_k, a.p.window_left, a.p.window_right);
  job.range = job.mask.key_range(job.first, job.first + job.queries, Config::tile_k);
  job.count = job.range.count();
  job.tail = Config::tile_k;
  if (a.ragged()) job.tail = min_of(job.tail, work.seqlen_k - job.range.tile(0) * Config::tile_k);
  job.out = work.sequence * a.p.o.batch_stride + work.head * a.pack * a.p.o.head_stride +
            (work.q_begin + job.first) * a.p.o.row_stride;
  return job;
}

// A warpgroup's part of a job: under a causal mask the first ones see less than the others. Everyone's, where none
// skips.
template <class Config>
__device__ __forceinline__ Part part_of(Arguments<typename Config::Score> const& a, Job const& job, int warpgroup) {
  int first = job.first;
  Part part{0, job.range.masked(), 0};
  int const rows = a.query(warpgroup * 64), end = a.query(warpgroup * 64 + 63) + 1;
  bool const cut_behind = job.range.full_end < job.range.end, cut_before = job.range.begin < job.range.full_begin;
  if (Config::skips && cut_behind && !cut_before && job.tail == Config::tile_k && rows < job.queries) {
    KeyRange const own = job.mask.key_range(first + rows, first + min_of(end, job.queries), Config::tile_k);
    if (own.count() > 0) {
      first += rows;
      part.skipped = min_of(job.range.end - own.end, Config::most_skipped);
      part.masked = job.range.end - own.full_end;
    }
  }
  part.exact = part.masked;
  if constexpr (Config::steady) {
    // A row can have seen nothing of the masked tiles, and needs one more: one that ends where the tiles that all see
    // do, or, where the masked tiles are behind a window's left end, any.
    bool const blind = part.masked > 0 && (job.range.full_end == job.range.end ||
                                           job.mask.end_key(first) <= (job.range.end - part.masked) * Config::tile_k);
    part.exact = min_of(job.count, part.masked + blind);
  }
  return part;
}

}  // namespace flashcore::sm90

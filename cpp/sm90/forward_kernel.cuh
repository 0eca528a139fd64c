// SPDX-License-Identifier: Apache-2.0
// The forward kernel for compute capability 9.0, in the manner of FlashAttention-3 (Shah et al., arXiv:2407.08608): a
// producer warp asks TMA for tiles of keys and values, consumer warpgroups of 64 rows of queries each multiply them
// (wgmma), and a tile's softmax runs while the tensor cores multiply for the tile before and for other warpgroups.
// README.md beside this file has the picture.
#pragma once

#include <cutlass/arch/barrier.h>
#include <cutlass/arch/reg_reconfig.h>
#include <cute/arch/copy_sm90_tma.hpp>

#include "attention/mask.h"
#include "attention/scheduler.h"
#include "attention/score.h"
#include "attention/softmax.h"
#include "core/cuda_check.h"
#include "core/forward_params.h"
#include "core/once_per_device.h"
#include "flashcore/plan.h"
#include "sm90/dependent_launch.h"
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
  // A row's largest weight so far is 2^−slack, and a tile moves the row's reference where one of its weights reaches 2:
  // 1 + slack bits more. bfloat16 has float32's exponents, float16's weights lose bits below 2^−14.
  static constexpr float slack = !steady ? 0.0f : bfloat ? 24.0f : 3.0f;

  static constexpr int tile_q = 64 * warpgroups;
  static constexpr int threads = 128 * (1 + warpgroups);
  // Under a causal mask the first warpgroups of a tile do not see its last keys, and leave them out.
  static constexpr bool skips = !in_turn && tile_k < tile_q && pipelined;
  static constexpr int most_skipped = (tile_q - 1) / tile_k;
  static constexpr int panels = (head_dim + panel_columns - 1) / panel_columns;
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
};

using Barrier = cutlass::arch::ClusterTransactionBarrier;

// A tile of values: its first row in the array.
struct TilePlace {
  int row, head, sequence;
};

// What the producer tells the consumers: a tile of queries, or that there are no more, or that they shall have noted by
// the time that they answer which jobs have to be done again.
struct Posted : Work {
  static constexpr int end = -1, notes = -2;  // instead of a tile
  bool once_more;
};

template <class Config>
struct SharedMemory {
  alignas(1024) char q[Config::q_buffers][Config::q_bytes];
  alignas(1024) char kv[Config::slots][Config::kv_bytes];
  alignas(1024) char ones[Config::sums_by_product ? Config::kv_panel : 16];
  Posted work[4];  // what the queries are for, of the last jobs in turn
  // Jobs to be done once more, with the exact loop alone, and whether one of the last ones is among them.
  Work again[12];
  int again_count, noted[4];
  // The producer's own, for which it has no registers left: its tile, whether that has been handed out, and the values
  // to be loaded next, or row −1.
  uint32_t tile;
  bool tile_spent;
  TilePlace values;
  Barrier q_full[Config::q_buffers], q_empty[Config::q_buffers];
  Barrier full[Config::slots], empty[Config::slots];
};

template <class Score>
struct Arguments {
  CUtensorMap q, k, v;
  ForwardParams p;
  TileScheduler<true> scheduler;
  uint32_t tiles;  // that the scheduler numbers
  int pack;        // query heads of one key head whose rows share a tile
  int q_bytes;     // that TMA brings for a tile of queries
  bool steady;     // whether tiles may leave the references where they are
  Score score;
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

// The number of a job, modulo 4: its place among the last jobs, and that of its queries.
template <int buffers>
struct JobNumber {
  int number = 0;

  __device__ __forceinline__ void advance() { number = (number + 1) & 3; }
  __device__ __forceinline__ int before() const { return (number + 3) & 3; }
  __device__ __forceinline__ int slot() const { return buffers == 1 ? 0 : number & 1; }
  __device__ __forceinline__ uint32_t phase() const { return buffers == 1 ? number & 1 : number >> 1; }
};

// A tile of queries: row r is query first + r / pack of head `work.head` · pack + r % pack.
struct Job {
  Work work;
  Mask mask;
  KeyRange range;
  int first, queries;
};

template <class Config>
__device__ __forceinline__ Job job_of(Arguments<typename Config::Score> const& a, Work const& work) {
  Job job;
  job.work = work;
  job.first = work.tile * a.scheduler.tile_q;
  job.queries = min_of(a.scheduler.tile_q, work.seqlen_q - job.first);
  job.mask = Mask::make(work.seqlen_q, work.seqlen_k, a.p.window_left, a.p.window_right);
  job.range = job.mask.key_range(job.first, job.first + job.queries, Config::tile_k);
  return job;
}

// --- the producer ----------------------------------------------------------------------------------------------------

// What TMA tells the L2 cache: keys and values will be read again by other blocks, queries will not.
constexpr uint64_t keep_in_l2 = 0x14f0000000000000, drop_from_l2 = 0x12f0000000000000;

// The block's next tile after `index`. The blocks stay; where tiles can be as uneven as sequences are, a counter gives
// each free block the next one, and otherwise they take tiles in turn, forwards and backwards like a plough, so that
// each gets as many long as short ones.
template <class Score>
__device__ __forceinline__ uint32_t next_tile(Arguments<Score> const& a, uint32_t index) {
  if (a.p.next_tile != nullptr) return gridDim.x + atomicAdd(a.p.next_tile, 1);
  uint32_t const row = index / gridDim.x + 1;
  return row * gridDim.x + (row & 1 ? gridDim.x - 1 - blockIdx.x : blockIdx.x);
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
                                   shared.kv[place.slot] + panel * Config::kv_panel, panel * panel_columns, 0, row,
                                   head, sequence);
    }
    place.advance();
  };
  // Values come a tile later than their keys: the last ones of a job, where pipelined, after the next job's first keys,
  // if it has any.
  shared.values.row = -1;
  auto const load_values = [&] {
    TilePlace const& values = shared.values;
    if (values.row < 0) return;
    load(a.v, values.row, values.head, values.sequence);
    shared.values.row = -1;
  };
  auto const post = [&](Work const& work, bool once_more, int bytes) {
    shared.q_empty[current.slot()].wait(current.phase() ^ 1);
    shared.work[current.number] = {work, once_more};
    shared.noted[current.number] = 0;
    asm volatile("" ::: "memory");
    shared.q_full[current.slot()].arrive_and_expect_tx(bytes);
  };
  auto const post_sign = [&](int sign) {
    load_values();
    Work work{};
    work.tile = sign;
    post(work, false, 0);
  };
  int left = 0;  // jobs to be done once more, of those that are known
  auto const collect = [&] {
    post_sign(Posted::notes);
    shared.q_empty[current.slot()].wait(current.phase());
    asm volatile("" ::: "memory");
    current.advance();
    left = shared.again_count;
    shared.again_count = 0;
  };
  // Consumers may be as many jobs behind as there are places for queries, and one.
  constexpr int many = sizeof(shared.again) / sizeof(Work) - 4;
  shared.tile = blockIdx.x;
  shared.tile_spent = false;
#pragma unroll 1
  while (true) {
    // Not before all of the last job has been asked for: a block that took a tile earlier would keep it from one that
    // is free. The consumers have a ring full of tiles meanwhile.
    if (shared.tile_spent) {
      shared.tile = next_tile(a, shared.tile);
      shared.tile_spent = false;
    }
    bool const more = shared.tile / gridDim.x * gridDim.x < a.tiles, once_more = left > 0;
    Work work;
    if (once_more) {
      work = shared.again[--left];
    } else if (!more || *const_cast<int volatile*>(&shared.again_count) >= many) {
      collect();
      if (left == 0 && !more) break;
      continue;
    } else {
      uint32_t const tile = shared.tile;
      shared.tile_spent = true;
      if (tile >= a.tiles || !a.scheduler.work(a.p, tile, work)) continue;
    }
    Job const job = job_of<Config>(a, work);
    KeyRange const& range = job.range;
    int const count = range.count();
    post(work, once_more, count == 0 ? 0 : a.q_bytes);
    if (count == 0) {
      load_values();
      current.advance();
      continue;
    }
    int const sequence = a.p.cu_seqlens_q ? 0 : work.sequence;
    int const head_k = a.pack == a.p.group ? work.head : work.head * a.pack / a.p.group;
    auto const row = [&](int i) { return work.k_begin + range.tile(i) * Config::tile_k; };

#pragma unroll
    for (int panel = 0; panel < Config::panels; ++panel) {
      cute::SM90_TMA_LOAD_5D::copy(&a.q, reinterpret_cast<uint64_t*>(&shared.q_full[current.slot()]), drop_from_l2,
                                   shared.q[current.slot()] + panel * Config::q_panel, panel * panel_columns, 0,
                                   work.q_begin + job.first, work.head, sequence);
    }
    current.advance();
#pragma unroll 1
    for (int i = 0; i < count; ++i) {
      load(a.k, row(i), head_k, sequence);
      load_values();
      shared.values = {row(i), head_k, sequence};
    }
    if (!Config::pipelined) load_values();
  }
  post_sign(Posted::end);
}

// --- the consumers ---------------------------------------------------------------------------------------------------

// The largest over the four lanes that share a row of an accumulator, and their sum.
__device__ __forceinline__ float quad_max(float x) {
  x = fmaxf(x, __shfl_xor_sync(0xffffffffu, x, 1));
  return fmaxf(x, __shfl_xor_sync(0xffffffffu, x, 2));
}
__device__ __forceinline__ float quad_sum(float x) {
  x += __shfl_xor_sync(0xffffffffu, x, 1);
  return x + __shfl_xor_sync(0xffffffffu, x, 2);
}

// A lane's place in the accumulators of its warpgroup's 64 rows: x[4 n + i] is column 8 n + column() + i % 2 of row
// `row` + i / 2 · 8.
struct Lane {
  int row;  // in the tile of queries
  __device__ static int column() { return threadIdx.x % 4 * 2; }
};

// What a lane's two rows see of a tile: columns [first, end) of the accumulator's first pair.
struct Visible {
  int first[2], end[2];
};

// Of a tile whose keys begin at `tile`.
__device__ __forceinline__ Visible visible(Mask const& mask, int const (&query)[2], int tile) {
  Visible keys;
  int const origin = tile + Lane::column();
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    keys.first[half] = mask.first_key(query[half]) - origin;
    keys.end[half] = mask.end_key(query[half]) - origin;
  }
  return keys;
}

// Of the i-th tile of a job.
template <class Config>
__device__ __forceinline__ Visible visible(Arguments<typename Config::Score> const& a, Job const& job, Lane lane,
                                           int i) {
  int const row[2] = {lane.row, lane.row + 8};
  int const query[2] = {job.first + (a.pack == 1 ? row[0] : row[0] / a.pack),
                        job.first + (a.pack == 1 ? row[1] : row[1] / a.pack)};
  return visible(job.mask, query, job.range.tile(i) * Config::tile_k);
}

// Sets the scores that the mask hides to −inf.
template <int n>
__device__ __forceinline__ void hide(float (&s)[n], Visible const& keys) {
#pragma unroll
  for (int i = 0; i < n; ++i) {
    if (i / 4 * 8 + i % 2 >= keys.end[i / 2 % 2]) s[i] = minus_infinity();
  }
  if (keys.first[0] <= 0 && keys.first[1] <= 0) return;
#pragma unroll
  for (int i = 0; i < n; ++i) {
    if (i / 4 * 8 + i % 2 < keys.first[i / 2 % 2]) s[i] = minus_infinity();
  }
}

// Caps or scales a tile's scores where the score asks for that. Before the mask: it would turn −inf into something
// else.
template <class Score, int n>
__device__ __forceinline__ void transform(float (&s)[n], Score const& score) {
  if constexpr (!Score::plain) {
    score.transform_all([&](auto transform) {
#pragma unroll
      for (int i = 0; i < n; ++i) s[i] = transform(s[i]);
    });
  }
}

// Takes a tile's scores into the rows' maxima. `ratio` is what the rows' sums and outputs so far are to be multiplied
// by (the sums are), `offset` what to subtract in the exponents.
template <class Score, int n>
__device__ __forceinline__ void raise_maxima(float (&s)[n], SoftmaxRow (&state)[2], float (&ratio)[2],
                                             float (&offset)[2], Score const& score) {
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    float top[2] = {state[half].max, s[2 * half]};
#pragma unroll
    for (int i = 0; i < n / 4; ++i) {
      top[0] = fmaxf(top[0], s[4 * i + 2 * half]);
      top[1] = fmaxf(top[1], s[4 * i + 2 * half + 1]);
    }
    ratio[half] = state[half].raise(quad_max(fmaxf(top[0], top[1])), score.factor);
    offset[half] = SoftmaxRow::offset(state[half].max, score.factor);
  }
}

// Turns scores into weights 2^(factor · s − offset), cut where Config says so, and gives their sums: four of a row, or
// the additions would wait for each other.
template <class Config, int n>
__device__ __forceinline__ void steady_exponentials(float (&s)[n], float (&sums)[2], float const (&offset)[2],
                                                    float factor) {
  constexpr int chains = n > 64 ? 2 : 4;
  float added[2][chains] = {};
  float const lifted[2] = {Config::lift - offset[0], Config::lift - offset[1]};
#pragma unroll
  for (int i = 0; i < n; ++i) {
    int const half = i / 2 % 2;
    s[i] = exp2_of(fmaf(s[i], factor, lifted[half]));
    if constexpr (Config::adds_sums) {
      if constexpr (Config::cuts) s[i] = __uint_as_float(__float_as_uint(s[i]) & Config::kept);
      added[half][i / 4 % chains] += s[i];
    }
  }
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    sums[half] = (added[half][0] + added[half][1]) + (added[half][2] + added[half][3]);
  }
}

// Turns scores into weights 2^(factor · s − offset) and adds them to the rows' sums.
template <class Config, int n>
__device__ __forceinline__ void exponentials(float (&s)[n], SoftmaxRow (&state)[2], float const (&offset)[2],
                                             float factor) {
#pragma unroll
  for (int i = 0; i < n; ++i) {
    s[i] = exp2_of(s[i] * factor - offset[i / 2 % 2]);
    if constexpr (Config::adds_sums) state[i / 2 % 2].sum += s[i];
  }
}

// Clears the rows from `rows` on of a tile of values: they are another sequence's, or unused, and may hold NaN, which
// a weight of zero does not hide.
template <class Config>
__device__ __forceinline__ void clear_rows(char* values, int rows) {
  constexpr int consumers = 128 * Config::warpgroups;
  int const thread = threadIdx.x - 128;
  int const chunks = (Config::tile_k - rows) * (row_bytes / 16);
#pragma unroll
  for (int panel = 0; panel < Config::panels; ++panel) {
    uint4* const tail = reinterpret_cast<uint4*>(values + panel * Config::kv_panel + rows * row_bytes);
    for (int i = thread; i < chunks; i += consumers) tail[i] = uint4{};
  }
  cutlass::arch::fence_view_async_shared();
  cutlass::arch::NamedBarrier::sync(consumers, 7);
}

// Where a job's rows go: head (or group of packed heads) and sequence, the first row in the array of queries.
struct JobPlace {
  int sequence, head, first, queries;
};

__device__ __forceinline__ JobPlace place_of(Job const& job) {
  return {job.work.sequence, job.work.head, job.work.q_begin + job.first, job.queries};
}

// One of a job's rows in the output.
template <class Config>
struct OutputRow {
  bool present;
  typename Config::Element* out;
  float* lse;

  __device__ __forceinline__ OutputRow(Arguments<typename Config::Score> const& a, JobPlace const& job, int row) {
    ForwardParams const& p = a.p;
    int const query = a.pack == 1 ? row : row / a.pack;
    int const head = a.pack == 1 ? job.head : job.head * a.pack + (row - query * a.pack);
    int64_t const line = p.cu_seqlens_q ? int64_t{head} : int64_t{job.sequence} * p.heads_q + head;
    present = query < job.queries;
    lse = p.lse == nullptr ? nullptr : p.lse + line * p.seqlen_q + job.first + query;
    out = static_cast<typename Config::Element*>(p.o.data) + job.sequence * p.o.batch_stride + head * p.o.head_stride +
          (job.first + query) * p.o.row_stride;
  }
};

// The rows of a job without keys.
template <class Config>
__device__ __forceinline__ void store_nothing(Arguments<typename Config::Score> const& a, JobPlace const& job,
                                              Lane lane) {
  int const t = threadIdx.x % 4;
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    OutputRow<Config> const row(a, job, lane.row + half * 8);
    if (!row.present) continue;
    if (row.lse != nullptr && t == 0) *row.lse = minus_infinity();
    for (int column = t * 8; column < a.p.head_dim; column += 32) {
      *reinterpret_cast<uint4*>(row.out + column) = uint4{};
    }
  }
}

// The four lanes of a quad exchange what they hold: lane i gets the i-th words of all.
__device__ __forceinline__ void transpose_in_quad(uint32_t (&x)[4]) {
  int const t = threadIdx.x % 4;
#pragma unroll
  for (int step = 1; step <= 2; step *= 2) {
    bool const upper = t & step;
#pragma unroll
    for (int j = 0; j < 4; ++j) {
      if (j & step) continue;
      uint32_t const got = __shfl_xor_sync(0xffffffffu, upper ? x[j] : x[j + step], step);
      (upper ? x[j] : x[j + step]) = got;
    }
  }
}

// Writes row `half` of this lane's two, times `factor`, 16 bytes a lane.
template <class Config, int n>
__device__ __forceinline__ void write_row(OutputRow<Config> const& row, int half, int head_dim, float const (&o)[n],
                                          float factor) {
  int const t = threadIdx.x % 4;
#pragma unroll
  for (int g = 0; g < Config::head_dim / 32; ++g) {
    uint32_t x[4];
#pragma unroll
    for (int j = 0; j < 4; ++j) {
      float const* const pair = &o[4 * (4 * g + j) + 2 * half];
      x[j] = Precision<typename Config::Element>::pack(pair[0] * factor, pair[1] * factor);
    }
    transpose_in_quad(x);
    int const column = (4 * g + t) * 8;
    if (row.present && column < head_dim) {
      *reinterpret_cast<uint4*>(row.out + column) = uint4{x[0], x[1], x[2], x[3]};
    }
  }
}

// Divides a job's rows by their sums and writes them with their log-sum-exp.
template <class Config, int n>
__device__ __forceinline__ void store(Arguments<typename Config::Score> const& a, JobPlace const& job, Lane lane,
                                      float (&o)[n], SoftmaxRow (&state)[2]) {
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    SoftmaxRow& row_state = state[half];
    OutputRow<Config> const row(a, job, lane.row + half * 8);
    if constexpr (Config::adds_sums) {
      row_state.sum = quad_sum(row_state.sum);
      if (row.lse != nullptr && threadIdx.x % 4 == 0 && row.present)
        *row.lse = row_state.lse(a.score.factor) + Config::slack * ln_2;
    }
    if constexpr (Config::sums_by_product) row_state.sum = o[Config::head_dim / 2 + 2 * half];
    write_row<Config>(row, half, a.p.head_dim, o, row_state.inverse_sum());
  }
}

// For the tile whose weights `s` include one of 2 or more: moves the references of the rows that have one to their
// largest weight. What a row gets depends on that row alone. `o` and the sums so far, and `added`, this tile's sums,
// are put right. False where a weight of a row that the job has is near infinity: its score has risen by more than 66,
// in the natural exponent, over all of the tiles before, and what can be known of the others is lost.
template <class Config, int n, int columns>
__device__ __forceinline__ bool move_references(Arguments<typename Config::Score> const& a, Work const& work, Lane lane,
                                                float (&s)[n], float (&o)[columns], SoftmaxRow (&state)[2],
                                                float (&added)[2], float (&offset)[2]) {
  constexpr float near_infinity = 7.9e28f;  // 2^96: what moves a reference to 2^−slack stays a normal number
  bool good = true;
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    float top = 0.0f;
#pragma unroll
    for (int j = 0; j < n / 4; ++j) top = fmaxf(top, fmaxf(s[4 * j + 2 * half], s[4 * j + 2 * half + 1]));
    top = quad_max(top);
    if (top >= near_infinity && (lane.row + 8 * half) / a.pack < job_of<Config>(a, work).queries) good = false;
    float const by = top >= 2.0f ? log2_of(top) + Config::slack : 0.0f;  // how far the reference moves, in bits
    float const ratio = exp2_of(-by);
#pragma unroll
    for (int j = 0; j < n / 4; ++j) {
      s[4 * j + 2 * half] *= ratio;
      s[4 * j + 2 * half + 1] *= ratio;
    }
    added[half] *= ratio;
    state[half].sum *= ratio;
    offset[half] += by;
#pragma unroll
    for (int j = 0; j < columns / 4; ++j) {
      o[4 * j + 2 * half] *= ratio;
      o[4 * j + 2 * half + 1] *= ratio;
    }
  }
  return __all_sync(0xffffffffu, good);
}

template <class Config>
__device__ __forceinline__ void consume(Arguments<typename Config::Score> const& a, SharedMemory<Config>& shared,
                                        int warpgroup) {
  using Element = typename Config::Element;
  constexpr int tile_k = Config::tile_k, head_dim = Config::head_dim;
  constexpr int columns = Config::columns;
  bool const leads = threadIdx.x % 32 == 0;  // one lane of each warp tells the producer what is free
  Lane const lane{warpgroup * 64 + static_cast<int>(threadIdx.x) % 128 / 32 * 16 +
                  static_cast<int>(threadIdx.x) % 32 / 4};

  uint32_t const shared_q = cute::cast_smem_ptr_to_uint(shared.q) + warpgroup * 64 * row_bytes;
  uint32_t const shared_kv = cute::cast_smem_ptr_to_uint(shared.kv);
  RingPlace<Config::slots> place;
  JobNumber<Config::q_buffers> current;

  float o[columns / 2], s[tile_k / 2];
  uint32_t weights[tile_k / 4];
  uint32_t q[Config::queries_in_registers ? head_dim / 4 : 1];

  // S = Q Kᵀ with the keys in `slot`; O += P V with the values in `slot`. Asynchronous.
  auto const issue_scores = [&](int slot) {
    uint64_t const keys = operand(shared_kv + slot * Config::kv_bytes, 0);
    uint64_t const queries = operand(shared_q + current.slot() * Config::q_bytes, 0);
    hold(s);
    cute::warpgroup_arrive();
#pragma unroll
    for (int d = 0; d < head_dim / 16; ++d) {
      uint64_t const k = keys + (d / 4 * Config::kv_panel + d % 4 * 32) / 16;
      if constexpr (Config::queries_in_registers) {
        multiply_keys<Element, tile_k>(s, q + 4 * d, k, d > 0);
      } else {
        multiply_keys<Element, tile_k>(s, queries + (d / 4 * Config::q_panel + d % 4 * 32) / 16, k, d > 0);
      }
    }
    cute::warpgroup_commit_batch();
  };
  auto const issue_output = [&](int slot) {
    uint32_t const panel_stride = Config::sums_by_product
                                      ? cute::cast_smem_ptr_to_uint(shared.ones) - shared_kv - slot * Config::kv_bytes
                                      : Config::kv_panel;
    uint64_t const values = operand(shared_kv + slot * Config::kv_bytes, panel_stride);
    hold(o);
    cute::warpgroup_arrive();
#pragma unroll
    for (int n = 0; n < tile_k / 16; ++n) {
      multiply_values<Element, columns>(o, weights + 4 * n, values + n * 16 * row_bytes / 16);
    }
    cute::warpgroup_commit_batch();
  };
  auto const release = [&](Barrier& barrier) {
    if (leads) barrier.arrive();
  };
  // The queries' place and the job beside it, which all lanes have read.
  auto const release_job = [&] {
    __syncwarp();
    if (leads) shared.q_empty[current.slot()].arrive();
  };

  // At a job's beginning. Later the queries' place is another job's.
  auto const read_queries = [&] {
    if constexpr (Config::queries_in_registers) {
      int const thread = threadIdx.x % 32, row = threadIdx.x % 128 / 32 * 16 + thread % 16;
#pragma unroll
      for (int d = 0; d < head_dim / 16; ++d) {
        read_operand(q + 4 * d, shared_q + current.slot() * Config::q_bytes + d / 4 * Config::q_panel, row,
                     d % 4 * 2 + thread / 16);
      }
      release_job();
    }
  };
  auto const release_queries = [&] {
    if constexpr (!Config::queries_in_registers) release_job();
  };

  // Whose turn it is to issue products: a named barrier for each warpgroup, which the one before it opens.
  auto const take_turn = [&] {
    if constexpr (Config::in_turn) cutlass::arch::NamedBarrier::sync(256, 1 + warpgroup);
  };
  auto const pass_turn = [&] {
    if constexpr (Config::in_turn) {
      cutlass::arch::NamedBarrier::arrive(256, 1 + (warpgroup + 1 == Config::warpgroups ? 0 : warpgroup + 1));
    }
  };
  if (Config::in_turn && warpgroup == Config::warpgroups - 1) pass_turn();

  auto const clear_tail = [&](RingPlace<Config::slots> const& values, int rows) {
    shared.full[values.slot].wait(values.phase);
    clear_rows<Config>(shared.kv[values.slot], rows);
  };

  // Puts the largest weight at 2^−slack.
  auto const lower = [&](float (&offset)[2]) {
    if constexpr (Config::steady) {
      offset[0] += Config::slack;
      offset[1] += Config::slack;
    }
  };

  SoftmaxRow state[2];
  bool pending = false;  // the job before, whose last tile of weights waits for its product with the values
  // Read anew where it is needed: it does not stay in registers during the loop.
  auto const job_at = [&](int place) { return job_of<Config>(a, shared.work[place]); };
  auto const job_before = [&] { return job_at(current.before()); };
  // Rows of a job's first tile of values; fewer than tile_k where the others, which are another sequence's or none's,
  // have to be cleared: only where sequences vary in length.
  auto const rows_of_values = [&](Job const& job) {
    return a.p.cu_seqlens_k != nullptr ? min_of(tile_k, job.work.seqlen_k - job.range.tile(0) * tile_k) : tile_k;
  };
  auto const clear_values_that_wait = [&](RingPlace<Config::slots> const& values) {
    if (a.p.cu_seqlens_k == nullptr) return;
    Job const job = job_before();
    if (job.range.count() == 1 && rows_of_values(job) < tile_k) clear_tail(values, rows_of_values(job));
  };

  // The output of the job that waits.
  auto const finish = [&] {
    if (!Config::pipelined || !pending) return;
    clear_values_that_wait(place);
    shared.full[place.slot].wait(place.phase);
    issue_output(place.slot);
    cute::warpgroup_wait<0>();
    hold(o);
    release(shared.empty[place.slot]);
    place.advance();
    store<Config>(a, place_of(job_before()), lane, o, state);
    pending = false;
  };
  // Gives a tile back that this warpgroup has no use for: not before it has come, or the slot's turns would be counted
  // wrong.
  auto const drop = [&] {
    shared.full[place.slot].wait(place.phase);
    release(shared.empty[place.slot]);
    place.advance();
  };

#pragma unroll 1
  while (true) {
    shared.q_full[current.slot()].wait(current.phase());
    asm volatile("" ::: "memory");  // CUTLASS's wait does not tell the compiler that memory may have changed
    Posted const work = shared.work[current.number];
    Job const job = job_of<Config>(a, work);
    int const count = work.tile < 0 ? 0 : job.range.count();
    if (count == 0) {
      if (work.tile == Posted::notes) release_job();
      finish();
      if (work.tile == Posted::end) break;
      if (work.tile >= 0) {
        store_nothing<Config>(a, place_of(job), lane);
        release_job();
      }
      current.advance();
      continue;
    }
    read_queries();
    int const tail = rows_of_values(job);
    float ratio[2], offset[2];
    int masked = job.range.masked(), first_of_warpgroup = job.first;
    // Tiles at the end that no row of this warpgroup sees, while others do.
    int skipped = 0;
    if (Config::skips && job.range.begin == job.range.full_begin && tail == tile_k) {
      int const rows = a.pack == 1 ? warpgroup * 64 : warpgroup * 64 / a.pack;
      int const end = a.pack == 1 ? rows + 64 : (warpgroup * 64 + 63) / a.pack + 1;
      if (rows < job.queries) {
        first_of_warpgroup += rows;
        KeyRange const own = job.mask.key_range(first_of_warpgroup, job.first + min_of(end, job.queries), tile_k);
        if (own.count() > 0) {
          skipped = min_of(job.range.end - own.end, Config::most_skipped);
          masked = job.range.end - own.full_end;
        }
      }
    }
    if (Config::skips && skipped > 0) {
      // Next in the ring are K0, the values that wait, K1 V0 K2 V1 ...
      drop();
      finish();
      for (int j = 1; j < skipped; ++j) {
        drop();
        drop();
      }
    }

    // The first tile's scores, with the last output of the job before where one is left.
    auto const first_step = [&](auto with_output) {
      constexpr bool finishes = decltype(with_output)::value;
      SoftmaxRow fresh[2];
      Visible const seen = visible<Config>(a, job, lane, skipped);
      int const keys = place.slot;
      if constexpr (finishes) {
        RingPlace<Config::slots> ragged = place;
        ragged.advance();
        clear_values_that_wait(ragged);
      }
      take_turn();
      shared.full[keys].wait(place.phase);
      place.advance();
      int const values = place.slot;
      issue_scores(keys);
      if constexpr (finishes) {
        shared.full[values].wait(place.phase);
        issue_output(values);
        place.advance();
      }
      pass_turn();
      if (Config::skips && skipped > 0) drop();
      cute::warpgroup_wait<finishes ? 1 : 0>();
      hold(s);
      release(shared.empty[keys]);
      if (skipped == count - 1) release_queries();
      transform(s, a.score);
      if (masked > skipped) hide(s, seen);
      raise_maxima(s, fresh, ratio, offset, a.score);
      lower(offset);
      exponentials<Config>(s, fresh, offset, a.score.factor);
      if constexpr (finishes) {
        cute::warpgroup_wait<0>();
        hold(o);
        release(shared.empty[values]);
        store<Config>(a, place_of(job_before()), lane, o, state);
      }
#pragma unroll
      for (int i = 0; i < columns / 2; ++i) o[i] = 0.0f;
      state[0] = fresh[0];
      state[1] = fresh[1];
#pragma unroll
      for (int i = 0; i < tile_k / 4; ++i) weights[i] = Precision<Element>::pack(s[2 * i], s[2 * i + 1]);
    };
    if (Config::pipelined && pending) {
      first_step(std::bool_constant<Config::pipelined>{});
    } else {
      first_step(std::false_type{});
    }

    if (tail < tile_k && (count > 1 || !Config::pipelined)) {
      RingPlace<Config::slots> ragged = place;
      if (count > 1) ragged.advance();
      clear_tail(ragged, tail);
    }

    // The others: scores of this tile, output of the one before, softmax of this one meanwhile. multiply() issues both
    // products of the i-th tile, waits for the scores and gives the slot of the values, finish_output() waits for the
    // output.
    auto const multiply = [&](int i) {
      int const keys = place.slot;
      take_turn();
      shared.full[keys].wait(place.phase);
      place.advance();
      int const values = place.slot;
      issue_scores(keys);
      shared.full[values].wait(place.phase);
      issue_output(values);
      pass_turn();
      place.advance();
      cute::warpgroup_wait<1>();
      hold(s);
      release(shared.empty[keys]);
      if (i == count - 1) release_queries();
      return values;
    };
    auto const finish_output = [&](int values) {
      cute::warpgroup_wait<0>();
      hold(o);
      release(shared.empty[values]);
    };
    auto const step = [&](int i, auto mask) {
      constexpr bool masks = decltype(mask)::value;
      Visible seen;
      if constexpr (masks) seen = visible<Config>(a, job_at(current.number), lane, i);
      int const values = multiply(i);
      transform(s, a.score);
      if constexpr (masks) hide(s, seen);
      raise_maxima(s, state, ratio, offset, a.score);
      lower(offset);
      exponentials<Config>(s, state, offset, a.score.factor);
      finish_output(values);
#pragma unroll
      for (int j = 0; j < columns / 2; ++j) o[j] *= ratio[j / 2 % 2];
#pragma unroll
      for (int j = 0; j < tile_k / 4; ++j) weights[j] = Precision<Element>::pack(s[2 * j], s[2 * j + 1]);
    };
    // Packs a tile's weights, moves the references where one is 2 or more, and adds up the sums.
    auto const settle = [&](float (&added)[2]) {
      auto const pack = [&] {
#pragma unroll
        for (int j = 0; j < tile_k / 4; ++j) weights[j] = Precision<Element>::pack(s[2 * j], s[2 * j + 1]);
      };
      pack();
      uint32_t any[4] = {};
#pragma unroll
      for (int j = 0; j < tile_k / 4; ++j) any[j % 4] |= weights[j];
      uint32_t const all = any[0] | any[1] | any[2] | any[3];
      constexpr uint32_t two_or_more = 0x40004000;  // of each of a pair: the highest bit of either type's exponent
      if (__any_sync(0xffffffffu, (all & two_or_more) != 0)) {
        Posted const& work = shared.work[current.number];
        if (!move_references<Config>(a, work, lane, s, o, state, added, offset) && leads &&
            atomicExch(&shared.noted[current.number], 1) == 0) {
          shared.again[atomicAdd(&shared.again_count, 1)] = work;
        }
        pack();
      }
      if constexpr (Config::adds_sums) {
        state[0].sum += added[0];
        state[1].sum += added[1];
      }
    };
    // The same for a tile that all rows see whole, and of which all have seen keys: the weights are relative to the
    // reference that the rows have, so that no maximum has to be known before the first exponential, and neither the
    // output nor the sums are multiplied by anything. Floating point does not mind by what common factor weights are
    // too large or too small, until one reaches 2: then the references move.
    auto const steady_step = [&](int i) {
      int const values = multiply(i);
      float added[2];
      steady_exponentials<Config>(s, added, offset, a.score.factor);
      finish_output(values);
      settle(added);
    };
    int i = skipped + 1;
    int exact = masked;
    if constexpr (Config::steady) {
      // A row can have seen nothing of the masked tiles: one that ends where the tiles that all see do, or, where the
      // masked tiles are behind a window's left end, any.
      bool const blind = masked > 0 && (job.range.full_end == job.range.end ||
                                        job.mask.end_key(first_of_warpgroup) <= (job.range.end - masked) * tile_k);
      exact = min_of(count, masked + blind);
    }
#pragma unroll 1
    for (; i < exact; ++i) step(i, std::true_type{});
    if (!Config::steady || !a.steady || work.once_more) {
#pragma unroll 1
      for (; i < count; ++i) step(i, std::false_type{});
    }
    if constexpr (Config::steady) {
#pragma unroll 1
      for (; i < count; ++i) steady_step(i);
#pragma unroll
      for (int half = 0; half < 2; ++half) state[half].max = (offset[half] - Config::slack) / a.score.factor;
    }

    if constexpr (Config::pipelined) {
      pending = true;
    } else {
      shared.full[place.slot].wait(place.phase);
      issue_output(place.slot);
      cute::warpgroup_wait<0>();
      hold(o);
      release(shared.empty[place.slot]);
      place.advance();
      store<Config>(a, place_of(job_at(current.number)), lane, o, state);
    }
    current.advance();
  }
}

// --- the kernel ------------------------------------------------------------------------------------------------------

// Whether a launch may begin while the kernel before ends: where blocks have a tile or two, what comes before and after
// them counts. With more it measured the same, or up to 2% slower.
__host__ __device__ constexpr bool starts_early(int64_t tiles, int64_t blocks) { return tiles <= 2 * blocks; }

// The consumers, until the kernel before has ended: bring the lines that the block reads first into the L2 cache, its
// queries and the first of their keys and values. Where sequences vary in length, only arrays say which.
template <class Config>
__device__ __forceinline__ void prefetch_first(Arguments<typename Config::Score> const& a) {
  using Element = typename Config::Element;
  constexpr int consumers = 128 * Config::warpgroups, most_keys = 128;
  Work work;
  if (!starts_early(a.tiles, gridDim.x) || a.p.cu_seqlens_q != nullptr) return;
  if (!a.scheduler.work(a.p, blockIdx.x, work)) return;
  Job const job = job_of<Config>(a, work);
  int const thread = threadIdx.x - 128;
#pragma unroll 1
  for (int row = thread; row < job.queries * a.pack; row += consumers) {
    int const query = a.pack == 1 ? row : row / a.pack;
    prefetch_row<Element, Config::panels>(a.p.q, work.sequence, work.head * a.pack + (row - query * a.pack),
                                          job.first + query);
  }
  int const head_k = a.pack == a.p.group ? work.head : work.head * a.pack / a.p.group;
#pragma unroll 1
  for (int i = thread; i < min_of(job.range.count() * Config::tile_k, most_keys); i += consumers) {
    int const row = job.range.tile(i / Config::tile_k) * Config::tile_k + i % Config::tile_k;
    if (row >= a.p.seqlen_k) continue;
    prefetch_row<Element, Config::panels>(a.p.k, work.sequence, head_k, row);
    prefetch_row<Element, Config::panels>(a.p.v, work.sequence, head_k, row);
  }
}

template <class Config>
__global__ void __launch_bounds__(Config::threads, 1)
    forward_kernel(__grid_constant__ Arguments<typename Config::Score> const a) {
  extern __shared__ __align__(1024) char memory[];
  auto& shared = *reinterpret_cast<SharedMemory<Config>*>(memory);
  // The next kernel's blocks find room only where this one's end. Everything up to wait_for_prerequisites() reads and
  // writes no array.
  launch_dependents();
  if (threadIdx.x == 0) {
    shared.again_count = 0;
    constexpr int consumer_warps = 4 * Config::warpgroups;
    for (int i = 0; i < Config::q_buffers; ++i) {
      shared.q_full[i].init(1);
      shared.q_empty[i].init(consumer_warps);
    }
    for (int i = 0; i < Config::slots; ++i) {
      shared.full[i].init(1);
      shared.empty[i].init(consumer_warps);
    }
    cutlass::arch::fence_barrier_init();
  }
  if constexpr (Config::sums_by_product) {
    uint32_t const one = Precision<typename Config::Element>::pack(1.0f, 1.0f);
    for (int i = threadIdx.x; i < Config::kv_panel / 4; i += Config::threads) {
      reinterpret_cast<uint32_t*>(shared.ones)[i] = one;
    }
    cutlass::arch::fence_view_async_shared();
  }
  __syncthreads();

  int const warpgroup = __shfl_sync(0xffffffffu, threadIdx.x / 128, 0);
  if (warpgroup == 0) {
    cutlass::arch::warpgroup_reg_dealloc<Config::producer_registers>();
    if (threadIdx.x == 0) {
      wait_for_prerequisites();
      produce<Config>(a, shared);
    }
  } else {
    cutlass::arch::warpgroup_reg_alloc<Config::consumer_registers>();
    prefetch_first<Config>(a);
    wait_for_prerequisites();
    consume<Config>(a, shared, warpgroup - 1);
  }
}

template <class Config>
void launch(Arguments<typename Config::Score> const& arguments, int64_t blocks, cudaStream_t stream) {
  auto const kernel = forward_kernel<Config>;
  constexpr int shared_memory = sizeof(SharedMemory<Config>);
  static OncePerDevice prepare;
  prepare([&] {
    cuda_check(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, shared_memory),
               "preparing the sm90 kernel");
  });
  bool const early = starts_early(arguments.tiles, blocks);
  launch_dependent(kernel, {dim3(static_cast<unsigned>(blocks)), Config::threads, shared_memory, 1, early}, stream,
                   arguments, "launching the sm90 kernel");
}

template <class Config>
void run_forward(ForwardParams const& p, Plan const& plan, cudaStream_t stream) {
  constexpr DType dtype = std::is_same_v<typename Config::Element, __half> ? float16 : bfloat16;
  bool const varlen = p.cu_seqlens_q != nullptr;
  int64_t const pack = plan.packed_heads, batch = varlen ? 1 : p.batch;
  int const queries = Config::tile_q / plan.packed_heads;
  int const groups = p.heads_q / plan.packed_heads;
  auto const keys = [&](Rows<const void*> const& rows) {
    // A problem without keys has nothing to describe, and nobody reads it.
    return tensor_map({rows.data != nullptr ? rows.data : p.q.data,
                       dtype,
                       p.head_dim,
                       {1, p.seqlen_k, p.heads_k, batch},
                       {0, rows.row_stride, rows.head_stride, rows.batch_stride},
                       {1, Config::tile_k}});
  };
  Arguments<typename Config::Score> const arguments{
      tensor_map({p.q.data,
                  dtype,
                  p.head_dim,
                  {pack, p.seqlen_q, p.heads_q / pack, batch},
                  {p.q.head_stride, p.q.row_stride, p.q.head_stride * pack, p.q.batch_stride},
                  {plan.packed_heads, queries}}),
      keys(p.k),
      keys(p.v),
      p,
      {queries, plan.heads_per_section, groups, plan.section_slots},
      varlen ? static_cast<uint32_t>(plan.tiles)
             : ceil_div(groups * p.batch, plan.heads_per_section) * static_cast<uint32_t>(plan.section_slots),
      plan.packed_heads,
      Config::panels * plan.packed_heads * queries * row_bytes,
      Config::steady && (Config::sums_by_product || p.lse == nullptr),
      Config::Score::make(p.scale, p.softcap)};
  if constexpr (Config::sums_by_product) {
    if (p.lse != nullptr) return launch<WithLse<Config>>(arguments, plan.blocks, stream);
  }
  launch<Config>(arguments, plan.blocks, stream);
}

}  // namespace flashcore::sm90

// SPDX-License-Identifier: Apache-2.0
// The kernel for small problems, where launch, first loads and idle multiprocessors take longer than the arithmetic. A
// block has one tile of queries and a part of the keys that fits its shared memory: it asks for everything at once and
// multiplies what is there. Warpgroups, and blocks of a cluster, divide a tile's keys and merge their results through
// (distributed) shared memory. small.md beside this file says which step waits for which.
#pragma once

#include "attention/mask.h"
#include "core/cuda_check.h"
#include "core/once_per_device.h"
#include "flashcore/plan.h"
#include "sm90/cluster.h"
#include "sm90/dependent_launch.h"
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

// --- instructions that CuTe has not, or not with the memory clobber that the compiler has to see ---------------------

// Writes to the shared memory of any block of the cluster, and counts the bytes at `barrier` of the same block.
__device__ __forceinline__ void send(uint32_t address, uint32_t barrier, float4 x) {
  asm volatile(
      "st.async.shared::cluster.mbarrier::complete_tx::bytes.v4.f32 [%0], {%2, %3, %4, %5}, [%1];" ::"r"(address),
      "r"(barrier), "f"(x.x), "f"(x.y), "f"(x.z), "f"(x.w)
      : "memory");
}
// Waits for the first phase of a barrier and for what other blocks of the cluster sent to it.
__device__ __forceinline__ void wait_for_cluster(uint32_t barrier) {
  asm volatile(
      "{\n"
      ".reg .pred done;\n"
      "again: mbarrier.try_wait.parity.acquire.cluster.shared::cta.b64 done, [%0], 0;\n"
      "@!done bra again;\n"
      "}" ::"r"(barrier)
      : "memory");
}
// --- what a block does -----------------------------------------------------------------------------------------------

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

// --- products and softmax --------------------------------------------------------------------------------------------

// Where a part's results of 64 rows stand: the output so far, not divided by the rows' sums, and their state.
template <class Config>
struct Partial {
  static constexpr int columns = Config::head_dim + (Config::steady ? 8 : 0);  // of the second product
  float o[columns / 2];
  SoftmaxRow state[2];
};

// Works off the part's chunks as they arrive. A warpgroup multiplies one chunk at a time: its first weights by their
// values while the others' exponentials run. Other warpgroups fill the gaps.
template <class Config>
__device__ __forceinline__ void attend(SmallArguments<typename Config::Score> const& a,
                                       SmallMemory<Config> const& shared, Warpgroup<Config> warpgroup, Lane lane,
                                       Partial<Config>& partial) {
  using Element = typename Config::Element;
  constexpr int head_dim = Config::head_dim, steps = Config::steps, step = Config::step;
  constexpr int columns = Partial<Config>::columns;
  float (&o)[columns / 2] = partial.o;
  SoftmaxRow(&state)[2] = partial.state;
  float s[steps * step / 2], ratio[2], offset[2];
  auto const scores = [&](int i) -> float (&)[step / 2] {
    return reinterpret_cast<float (&)[step / 2]>(s[i * step / 2]);
  };
  uint32_t weights[steps * step / 4];
#pragma unroll
  for (int i = 0; i < columns / 2; ++i) o[i] = 0.0f;
  int const group = warpgroup.group(), part = warpgroup.part();
  Task const& task = shared.task();
  int const count = task.count(part) * steps, first_key = task.begin(part) * steps * step;
  if (count == 0) {
    if (a.alone) launch_dependents();
    return;
  }
  // The keys that all 64 rows see: from the last one's first to the first one's last.
  int const seen_begin = task.mask.first_key(shared.query(warpgroup.rows() * 64 + 63));
  int const seen_end = task.mask.end_key(shared.query(warpgroup.rows() * 64));
  uint64_t const queries = operand(address_of(shared.queries()) + warpgroup.rows() * 64 * row_bytes, 0);
  shared.full_queries().wait(0);
#pragma unroll 1
  for (int i = 0; i < count; i += steps) {
    // S = Q Kᵀ
    uint64_t const keys = operand(address_of(shared.keys(group, i)), 0);
#pragma unroll
    for (int j = 0; j < steps; ++j) {
      shared.full_keys(group, i + j).wait(0);
      hold(scores(j));
      cute::warpgroup_arrive();
#pragma unroll
      for (int d = 0; d < head_dim / 16; ++d) {
        multiply_keys<Element, step>(scores(j), queries + (d / 4 * Config::q_panel + d % 4 * 32) / 16,
                                     keys + (j * Config::kv_bytes + d / 4 * Config::kv_panel + d % 4 * 32) / 16, d > 0);
      }
      cute::warpgroup_commit_batch();
    }
    cute::warpgroup_wait<0>();
    hold(s);
    transform(s, a.score);
#pragma unroll
    for (int j = 0; j < steps; ++j) {
      int const key = first_key + (i + j) * step;
      if (key < seen_begin || key + step > seen_end) {
        int const query[2] = {shared.query(lane.row), shared.query(lane.row + 8)};
        hide(scores(j), visible(shared.task().mask, query, key));
      }
    }
    if constexpr (Config::steady) {
      using Reference = Reference<Element>;
      if (i == 0) Reference::template find<Reference::seen>(s, state);
      // Rows that see none of these, or of the chunks before.
      if (__any_sync(0xffffffffu, state[0].max == minus_infinity() || state[1].max == minus_infinity())) {
        Reference::template find<steps * step / 2>(s, state);
      }
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        offset[half] = SoftmaxRow::offset(state[half].max, a.score.factor) + Reference::slack;
      }
    } else {
      raise_maxima(s, state, ratio, offset, a.score);
      if (i > 0) {
#pragma unroll
        for (int k = 0; k < head_dim / 2; ++k) o[k] *= ratio[k / 2 % 2];
      }
    }
    // All that the block asked for is there, or about to be: the next kernel may bring its own lines into the cache.
    if (i == 0 && a.alone) launch_dependents();
    // O += P V
    uint32_t const values_at = address_of(shared.values(group, i));
    uint64_t const values =
        operand(values_at, Config::steady ? address_of(shared.ones()) - values_at : uint32_t{Config::kv_panel});
    constexpr uint64_t next = Config::steady ? next_16_values : 16 * row_bytes / 16;
#pragma unroll
    for (int j = 0; j < steps; ++j) {
      exponentials<Config>(scores(j), state, offset, a.score.factor);
      uint32_t* const w = weights + j * step / 4;
#pragma unroll
      for (int k = 0; k < step / 4; ++k) w[k] = Precision<Element>::pack(scores(j)[2 * k], scores(j)[2 * k + 1]);
      if (j == 0) {
        shared.full_values(group, i).wait(0);
        hold(o);
      }
      cute::warpgroup_arrive();
#pragma unroll
      for (int m = 0; m < step / 16; ++m) {
        uint64_t const at = Config::panels > 1 ? values + m * next : values + (j * step / 16 + m) * next;
        multiply_values<Element, columns>(o, w + 4 * m, at);
      }
      cute::warpgroup_commit_batch();
    }
    // Before the next scores: they take the registers of the weights.
    cute::warpgroup_wait<0>();
    hold(o);
  }
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    if constexpr (Config::steady) {
      // What a part has lost must show however little the merge leaves of it: its sum becomes NaN. A row that sees none
      // of the part's keys has no reference and nothing to lose.
      float const sum = o[head_dim / 2 + 2 * half];
      bool const whole = state[half].max == minus_infinity() || Reference<Element>::holds(sum);
      state[half].sum = whole ? sum : __int_as_float(0x7fffffff);
    } else {
      state[half].sum = quad_sum(state[half].sum);
    }
  }
}

// --- the merge -------------------------------------------------------------------------------------------------------

// Piece i of accumulators: of each of a lane's two rows two neighbouring columns.
__device__ __forceinline__ float4 piece(float const* o, int i) {
  return {o[4 * i], o[4 * i + 1], o[4 * i + 2], o[4 * i + 3]};
}
__device__ __forceinline__ float4 rows_of(SoftmaxRow const (&state)[2]) {
  return {state[0].max, state[0].sum, state[1].max, state[1].sum};
}

// Adds what lies at `received` (`pieces` of a warpgroup and its rows' states) to `mine`.
template <int pieces>
__device__ __forceinline__ void merge(char const* received, float factor, SoftmaxRow (&state)[2],
                                      float (&mine)[4 * pieces]) {
  int const thread = threadIdx.x % 128;
  auto const* const sent = reinterpret_cast<float4 const*>(received);
  float4 const rows = sent[pieces * 128 + thread / 4];
  float4 x[pieces];
#pragma unroll
  for (int i = 0; i < pieces; ++i) x[i] = sent[i * 128 + thread];
  SoftmaxRow other[2] = {{rows.x, rows.y}, {rows.z, rows.w}};
  float ratio[2], its[2];
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    float const top = fmaxf(state[half].max, other[half].max);
    ratio[half] = state[half].raise(top, factor);
    its[half] = other[half].raise(top, factor);
    state[half].sum += other[half].sum;
  }
#pragma unroll
  for (int i = 0; i < pieces; ++i) {
    mine[4 * i] = mine[4 * i] * ratio[0] + x[i].x * its[0];
    mine[4 * i + 1] = mine[4 * i + 1] * ratio[0] + x[i].y * its[0];
    mine[4 * i + 2] = mine[4 * i + 2] * ratio[1] + x[i].z * its[1];
    mine[4 * i + 3] = mine[4 * i + 3] * ratio[1] + x[i].w * its[1];
  }
}

// Merges the parts of a warpgroup's rows, and leaves the columns that are its to write in `mine`.
template <class Config>
__device__ __forceinline__ void exchange(SmallMemory<Config> const& shared, Warpgroup<Config> warpgroup, float factor,
                                         Partial<Config>& partial, float (&mine)[4 * Config::pieces]) {
  constexpr int group_pieces = Config::group_pieces, pieces = Config::pieces, cluster = Config::cluster;
  int const thread = warpgroup.thread();
  float o[4 * group_pieces];
  // With the other warpgroup of the rows: each takes half of the columns.
  if constexpr (Config::key_groups == 2) {
    bool const upper = warpgroup.group() == 1;
    auto* const to = reinterpret_cast<float4*>(shared.from_neighbour(warpgroup.index ^ 1));
#pragma unroll
    for (int i = 0; i < group_pieces; ++i) {
      float4 const low = piece(partial.o, i), high = piece(partial.o, group_pieces + i);
      to[i * 128 + thread] = upper ? low : high;
      o[4 * i] = upper ? high.x : low.x;
      o[4 * i + 1] = upper ? high.y : low.y;
      o[4 * i + 2] = upper ? high.z : low.z;
      o[4 * i + 3] = upper ? high.w : low.w;
    }
    if (thread % 4 == 0) to[group_pieces * 128 + thread / 4] = rows_of(partial.state);
    cutlass::arch::NamedBarrier::sync(256, 1 + (Config::row_groups > 1 ? warpgroup.rows() : 0));
    merge<group_pieces>(shared.from_neighbour(warpgroup.index), factor, partial.state, o);
  } else {
#pragma unroll
    for (int i = 0; i < 4 * group_pieces; ++i) o[i] = partial.o[i];
  }
  // With the same warpgroup of the cluster's other blocks.
  int const rank = warpgroup.rank();
  if constexpr (cluster > 1) {
    Task const& task = shared.task();
    bool const has_keys = task.has_keys(rank);
    cluster_wait_acquire();  // all blocks have started: their shared memory may be written to
#pragma unroll
    for (int owner = 0; owner < cluster; ++owner) {
      if (owner == rank) {
#pragma unroll
        for (int i = 0; i < 4 * pieces; ++i) mine[i] = o[4 * pieces * owner + i];
      } else if (has_keys) {
        uint32_t const barrier = in_block(address_of(&shared.received(warpgroup.index)), owner);
        char* const place = shared.from_block(warpgroup.index, rank < owner ? rank : rank - 1);
        uint32_t const to = in_block(address_of(place), owner);
#pragma unroll
        for (int i = 0; i < pieces; ++i) {
          send(to + i * Config::piece_bytes + thread * 16, barrier, piece(o, pieces * owner + i));
        }
        if (thread % 4 == 0) send(to + pieces * Config::piece_bytes + thread * 4, barrier, rows_of(partial.state));
      }
    }
    wait_for_cluster(address_of(&shared.received(warpgroup.index)));
    int const senders = task.senders<Config::cluster>(rank);
#pragma unroll
    for (int i = 0; i < cluster - 1; ++i) {
      if (i < senders) merge<pieces>(shared.from_block(warpgroup.index, i), factor, partial.state, mine);
    }
  } else {
#pragma unroll
    for (int i = 0; i < 4 * pieces; ++i) mine[i] = o[i];
  }
}

// Divides the part's columns by the rows' sums and writes them. Lanes of a quad exchange what they hold (a transpose of
// 4 × 4 pairs), so that each writes 16 bytes, where a part has two pieces or more.
template <class Config>
__device__ __forceinline__ void write(SmallArguments<typename Config::Score> const& a,
                                      PlacedRow<Config> const (&row)[2], Warpgroup<Config> warpgroup,
                                      SoftmaxRow const (&state)[2], float const (&mine)[4 * Config::pieces]) {
  constexpr int pieces = Config::pieces;
  int const t = threadIdx.x % 4;
  int const first = (warpgroup.group() * Config::group_pieces + warpgroup.rank() * pieces) * 8;
  float const factor[2] = {state[0].inverse_sum(), state[1].inverse_sum()};
  if (!Config::steady && warpgroup.part() == 0 && t == 0) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      if (row[half].lse != nullptr && row[half].present) *row[half].lse = state[half].lse(a.score.factor);
    }
  }
  auto const pair = [&](int half, int piece) {
    float const* const x = &mine[4 * piece + 2 * half];
    return Precision<typename Config::Element>::pack(x[0] * factor[half], x[1] * factor[half]);
  };
  if constexpr (pieces == 1) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      if (!row[half].present || first >= a.p.head_dim) continue;
      *reinterpret_cast<uint32_t*>(row[half].out + first + t * 2) = pair(half, 0);
    }
  } else {
    // Four words at a time: of two pieces both rows', or of four pieces one row's.
#pragma unroll
    for (int group = 0; group < pieces / 2; ++group) {
      uint32_t x[4];
#pragma unroll
      for (int j = 0; j < 4; ++j) x[j] = pieces == 2 ? pair(j / 2, j % 2) : pair(group % 2, group / 2 * 4 + j);
      transpose_in_quad(x);
      int const half = pieces == 2 ? t / 2 : group % 2;
      int const column = first + (pieces == 2 ? t % 2 : group / 2 * 4 + t) * 8;
      bool const present = half == 0 ? row[0].present : row[1].present;
      auto* const out = half == 0 ? row[0].out : row[1].out;
      if (present && column < a.p.head_dim) *reinterpret_cast<uint4*>(out + column) = uint4{x[0], x[1], x[2], x[3]};
    }
  }
}

// Which of this lane's rows have a part for which their reference did not do, or a NaN of their own.
template <class Config>
struct Lost {
  bool row[2];
  __device__ __forceinline__ Lost(PlacedRow<Config> const (&rows)[2], SoftmaxRow const (&state)[2])
      : row{rows[0].present && isnan(state[0].sum), rows[1].present && isnan(state[1].sum)} {}
  __device__ __forceinline__ bool any_of_warp() const { return __any_sync(0xffffffffu, row[0] || row[1]); }
};

// Computes this warp's rows once more and writes the part's columns of those that are lost: another row's bits must not
// depend on them. (Nothing else of what is known stays in registers for it.)
template <class Config>
__device__ __forceinline__ void write_exactly(SmallArguments<typename Config::Score> const& a,
                                              SmallMemory<Config> const& shared, Warpgroup<Config> warpgroup,
                                              Lost<Config> lost) {
  int thread;
  asm volatile("mov.u32 %0, %%tid.x;" : "=r"(thread));
  int const first_row = thread / 128 / Config::key_groups * 64 + thread % 128 / 32 * 16;
  int const lane_row = first_row + thread % 32 / 4;
  Task const& task = shared.task();
  int const query[2] = {shared.query(lane_row), shared.query(lane_row + 8)};
  constexpr int chunk = Config::steps * Config::step;
  shared.full_queries().wait(0);  // a warpgroup without keys has not needed them so far
  SoftmaxRow state[2];
  float o[Config::head_dim / 2], mine[4 * Config::pieces];
  attend_exactly<typename Config::Element>(a, task.job.sequence, task.head_k, task.mask, query,
                                           task.range.begin * chunk, task.range.end * chunk,
                                           address_of(shared.queries()), first_row, o, state);
  int const own = warpgroup.group() * Config::group_pieces + warpgroup.rank() * Config::pieces;
#pragma unroll
  for (int i = 0; i < Config::head_dim / 2; ++i) {
    if (i / 4 / Config::pieces * Config::pieces == own) mine[i % (4 * Config::pieces)] = o[i];
  }
  PlacedRow<Config> row[2] = {{a, task.job, lane_row}, {a, task.job, lane_row + 8}};
  for (int half = 0; half < 2; ++half) row[half].present = row[half].present && lost.row[half];
  write<Config>(a, row, warpgroup, state, mine);
}

// --- the kernel ------------------------------------------------------------------------------------------------------

template <class Config>
__global__ void __launch_bounds__(Config::threads, Config::blocks)
    small_kernel(__grid_constant__ SmallArguments<typename Config::Score> const a) {
  extern __shared__ __align__(1024) char memory[];
  SmallMemory<Config> const shared{memory, a};
  // Everything up to wait_for_prerequisites() may run while the kernel before still works: it reads and writes no
  // array.
  if (threadIdx.x == 0) {
    shared.full_queries().init(1);
#pragma unroll
    for (int group = 0; group < Config::key_groups; ++group) {
#pragma unroll 1
      for (int i = 0; i < a.steps; ++i) {
        shared.full_keys(group, i).init(1);
        shared.full_values(group, i).init(1);
      }
    }
#pragma unroll
    for (int i = 0; i < Config::tile.warpgroups(); ++i) shared.received(i).init(1);
    cutlass::arch::fence_barrier_init();
  }
  if constexpr (Config::steady) fill_ones<typename Config::Element>(shared.ones());
  Task const task = this_task<Config>(a);
  if (threadIdx.x == 32) shared.task() = task;
  prefetch<Config>(a, task);
  for (int row = threadIdx.x; row < Config::tile_q; row += Config::threads) {
    shared.query(row) = task.job.first + query_of(a, row);
  }
  if (threadIdx.x == 64) {
    cute::prefetch_tma_descriptor(reinterpret_cast<cute::TmaDescriptor const*>(&a.q));
    cute::prefetch_tma_descriptor(reinterpret_cast<cute::TmaDescriptor const*>(&a.k));
    cute::prefetch_tma_descriptor(reinterpret_cast<cute::TmaDescriptor const*>(&a.v));
  }
  Warpgroup<Config> const warpgroup{
      Config::tile.warpgroups() == 1 ? 0 : __shfl_sync(0xffffffffu, static_cast<int>(threadIdx.x) / 128, 0)};
  bool const leads = warpgroup.thread() == 0;
  __syncthreads();
  if (Config::cluster > 1) {
    if (leads) {
      int const bytes = task.senders<Config::cluster>(warpgroup.rank()) * Config::tile.block_bytes();
      shared.received(warpgroup.index).arrive_and_expect_tx(bytes);
    }
    cluster_arrive_relaxed();  // the fence above has made the barriers known
  }
  bool const requests = leads && warpgroup.rows() == 0;
  if (requests) expect<Config>(a, shared, warpgroup, task);
  if (!a.alone) launch_dependents();
  wait_for_prerequisites();

  if (requests) request<Config>(a, shared, warpgroup, task);
  __syncwarp();
  Lane const lane{warpgroup.rows() * 64 + warpgroup.thread() / 32 * 16 + warpgroup.thread() % 32 / 4};
  Partial<Config> partial;
  attend<Config>(a, shared, warpgroup, lane, partial);
  // Where the rows go, before the merge has to be waited for.
  JobPlace const job = shared.task().job;
  PlacedRow<Config> const row[2] = {{a, job, lane.row}, {a, job, lane.row + 8}};
  float mine[4 * Config::pieces];
  exchange<Config>(shared, warpgroup, a.score.factor, partial, mine);
  write<Config>(a, row, warpgroup, partial.state, mine);
  if constexpr (Config::steady) {
    Lost<Config> const lost(row, partial.state);
    if (lost.any_of_warp()) write_exactly<Config>(a, shared, warpgroup, lost);
  }
}

template <class Config>
void launch_small(SmallArguments<typename Config::Score> const& arguments, dim3 grid, cudaStream_t stream) {
  auto const kernel = small_kernel<Config>;
  static OncePerDevice prepare;
  prepare([&] {
    constexpr int most_shared_memory = 227 * 1024;  // the same for every plan
    cuda_check(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, most_shared_memory),
               "preparing the small sm90 kernel");
    cuda_check(
        cudaFuncSetAttribute(kernel, cudaFuncAttributePreferredSharedMemoryCarveout, cudaSharedmemCarveoutMaxShared),
        "preparing the small sm90 kernel");
  });
  launch_dependent(kernel, {grid, Config::threads, Config::tile.shared_memory(arguments.steps), Config::cluster, true},
                   stream, arguments, "launching the small sm90 kernel");
}

template <class Config>
void run_small(ForwardParams const& p, Plan const& plan, cudaStream_t stream) {
  constexpr DType dtype = std::is_same_v<typename Config::Element, __half> ? float16 : bfloat16;
  constexpr SmallTile tile = Config::tile;
  int const steps = plan.tile_k / (Config::step * Config::key_groups);
  int const queries = Config::tile_q / plan.packed_heads, groups = p.heads_q / plan.packed_heads;
  int64_t const pack = plan.packed_heads;
  auto const keys = [&](Rows<const void*> const& rows, int box) {
    // A problem without keys has nothing to describe, and nobody reads it.
    return tensor_map({rows.data != nullptr ? rows.data : p.q.data,
                       dtype,
                       p.head_dim,
                       {1, p.seqlen_k, p.heads_k, p.batch},
                       {0, rows.row_stride, rows.head_stride, rows.batch_stride},
                       {1, box}});
  };
  SmallArguments<typename Config::Score> const arguments{
      {tensor_map({p.q.data,
                   dtype,
                   p.head_dim,
                   {pack, p.seqlen_q, p.heads_q / pack, p.batch},
                   {p.q.head_stride, p.q.row_stride, p.q.head_stride * pack, p.q.batch_stride},
                   {plan.packed_heads, queries}}),
       keys(p.k, Config::step),
       keys(p.v, Config::steps * Config::step),
       p,
       {queries, 1, groups, 0},
       static_cast<uint32_t>(plan.tiles),
       plan.packed_heads,
       ceil_div(1 << 16, plan.packed_heads),
       Config::panels * plan.packed_heads * queries * row_bytes,
       false,
       Config::Score::make(p.scale, p.softcap)},
      steps,
      tile.values_at(steps),
      tile.ones_at(steps),
      tile.received_at(steps),
      tile.barriers_at(steps),
      plan.blocks <= SmallTile::units};

  dim3 const grid(static_cast<unsigned>(Config::cluster * groups), ceil_div(p.seqlen_q, queries),
                  static_cast<unsigned>(p.batch));
  if constexpr (Config::tile.ones_bytes() > 0) {
    bool const many = int64_t{p.batch} * p.heads_q * p.seqlen_q >= few_rows;
    if (many && p.lse == nullptr && p.head_dim == Config::head_dim)
      return launch_small<Steady<Config>>(arguments, grid, stream);
  }
  launch_small<Config>(arguments, grid, stream);
}

}  // namespace flashcore::sm90

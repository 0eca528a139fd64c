// SPDX-License-Identifier: Apache-2.0
// Divides a forward problem into tiles of queries and hands them to the threads: to each neighbouring heads, head after
// head, whose keys and values stay in the last-level cache meanwhile, and of each head those with the most keys first.
#include <algorithm>
#include <cstring>
#include <memory>
#include <new>
#include <vector>

#include "attention/cache.h"
#include "attention/mask.h"
#include "cpu/cpu.h"
#include "cpu/environment.h"
#include "cpu/isa.h"
#include "cpu/thread_pool.h"

#if defined(__linux__)
#include <sys/mman.h>
#endif

namespace flashcore::cpu {
namespace {

// The tiles of one sequence that hold the queries [q_begin, q_begin + queries), one for each key head and each part of
// its group.
struct Slice {
  int q_begin, queries;
  int first_key_tile, end_key_tile;

  int64_t cost() const { return int64_t{end_key_tile} - first_key_tile; }
};

// The tasks of a sequence: its slices, costliest first, for each key head or each few of them that a task takes.
struct SequenceTasks {
  int sequence;
  int heads;      // query heads of a task
  int parts;      // tasks that a slice of a key head's group takes
  int key_heads;  // of a task
  std::vector<Slice> slices;
  int64_t cost = 0;        // tiles of keys of a key head
  int64_t first_task = 0;  // tasks of the sequences before

  int64_t tasks_of_key_head() const { return static_cast<int64_t>(slices.size()) * parts; }
};

constexpr size_t large_page = 2 << 20;

struct AlignedDelete {
  void operator()(float* p) const { ::operator delete[](p, std::align_val_t{large_page}); }
};

// This thread's, made at its first task and kept: the same for every problem. What is used most lies in its beginning,
// in one large page where the system has them: it then does not compete with inputs for the tables of pages, nor with
// itself for places of the second-level cache, as small pages do by chance (two threads, 512 keys of 64: 1% shorter in
// the middle of many processes, up to 9% where the small pages lay badly). Not the rest, or it were more than 4 MiB.
float* scratch() {
  thread_local std::unique_ptr<float[], AlignedDelete> const memory = [] {
    constexpr size_t bytes = scratch_floats * sizeof(float);
    static_assert(bytes >= large_page);
    void* const made = ::operator new[](bytes, std::align_val_t{large_page});
#if defined(__linux__)
    madvise(made, large_page, MADV_HUGEPAGE);  // a wish
#endif
    return std::unique_ptr<float[], AlignedDelete>(static_cast<float*>(made));
  }();
  return memory.get();
}

Sequence sequence_of(const ForwardParams& p, int b) {
  if (!p.cu_seqlens_q) return {.batch = b, .first_q = 0, .first_k = 0, .seqlen_q = p.seqlen_q, .seqlen_k = p.seqlen_k};
  int const q_begin = clamp_to(p.cu_seqlens_q[b], 0, p.seqlen_q);
  int const q_end = clamp_to(p.cu_seqlens_q[b + 1], q_begin, p.seqlen_q);
  int const k_begin = clamp_to(p.cu_seqlens_k[b], 0, p.seqlen_k);
  int const k_end = clamp_to(p.cu_seqlens_k[b + 1], k_begin, p.seqlen_k);
  int const keys = k_end - k_begin;
  return {.batch = 0,
          .first_q = q_begin,
          .first_k = k_begin,
          .seqlen_q = q_end - q_begin,
          .seqlen_k = p.seqused_k ? clamp_to(p.seqused_k[b], 0, keys) : keys};
}

// Over a cache, the new keys included.
Sequence sequence_of(const KvCacheParams& p, int b) {
  return {.batch = b,
          .first_q = 0,
          .first_k = 0,
          .seqlen_q = p.seqlen_q,
          .seqlen_k = cached_keys(p, b) + p.new_tokens,
          .pages = p.page_table ? p.page_table + b * p.page_table_stride : nullptr,
          .page_size = p.page_size};
}

// Where a sequence has few queries, a tile takes in several heads of a group, which share its keys. How many depends on
// nothing but the sequence, since the blocks that its rows fall into decide their bits.
SequenceTasks tasks_of(const ForwardParams& p, int b, const Sequence& s, int queries_of_tile) {
  constexpr int packed_rows = 96;
  Mask const mask = Mask::make(s.seqlen_q, s.seqlen_k, p.window_left, p.window_right);
  int const heads = clamp_to(packed_rows / max_of(s.seqlen_q, 1), 1, p.group);
  bool const side_by_side = p.k.head_stride < p.k.row_stride;
  int const key_heads =
      heads == p.group ? few_key_heads(int64_t{s.seqlen_q} * heads, p.head_dim, p.heads_k, side_by_side) : 1;
  SequenceTasks tasks{b, heads, ceil_div(p.group, heads), key_heads, {}};
  for (int q = 0; q < s.seqlen_q; q += queries_of_tile) {
    int const queries = min_of(queries_of_tile, s.seqlen_q - q);
    KeyRange const range = mask.key_range(q, q + queries, tile_k);
    tasks.slices.push_back({q, queries, range.begin, range.end});
    tasks.cost += tasks.slices.back().cost() * tasks.parts;
  }
  std::stable_sort(tasks.slices.begin(), tasks.slices.end(),
                   [](const Slice& a, const Slice& b) { return a.cost() > b.cost(); });
  return tasks;
}

// Rows of a variable-length array behind its last sequence see no key.
void clear_rest(const ForwardParams& p, int64_t element_bytes) {
  if (!p.cu_seqlens_q) return;
  int const begin = clamp_to(p.cu_seqlens_q[p.batch], 0, p.seqlen_q);
  for (int head = 0; head < p.heads_q; ++head) {
    for (int64_t row = begin; row < p.seqlen_q; ++row) {
      int64_t const offset = row * p.o.row_stride + head * p.o.head_stride;
      std::memset(static_cast<char*>(p.o.data) + offset * element_bytes, 0,
                  static_cast<size_t>(p.head_dim * element_bytes));
      if (p.lse) p.lse[int64_t{head} * p.seqlen_q + row] = minus_infinity();
    }
  }
}

// Params: ForwardParams or KvCacheParams, which differ in what a sequence is.
template <class Params>
void run(const Params& params, DType dtype, const Plan& plan) {
  ForwardTile const forward_tile = chosen().forward_tile;
  Element const element = dtype == float32 ? Element::float32 : dtype == float16 ? Element::float16 : Element::bfloat16;
  std::vector<SequenceTasks> sequences;
  int64_t tasks = 0;
  for (int b = 0; b < params.batch; ++b) {
    Sequence const sequence = sequence_of(params, b);
    int const most = holds_keys(dtype, sequence.seqlen_k, params.head_dim) ? tile_q_held : tile_q;
    sequences.push_back(tasks_of(params, b, sequence, clamp_to(plan.tile_q, 1, most)));
  }
  std::stable_sort(sequences.begin(), sequences.end(),
                   [](const SequenceTasks& a, const SequenceTasks& b) { return a.cost > b.cost; });
  for (SequenceTasks& sequence : sequences) {
    sequence.first_task = tasks;
    tasks += ceil_div(params.heads_k, sequence.key_heads) * sequence.tasks_of_key_head();
  }

  auto const tile_of = [&](int64_t task) -> QueryTile {
    auto const after = std::upper_bound(sequences.begin(), sequences.end(), task,
                                        [](int64_t t, const SequenceTasks& s) { return t < s.first_task; });
    SequenceTasks const& sequence = *(after - 1);
    int64_t const in_sequence = task - sequence.first_task, in_head = in_sequence % sequence.tasks_of_key_head();
    int const head_k = static_cast<int>(in_sequence / sequence.tasks_of_key_head()) * sequence.key_heads;
    Slice const& slice = sequence.slices[static_cast<size_t>(in_head / sequence.parts)];
    int const head_in_group = static_cast<int>(in_head % sequence.parts) * sequence.heads;
    return {sequence_of(params, sequence.sequence),
            slice.q_begin,
            slice.queries,
            head_k * params.group + head_in_group,
            min_of(sequence.heads, params.group - head_in_group),
            head_k,
            min_of(sequence.key_heads, params.heads_k - head_k),
            slice.first_key_tile,
            slice.end_key_tile};
  };

  // A thread has neighbouring heads, whose rows often lie side by side: the processor, which looks ahead in memory,
  // then brings what the thread will need, and not into its own cache what another one is about to read. (Two threads,
  // 128 keys in bfloat16: 9 to 14% shorter than where each takes the next head.) Sequences of different lengths are
  // handed out costliest first instead, so that no thread has to wait long for another.
  bool const even = sequences.empty() || sequences.front().cost == sequences.back().cost;
  HandOut const hand_out = even ? HandOut::in_runs : HandOut::one_by_one;
  int const splits = plan.splits;
  if (splits == 1) {
    auto body = [&](int64_t task) {
      DefaultFloats const environment;
      forward_tile(params, tile_of(task), element, scratch());
    };
    parallel_for(tasks, body, hand_out);
  } else {
    int64_t const partial_floats = int64_t{most_key_heads} * few_rows * (params.head_dim + 2);
    std::vector<float> partials(static_cast<size_t>(tasks * splits * partial_floats));
    parallel_for(tasks * splits, [&](int64_t task) {
      DefaultFloats const environment;
      QueryTile tile = tile_of(task / splits);
      int const part = static_cast<int>(task % splits), count = tile.end_key_tile - tile.first_key_tile;
      int const first = tile.first_key_tile;
      tile.first_key_tile = first + static_cast<int>(int64_t{count} * part / splits);
      tile.end_key_tile = first + static_cast<int>(int64_t{count} * (part + 1) / splits);
      tile.partial = partials.data() + task * partial_floats;
      tile.partial_floats = partial_floats;
      forward_tile(params, tile, element, scratch());
    });
    parallel_for(tasks, [&](int64_t task) {
      DefaultFloats const environment;
      QueryTile tile = tile_of(task);
      tile.partial = partials.data() + task * splits * partial_floats;
      tile.partial_floats = partial_floats;
      tile.parts = splits;
      forward_tile(params, tile, element, scratch());
    });
  }
}

// Copies the new keys and values to their places behind those that are there. Lengths and pages have been checked.
void append(const KvCacheParams& p, int64_t element_bytes) {
  auto const copy = [&](const Rows<const void*>& from, const Rows<void*>& to, int b, int token, CachePlace place) {
    for (int head = 0; head < p.heads_k; ++head) {
      int64_t const source = b * from.batch_stride + token * from.row_stride + head * from.head_stride;
      int64_t const target = place.block * to.batch_stride + place.row * to.row_stride + head * to.head_stride;
      std::memcpy(static_cast<char*>(to.data) + target * element_bytes,
                  static_cast<const char*>(from.data) + source * element_bytes,
                  static_cast<size_t>(p.head_dim * element_bytes));
    }
  };
  parallel_for(int64_t{p.batch} * p.new_tokens, [&](int64_t task) {
    int const b = static_cast<int>(task / p.new_tokens), token = static_cast<int>(task % p.new_tokens);
    CachePlace const place = cache_place(p, b, cached_keys(p, b) + token);
    if (place.block < 0) return;
    copy(p.new_k, p.k_out, b, token, place);
    copy(p.new_v, p.v_out, b, token, place);
  });
}

}  // namespace

bool holds_keys(DType dtype, int64_t seqlen_k, int64_t head_dim) {
  int const parts = dtype == float32 ? 3 : dtype == float16 ? 2 : 1;  // of an element: Parts in amx.h
  auto const whole = [](int64_t count, int64_t unit) { return (count + unit - 1) / unit * unit; };
  int64_t const elements = 2 * whole(seqlen_k, 256) * whole(head_dim, 32);  // tiles of forward_amx.h
  return std::strcmp(chosen().name, "avx512amx") == 0 && elements * parts * 2 <= packed_bytes;
}

void forward(const ForwardParams& params, DType dtype, const Plan& plan) {
  run(params, dtype, plan);
  clear_rest(params, dtype.bytes());
}

void forward_kvcache(const KvCacheParams& params, DType dtype, const Plan& plan) {
  append(params, dtype.bytes());
  run(params, dtype, plan);
}

}  // namespace flashcore::cpu

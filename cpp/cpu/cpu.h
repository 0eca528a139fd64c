// SPDX-License-Identifier: Apache-2.0
// The CPU machine as the rest of the library sees it: tiled, threaded attention in float32, float16 and bfloat16.
#pragma once

#include <string>
#include <vector>

#include "core/forward_params.h"
#include "core/kvcache_params.h"
#include "flashcore/flashcore.h"

namespace flashcore::cpu {

// Queries of a tile, at most and at least, and its keys. Every tile of queries packs the keys and values that it sees:
// 3% of the time with 192 queries in float32, and with products on tile registers 27% with 192 and 8% with 768.
constexpr int tile_q = 768, least_tile_q = 192;
constexpr int tile_k = 128;

// The most queries of a tile where products are on tile registers and all its keys and values are packed at a time:
// then they are packed once for a whole head. (One thread, 2,048 keys, 16 and 8 heads of 128 in bfloat16: 17 and 8%
// shorter than in tiles of 768, 8 heads of 64: 7%, causal with 128: 13%.)
constexpr int tile_q_held = 3 * tile_q;
bool holds_keys(DType dtype, int64_t seqlen_k, int64_t head_dim);

// The most queries of which, at the given head dimension, packed elements and outputs fill half of a second-level cache
// of so many bytes, beside packed keys and values.
constexpr int tile_q_in(int64_t cache_bytes, int64_t head_dim) {
  int queries = tile_q;
  while (queries > least_tile_q && queries * head_dim * 8 > cache_bytes / 2) queries /= 2;
  return queries;
}

// In bytes, of one processor; 0 where the system does not tell.
int64_t second_level_cache();

// Tiles of up to this many rows of queries are attended to without packing keys and values, where the head dimension is
// a multiple of few_rows_head_dim; only their keys may be divided over tasks (plan.splits).
constexpr int few_rows = 8;
constexpr int few_rows_head_dim = 32;

// Key heads that one such task takes, a tile of keys of each in turn: several where the heads of a token lie side by
// side, so that memory is read in order. Head after head a thread read 5 GB/s of 12, each row on another page.
constexpr int most_key_heads = 8;
constexpr int few_key_heads(int64_t rows, int64_t head_dim, int64_t heads_k, bool side_by_side) {
  if (rows > few_rows || head_dim % few_rows_head_dim != 0 || !side_by_side) return 1;
  return heads_k < most_key_heads ? static_cast<int>(heads_k) : most_key_heads;
}

// Runs a problem that has passed validate() and returns when it is done. Work is divided into tiles of plan.tile_q
// queries. Each query's result has the same bits whatever the number of threads.
void forward(const ForwardParams& params, DType dtype, const Plan& plan);

// The same over a cache, to which the new keys and values are appended first.
void forward_kvcache(const KvCacheParams& params, DType dtype, const Plan& plan);

// Merges partial results (attention/combine.h).
void combine(const CombineProblem& problem);

// The instruction sets that were compiled in, worst first: "baseline", "avx2", "avx512", "avx512bf16",
// "avx512amx".
std::vector<std::string> compiled_isas();

// The best of them that this processor and its operating system support, or the one that FLASHCORE_CPU_ISA names.
// Throws RuntimeError where that is not compiled in or not supported.
std::string chosen_isa();

// Threads that a call uses, the caller's own included: at first OMP_NUM_THREADS (the first number of a list), else the
// processors that this process may run on.
int num_threads();
// Throws ValueError for a number below 1.
void set_num_threads(int threads);

}  // namespace flashcore::cpu

// SPDX-License-Identifier: Apache-2.0
// Attention of a few new queries a sequence (decoding), or of a prompt's, over a cache of keys and values.
#pragma once

#include <cstdint>
#include <optional>
#include <string>

#include "flashcore/plan.h"
#include "flashcore/problem.h"

namespace flashcore {

// One call of attention_kvcache as a plain value, the arrays 4-D in `layout` (bshd below). Sequence b has
// cache_seqlens[b] keys in the cache before the call. Where `key` and `value` are present they are appended there by
// the call, and take part. The mask counts positions among the cached and the new keys together.
struct KvCacheProblem {
  Tensor query;          // (batch, tokens, heads_q, head_dim): float32 (CPU only), float16 or bfloat16; last stride 1
  Tensor key_cache;      // (batch, capacity, heads_k, head_dim); paged: (pages, page_size, heads_k, head_dim)
  Tensor value_cache;    // as key_cache
  Tensor cache_seqlens;  // int32 (batch), contiguous: from 0 to the capacity less the new tokens
  Tensor key;            // optional: (batch, new tokens, heads_k, head_dim), appended in place
  Tensor value;          // as key; both or none
  Tensor page_table;  // optional: int32 (batch, pages a sequence), last stride 1: page i has its tokens i · page_size
                      // and on. page_size is 16, 64, 128 or 256. Entries past a sequence's end are never used.
  Tensor out;         // as query; absent while only validating or planning
  Tensor lse;         // optional: float32, contiguous, (batch, heads_q, tokens): natural-log log-sum-exp

  Layout layout = Layout::bshd;
  bool causal = false;                  // the last query stands on the last key
  std::optional<int64_t> window_left;   // keys a query sees before its own position; empty: all
  std::optional<int64_t> window_right;  // and after
  std::optional<double> scale;          // empty: 1 / sqrt(head_dim)
  double softcap = 0.0;                 // c > 0: scores become c · tanh(score / c); 0: off
  bool batch_invariant = false;         // a sequence gets the same bits whatever shares its batch
  Backend backend = Backend::automatic;
  void* stream = nullptr;  // cudaStream_t on CUDA devices

  bool paged() const { return page_table.present(); }
};

// The extents of a problem: seqlen_k is how many keys a sequence's part of the cache can hold.
Sizes sizes(const KvCacheProblem& problem);

// How many tokens are appended to each sequence.
int64_t new_tokens(const KvCacheProblem& problem);

// Throws TypeError, ValueError. Never touches device memory. `out` and `lse` are checked where present.
void validate(const KvCacheProblem& problem);

// Checks the values inside cache_seqlens and of page_table those that are needed. For CPU arrays it reads them; for
// CUDA arrays it copies them and synchronizes the stream. Throws ValueError that names the sequence, and the page.
void check_values(const KvCacheProblem& problem);

// Chooses kernel, tiles and grid: a pure function of a problem that has passed validate(). Kernels: "sm90_decode",
// "sm90_decode_turned", "sm80_decode", "cpu_forward". On the GPU `tiles` counts the most tiles of keys that all
// sequences and heads can have, and `splits` is the most parts that a sequence's keys are divided into. Prompts, which
// fill tiles of queries, get a forward kernel's plan, as plan(const Problem&, ...) makes it; where the cache has pages
// only long ones, and then `workspace` has room for all of its keys and values side by side.
Plan plan(const KvCacheProblem& problem, const DeviceProperties& device);
std::string explain(const KvCacheProblem& problem, const DeviceProperties& device, const Plan& plan);

// Runs the plan on the problem's device and stream, as launch(const Problem&, ...). `workspace` holds plan.workspace
// bytes on the device, 16-byte aligned; what is in it does not matter, and no other call may use it until the stream
// has passed this one. On CUDA lengths and pages outside of what the cache holds touch nothing outside of it; on the
// CPU check_values() must have passed.
void launch(const KvCacheProblem& problem, const Plan& plan, void* workspace = nullptr);

}  // namespace flashcore

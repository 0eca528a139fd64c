// SPDX-License-Identifier: Apache-2.0
// The arguments of attention over a cache, the same for every machine. launch() fills it from a KvCacheProblem that
// validate() has seen; lengths and pages have not been looked at and are clamped where they are used.
#pragma once

#include <cstdint>

#include "attention/mask.h"
#include "core/forward_params.h"
#include "flashcore/kvcache.h"

namespace flashcore {

// Of the base, k and v are the caches, whose batch stride is the page's where there are pages, seqlen_q the tokens of a
// sequence, and seqlen_k the keys that a sequence's part of the cache holds.
struct KvCacheParams : ForwardParams {
  const int32_t* cache_seqlens;  // (batch), or null: all of seqlen_k
  const int32_t* page_table;     // (batch, seqlen_k / page_size), or null
  int64_t page_table_stride;     // from one sequence to the next
  int32_t pages;
  int32_t page_size;   // a power of two
  int32_t new_tokens;  // 0: nothing is appended
  bool batch_invariant;
  Rows<const void*> new_k;   // (batch, new_tokens, heads_k, head_dim)
  Rows<const void*> new_v;   // as new_k
  Rows<void*> k_out, v_out;  // k and v, to append to
};

KvCacheParams kvcache_params(const KvCacheProblem& problem);

}  // namespace flashcore

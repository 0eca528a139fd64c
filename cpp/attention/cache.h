// SPDX-License-Identifier: Apache-2.0
// Where a sequence's keys lie in a cache, whatever its lengths and its page table hold.
#pragma once

#include "attention/mask.h"
#include "attention/portable.h"
#include "core/kvcache_params.h"

namespace flashcore {
namespace {

// Keys of sequence `b` in the cache before the call: so many that the new ones fit behind them.
FLASHCORE_HD int cached_keys(const KvCacheParams& p, int b) {
  return p.cache_seqlens == nullptr ? p.seqlen_k : clamp_to(p.cache_seqlens[b], 0, p.seqlen_k - p.new_tokens);
}

// The block of the cache (its index along the batch stride) that holds key `key` of sequence `b`, and the row of it;
// -1 where the table names a page that does not exist.
struct CachePlace {
  int block, row;
};
FLASHCORE_HD CachePlace cache_place(const KvCacheParams& p, int b, int key) {
  if (p.page_table == nullptr) return {b, key};
  int const page = p.page_table[b * p.page_table_stride + key / p.page_size];
  return {page >= 0 && page < p.pages ? page : -1, key % p.page_size};
}

// The mask of the queries of a sequence whose keys, the new ones included, are `keys`.
FLASHCORE_HD Mask cache_mask(const KvCacheParams& p, int keys) {
  return Mask::make(p.seqlen_q, keys, p.window_left, p.window_right);
}

}  // namespace
}  // namespace flashcore

// SPDX-License-Identifier: Apache-2.0
// Which keys a query sees: causal masks, sliding windows and the ragged ends of sequences as one mechanism.
#pragma once

#include "attention/portable.h"

namespace flashcore {
namespace {

// A window side without a limit; also the longest sequence that validate() lets through, so that every sum of a
// position and a bound below stays within 32 bits.
constexpr int unlimited = 1 << 30;

// Tiles of keys that the queries of one tile see, as tile indices. Tiles in [begin, full_begin) and [full_end, end) are
// seen in part, by some queries, and run the masked loop; those in [full_begin, full_end) are seen whole by every
// query.
struct KeyRange {
  int begin, full_begin, full_end, end;

  // The tiles in an order of work: those that need the mask first, beginning with the last one, then the others
  // backwards.
  FLASHCORE_HD int count() const { return end - begin; }
  FLASHCORE_HD int masked() const { return count() - (full_end - full_begin); }
  FLASHCORE_HD int tile(int i) const {
    int const behind = full_begin == full_end ? count() : end - full_end;
    if (i < behind) return end - 1 - i;
    return i < masked() ? begin + (i - behind) : full_end - 1 - (i - masked());
  }
};

// The mask of one sequence. Query q stands at position q + (seqlen_k − seqlen_q) among the keys (the last query on the
// last key) and sees the keys from `left` before it to `right` after it.
struct Mask {
  int seqlen_k;
  int low;   // query q sees no key before q + low
  int high;  // and none after q + high

  FLASHCORE_HD static Mask make(int seqlen_q, int seqlen_k, int window_left, int window_right) {
    long long const diagonal = static_cast<long long>(seqlen_k) - seqlen_q;
    long long const low = diagonal - window_left;
    long long const high = diagonal + window_right;
    return {seqlen_k, window_left >= unlimited || low < -unlimited ? -unlimited : static_cast<int>(low),
            window_right >= unlimited || high > unlimited ? unlimited : static_cast<int>(high)};
  }

  // First key that query q sees, and the one past its last. An empty range where first_key >= end_key.
  FLASHCORE_HD int first_key(int q) const { return max_of(0, q + low); }
  FLASHCORE_HD int end_key(int q) const { return clamp_to(q + high, -1, seqlen_k - 1) + 1; }

  FLASHCORE_HD bool visible(int q, int k) const { return k >= q + low && k <= q + high && k < seqlen_k; }

  // The tiles of `tile_k` keys that the queries [q_begin, q_end) see.
  FLASHCORE_HD KeyRange key_range(int q_begin, int q_end, int tile_k) const {
    int const begin = first_key(q_begin) / tile_k;
    int const end = ceil_div(end_key(q_end - 1), tile_k);
    if (begin >= end) return {0, 0, 0, 0};
    // Seen by all: from the last query's first key to the first query's last.
    int const full_begin = clamp_to(ceil_div(first_key(q_end - 1), tile_k), begin, end);
    int const full_end = clamp_to(end_key(q_begin) / tile_k, full_begin, end);
    return {begin, full_begin, full_end, end};
  }
};

}  // namespace
}  // namespace flashcore

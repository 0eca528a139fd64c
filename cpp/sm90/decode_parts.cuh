// SPDX-License-Identifier: Apache-2.0
// What the Hopper decode kernel and the merge of its parts share: their arguments, and how a warp finds a part of the
// work, or an item's parts, among all sequences.
#pragma once

#include "attention/decode_parts.h"
#include "sm80/decode_params.h"

namespace flashcore::sm90 {

// Blocks that merge what they have divided count their results in the bits below a launch's number.
constexpr int launch_number_shift = 16;

// The arguments of a plan's kernel, as far as decode_kernel.cuh does not make them.
struct DecodeParams : sm80::DecodeParams {
  DecodeParts parts;
  int even;  // parts of each item, where the lengths do not matter; else 0
  // Where the kernel merges what it has divided: decode_turned_block.cuh.
  unsigned long long* counts;
  unsigned long long launch;
};

// A sequence among the parts of all, or among the tiles of all.
struct FoundSequence {
  int sequence;  // -1: there is no such part
  int before;    // parts, or tiles of the line, of the sequences before
  int cached;    // keys in the cache
  KeyRange range;
  int parts;  // of each of its items, where its own length decides
  DecodeParts::Line line;
  int total;  // tiles of the line
};

// All lanes of a warp together find the sequence with part `part`, or with the first tile of team `part`, or sequence
// `sequence` where that is not -1. Each lane has consecutive sequences: it counts their parts, or their tiles, and the
// one that has what is looked for walks to it. `early`: the kernel before may still write the lengths. Then they are
// not kept in the L1 cache, and what is found is a guess.
template <bool early = false>
__device__ __forceinline__ FoundSequence find_sequence(KvCacheParams const& p, DecodeParts const& parts, int part,
                                                       int sequence, int lane) {
  int const sequences = (p.batch + 31) / 32, first = lane * sequences, end = min_of(first + sequences, p.batch);
  FoundSequence found{first, 0, 0, {0, 0, 0, 0}, 1, {1, 0}, 0};
  auto const look = [&](int b) {
    found.sequence = b;
    if (early && p.cache_seqlens != nullptr) {
      int length;
      asm volatile("ld.relaxed.gpu.global.b32 %0, [%1];" : "=r"(length) : "l"(p.cache_seqlens + b));
      found.cached = clamp_to(length, 0, p.seqlen_k - p.new_tokens);
    } else {
      found.cached = cached_keys(p, b);
    }
    found.range = parts.range(p, found.cached + p.new_tokens);
  };
  bool const by_own_length = parts.most_parts > 0;
  auto const of_sequence = [&] {
    if (!by_own_length) return found.line.room(found.range.count());
    found.parts = parts.parts(found.range.count());
    return found.parts * parts.lines.divisor;
  };
  int own = 0, longest = 0;
#pragma unroll 1
  for (int b = first; b < end; ++b) {
    look(b);
    own += of_sequence();
    longest = max_of(longest, found.range.count());
  }
  if (!by_own_length) {
    found.line = parts.line(__reduce_add_sync(0xffffffffu, own), __reduce_max_sync(0xffffffffu, longest));
    if (found.line.each > 0) own = max_of(end - first, 0) * found.line.each;
    part *= found.line.share;
  }
  int to = own;
#pragma unroll
  for (int step = 1; step < 32; step *= 2) {
    int const other = __shfl_up_sync(0xffffffffu, to, step);
    if (lane >= step) to += other;
  }
  found.before = to - own;
  found.total = __shfl_sync(0xffffffffu, to, 31);
  bool const mine = sequence >= 0 ? sequence >= first && sequence < end : part >= found.before && part < to;
  if (mine && sequences > 1) {
#pragma unroll 1
    for (int b = first; b < end; ++b) {
      look(b);
      int const count = of_sequence();
      if (sequence >= 0 ? b == sequence : part < found.before + count) break;
      found.before += count;
    }
  }
  int const owner = __ffs(__ballot_sync(0xffffffffu, mine)) - 1;
  if (owner < 0) {
    found.sequence = -1;
    return found;
  }
  // From the owner to all.
  auto const share = [owner](int& x) { x = __shfl_sync(0xffffffffu, x, owner); };
  share(found.sequence), share(found.before), share(found.cached);
  share(found.range.begin), share(found.range.full_begin), share(found.range.full_end), share(found.range.end);
  share(found.parts);
  return found;
}

}  // namespace flashcore::sm90

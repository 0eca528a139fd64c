// SPDX-License-Identifier: Apache-2.0
// Which tile of queries a block works on: from a linear index to (sequence, head, tile), longest tiles first.
#pragma once

#include <cstdint>

#include "attention/portable.h"
#include "core/forward_params.h"

namespace flashcore {
namespace {

// The rows of one array that belong to one sequence.
struct Span {
  int begin, length;
};

// Sequence `b` of an array of `total` rows. Whatever cu_seqlens holds, the span lies inside the array.
FLASHCORE_HD Span sequence_span(const int32_t* cu_seqlens, int b, int total) {
  int const begin = clamp_to(cu_seqlens[b], 0, total);
  return {begin, clamp_to(cu_seqlens[b + 1], begin, total) - begin};
}

// One tile's work. The sequence's rows start at q_begin and k_begin of their arrays (variable-length; else 0). `head`
// is the head of the queries, or the group of heads that share the tile.
struct Work {
  int sequence, head, tile;
  int q_begin, seqlen_q;
  int k_begin, seqlen_k;
};

// Fixed-length: the (sequence, head) pairs are cut into sections whose keys and values fit in the L2 cache together.
// Within a section the last tile of every pair comes first, so that under a causal mask long tiles start early and the
// short ones fill the end. `heads_per_section` = 1 runs the tiles of a pair one after the other. A kernel whose blocks
// take turns wants sections to be whole rounds: with `padded_sections` a section has `section_slots` indices, more than
// it has tiles, and the rest stay empty. (The others are spared the test: it cost the sm80 kernel spilled registers.)
//
// Variable-length: the number of tiles of each sequence is not known on the host. Sequence b starts at slot
// cu_seqlens_q[b] / tile_q + b, which leaves each sequence at least the slots it needs; some stay empty. The rows
// behind the last sequence count as one more sequence, without keys, so that they are written (zeros) like the rest.
template <bool padded_sections>
struct TileScheduler {
  int tile_q;  // queries of a tile
  int heads_per_section;
  int heads;  // of the queries, or groups of heads that share a tile
  int section_slots = 0;

  // Indices for one head. seqlen_q: the total over all sequences when variable-length.
  static FLASHCORE_HD int64_t slots(bool varlen, int64_t seqlen_q, int64_t batch, int tile_q) {
    return varlen ? seqlen_q / tile_q + batch + 1 : (seqlen_q + tile_q - 1) / tile_q * batch;
  }

  // False where the index has no work. A caller whose indices only grow keeps in `from` the sequence that the last one
  // was found in (variable-length), 0 at first: the search goes on from there.
  FLASHCORE_HD bool work(const ForwardParams& p, uint32_t index, Work& w, int* from = nullptr) const {
    return p.cu_seqlens_q ? varlen_work(p, index, w, from) : fixed_work(p, index, w);
  }

 private:
  FLASHCORE_HD bool fixed_work(const ForwardParams& p, uint32_t index, Work& w) const {
    uint32_t const tiles = ceil_div(p.seqlen_q, tile_q);
    uint32_t const pairs = uint32_t(p.batch) * heads;
    uint32_t const slots = padded_sections ? section_slots : tiles * heads_per_section;
    uint32_t const section = index / slots;
    uint32_t const rest = index - section * slots;
    uint32_t const first_pair = section * heads_per_section;
    uint32_t const width = pairs - first_pair < uint32_t(heads_per_section) ? pairs - first_pair : heads_per_section;
    uint32_t const row = rest / width;
    if (padded_sections && row >= tiles) return false;
    uint32_t const pair = first_pair + (rest - row * width);
    w.tile = tiles - 1 - row;
    w.sequence = pair / heads;
    w.head = pair - w.sequence * heads;
    w.q_begin = w.k_begin = 0;
    w.seqlen_q = p.seqlen_q;
    w.seqlen_k = p.seqlen_k;
    if (p.seqused_k) w.seqlen_k = clamp_to(p.seqused_k[w.sequence], 0, p.seqlen_k - p.keys_added) + p.keys_added;
    return true;
  }

  FLASHCORE_HD int first_slot(const ForwardParams& p, int b) const {
    return clamp_to(p.cu_seqlens_q[b], 0, p.seqlen_q) / tile_q + b;
  }

  FLASHCORE_HD bool varlen_work(const ForwardParams& p, uint32_t index, Work& w, int* from) const {
    int const slot = index / heads;
    w.head = index - slot * heads;
    // The last sequence whose first slot is not beyond this one.
    int low = 0, high = p.batch;
    if (from != nullptr) {
      low = *from;
      int step = 1;
      for (; low + step <= p.batch && first_slot(p, low + step) <= slot; step *= 2) low += step;
      high = min_of(low + step - 1, p.batch);
    }
    while (low < high) {
      int const middle = (low + high + 1) / 2;
      if (first_slot(p, middle) <= slot)
        low = middle;
      else
        high = middle - 1;
    }
    if (from != nullptr) *from = low;
    w.sequence = low;
    Span const q = low < p.batch ? sequence_span(p.cu_seqlens_q, low, p.seqlen_q)
                                 : Span{clamp_to(p.cu_seqlens_q[low], 0, p.seqlen_q),
                                        p.seqlen_q - clamp_to(p.cu_seqlens_q[low], 0, p.seqlen_q)};
    Span k = low < p.batch ? sequence_span(p.cu_seqlens_k, low, p.seqlen_k) : Span{0, 0};
    if (p.seqused_k && low < p.batch) k.length = clamp_to(p.seqused_k[low], 0, k.length);
    w.q_begin = q.begin;
    w.seqlen_q = q.length;
    w.k_begin = k.begin;
    w.seqlen_k = k.length;
    w.tile = ceil_div(q.length, tile_q) - 1 - (slot - first_slot(p, low));
    return w.tile >= 0;
  }
};

}  // namespace
}  // namespace flashcore

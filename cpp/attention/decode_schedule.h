// SPDX-License-Identifier: Apache-2.0
// How decoding divides its work among blocks, from lengths that only the device knows: all tiles of keys of all
// sequences and heads stand in one line, and every block takes an equal part of it (the "stream-K" of Osama et al.,
// arXiv:2301.03598). So an item, the keys of one sequence for one tile of rows, may be divided among several blocks;
// the merge finds its parts again by the same arithmetic.
//
// The line has the order sequence, key head, tile of rows, unit. A unit is a tile of keys; with `most_parts` > 0
// (batch_invariant) it is a part: a multiple of part_tiles tiles that depends on the sequence's own length alone, and
// every part is computed afresh and merged in its order, wherever it lies.
#pragma once

#include <cstdint>

#include "attention/cache.h"

namespace flashcore {
namespace {

struct DecodeSchedule {
  static constexpr int tile_k = 64;
  static constexpr int part_tiles = 4;
  // Of a sequence, over all key heads and tiles of rows: about one a multiprocessor.
  static constexpr int aimed_parts = 128;

  int32_t blocks;
  int32_t lines;       // items of a sequence: key heads times tiles of rows
  int32_t most_parts;  // of an item, batch_invariant; else 0

  // The most parts of an item of a sequence with at most `tiles` tiles of keys.
  static FLASHCORE_HD int64_t parts_bound(int64_t lines, int64_t tiles) {
    int64_t const aimed = lines == 0 ? 1 : aimed_parts / lines;
    int64_t const most = aimed < 8 ? 8 : aimed > 64 ? 64 : aimed;
    int64_t const whole = (tiles + part_tiles - 1) / part_tiles;
    return whole < 1 ? 1 : whole < most ? whole : most;
  }

  // A sequence's tiles [begin, begin + tiles) that some query sees (none where there is none), and its units, of
  // unit_tiles tiles each but for the last.
  struct Item {
    int begin, tiles, units, unit_tiles;
  };
  FLASHCORE_HD Item item(const KvCacheParams& p, int b) const {
    int const keys = cached_keys(p, b) + p.new_tokens;
    KeyRange const range = cache_mask(p, keys).key_range(0, p.seqlen_q, tile_k);
    int const tiles = range.count();
    // An item without keys is one empty unit, so that somebody writes its zeros.
    if (most_parts == 0) return {range.begin, tiles, max_of(tiles, 1), 1};
    int const unit_tiles = max_of(ceil_div(ceil_div(tiles, most_parts), part_tiles), 1) * part_tiles;
    return {range.begin, tiles, max_of(ceil_div(tiles, unit_tiles), 1), unit_tiles};
  }

  // The first unit of the line, of `total`, that block `c` of `active` takes.
  static FLASHCORE_HD int64_t start(int64_t total, int64_t active, int64_t c) { return total * c / active; }
  // Who takes unit `u`.
  static FLASHCORE_HD int64_t owner(int64_t total, int64_t active, int64_t u) { return ((u + 1) * active - 1) / total; }
  // Blocks that have work: as few as there may be with shares that are no longer. None of theirs is empty, and there
  // are fewer parts to merge.
  FLASHCORE_HD int64_t active(int64_t total) const {
    int64_t const share = (total + blocks - 1) / blocks;
    return total == 0 ? 0 : (total + share - 1) / share;
  }

  // Where a partial result goes. A block takes at most two items in part, one from its middle on and one up to its
  // middle; a batch-invariant part has the place of its unit.
  static FLASHCORE_HD int64_t slot(int64_t block, bool from_the_first) { return 2 * block + from_the_first; }

  // The parts of an item whose first unit is `first`, and the slot of each.
  struct Parts {
    int64_t first;  // block, or unit
    int count;      // 1: not divided, and written at once
    bool by_block;

    FLASHCORE_HD int64_t slot_of(int i) const { return by_block ? DecodeSchedule::slot(first + i, i == 0) : first + i; }
  };
  FLASHCORE_HD Parts parts(int64_t total, int64_t first, int units) const {
    if (most_parts > 0) return {first, units, false};
    int64_t const active = this->active(total);
    int64_t const begin = owner(total, active, first), end = owner(total, active, first + units - 1);
    return {begin, static_cast<int>(end - begin) + 1, true};
  }

  // One part of an item: its tiles, and where its result goes.
  struct Part {
    int64_t slot;  // -1: all of the item, written at once
    int begin, end;
    int units;  // that it takes of the line
  };

  // A block's way along its share of the line.
  struct Walk {
    int64_t at, end;  // units of the line
    int sequence, line, unit;
    Item item;

    // Starts at unit `at` of the line; `before` units, counted as if every sequence had one item, come before the
    // sequence.
    FLASHCORE_HD static Walk make(const DecodeSchedule& schedule, const KvCacheParams& p, int64_t at, int64_t end,
                                  int sequence, int64_t before) {
      Item const item = schedule.item(p, sequence);
      int64_t const into_sequence = at - before * schedule.lines;
      int const line = static_cast<int>(into_sequence / item.units);
      return {at, end, sequence, line, static_cast<int>(into_sequence - int64_t{line} * item.units), item};
    }

    FLASHCORE_HD Part part(const DecodeSchedule& schedule, int64_t block) const {
      int const most = item.units - unit;
      int const units = schedule.most_parts > 0 ? 1 : end - at < most ? static_cast<int>(end - at) : most;
      int const first = min_of(unit * item.unit_tiles, item.tiles);
      int const last = min_of((unit + units) * item.unit_tiles, item.tiles);
      int64_t const to = units == item.units ? -1 : schedule.most_parts > 0 ? at : slot(block, unit == 0);
      return {to, item.begin + first, item.begin + last, units};
    }

    // Goes on behind `part`. False at the end of the share.
    FLASHCORE_HD bool next(const DecodeSchedule& schedule, const KvCacheParams& p, const Part& part) {
      at += part.units;
      if (at == end) return false;
      unit += part.units;
      if (unit == item.units) {
        unit = 0;
        if (++line == schedule.lines) {
          line = 0;
          item = schedule.item(p, ++sequence);
        }
      }
      return true;
    }
  };
};

}  // namespace
}  // namespace flashcore

// SPDX-License-Identifier: Apache-2.0
// How the Hopper decode kernel divides its work, from lengths that only the device knows: the keys of an item (one
// sequence for one tile of rows) fall into parts of about equal length, each the work of one block or one cluster of
// blocks. Tiles of keys go to an item's parts in turn, and parts are numbered in the order sequence, part, key head,
// tile of rows: so blocks that run at the same time read what lies side by side. (One stretch of keys a part measured
// 108 us where tiles in turn take 91: 8 sequences of 8,192 keys, 2 parts an item.) What is not an item's only part is
// merged, and found again by the same arithmetic. (The sm80 kernel's blocks stay, and take equal shares:
// decode_schedule.h. Here the GPU gives a free multiprocessor the next part, which evens out that some read faster than
// others.)
#pragma once

#include "attention/decode_schedule.h"

namespace flashcore {
namespace {

// Division by a number that the host knows, for dividends from 0 to 2^31 - 1, by a multiplication (Granlund and
// Montgomery, "Division by invariant integers using multiplication").
struct Divisor {
  int32_t divisor = 1;
  uint32_t multiplier = 0, shift = 0;

  static Divisor of(int divisor) {
    Divisor d{divisor};
    if (divisor <= 1) return {1};
    uint32_t log = 0;
    while ((uint64_t{1} << log) < static_cast<uint64_t>(divisor)) ++log;
    d.shift = log - 1;
    d.multiplier = static_cast<uint32_t>(((uint64_t{1} << (31 + log)) + static_cast<uint64_t>(divisor) - 1) /
                                         static_cast<uint64_t>(divisor));
    return d;
  }
  FLASHCORE_HD int quotient(int x) const {
    if (divisor == 1) return x;
    return static_cast<int>(static_cast<uint32_t>((uint64_t{static_cast<uint32_t>(x)} * multiplier) >> 32) >> shift);
  }
};

// a / b, rounded up, of numbers from 0 and from 1.
FLASHCORE_HD int parts_of(int a, int b) {
  return static_cast<int>((static_cast<uint32_t>(a) + static_cast<uint32_t>(b) - 1) / static_cast<uint32_t>(b));
}

struct DecodeParts {
  static constexpr int tile_k = DecodeSchedule::tile_k;

  Divisor lines;       // items of a sequence: key heads times tiles of rows
  Divisor aimed;       // parts that all items together are divided into, beyond one each
  Divisor alike;       // parts of each item where all have about the same length: no more than aimed allows
  int32_t batch;       // sequences
  int32_t most_parts;  // of an item, where its own length alone decides (batch_invariant, few sequences); else 0
  Divisor most;        // the same

  // The tiles of keys that some query of a sequence with `keys` keys sees.
  FLASHCORE_HD KeyRange range(const KvCacheParams& p, int keys) const {
    return cache_mask(p, keys).key_range(0, p.seqlen_q, tile_k);
  }

  // Tiles of a part, where all sequences have `total` and the longest `longest`. No more parts than items + aimed come
  // of it.
  FLASHCORE_HD int part_tiles(int total, int longest) const {
    if (static_cast<int64_t>(longest) * batch * 4 <= static_cast<int64_t>(total) * 5) {
      return max_of(alike.quotient(longest + alike.divisor - 1), 1);
    }
    return max_of(aimed.quotient(total * lines.divisor + aimed.divisor - 1), 1);
  }

  // The parts that an item's tiles fall into, which they go to in turn; one where there are none, so that somebody
  // writes zeros.
  FLASHCORE_HD int parts(int tiles, int part_tiles) const {
    if (most_parts > 0) {
      constexpr int unit = DecodeSchedule::part_tiles;
      part_tiles = max_of(most.quotient(tiles + most_parts - 1) + unit - 1, unit) / unit * unit;
    }
    return max_of(parts_of(tiles, part_tiles), 1);
  }
};

}  // namespace
}  // namespace flashcore

// SPDX-License-Identifier: Apache-2.0
// How the Hopper decode kernels divide their work, from lengths that only the device knows. Either the keys of an item
// (one sequence for one tile of rows) fall into parts, each the work of one block or one cluster of blocks, by the
// item's own length. Or blocks stay: a team has one for each tile of rows of a sequence, and teams take equal shares of
// all sequences' tiles, which stand in one line. (The sm80 kernel's blocks stay, too, but take shares of all items:
// decode_schedule.h.) Parts are numbered in the order sequence, part, key head, tile of rows, and blocks in the order
// team, key head, tile of rows, and an item's tiles of keys mostly go to its parts in turn: so blocks that run at the
// same time read what lies side by side. (One stretch of keys a part measured 108 us where tiles in turn take 91: 8
// sequences of 8,192 keys, 2 parts an item.) What is not an item's only part is merged, and found again by the same
// arithmetic.
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
  int32_t batch;       // sequences
  int32_t most_parts;  // of an item, where its own length alone decides (batch_invariant, few sequences); else 0
  Divisor most;        // the same
  // Else blocks stay, one of a team for each line, and teams take about equal shares of all sequences' tiles. Where
  // sequences are about as long as each other: teams for each, and sequences of each team; 0 where neither makes good
  // use of the teams.
  Divisor teams, alike;
  int32_t whole;

  // `teams` is 0 where blocks do not stay.
  static DecodeParts of(int lines, int batch, int most_parts, int teams) {
    DecodeParts parts{Divisor::of(lines), batch, most_parts, Divisor::of(most_parts), Divisor::of(teams), {0}, 0};
    auto const good = [&](int used) { return used * 10 >= teams * 9; };
    if (teams >= batch) {
      if (good(teams / batch * batch)) parts.alike = Divisor::of(teams / batch);
    } else if (teams > 0) {
      int const whole = parts_of(batch, teams);
      if (good(parts_of(batch, whole))) parts.whole = whole;
    }
    return parts;
  }

  // The tiles of keys that some query of a sequence with `keys` keys sees.
  FLASHCORE_HD KeyRange range(const KvCacheParams& p, int keys) const {
    return cache_mask(p, keys).key_range(0, p.seqlen_q, tile_k);
  }

  // The parts that an item's tiles fall into by its own length, which they go to in turn; one where there are none, so
  // that somebody writes zeros.
  FLASHCORE_HD int parts(int tiles) const {
    constexpr int unit = DecodeSchedule::part_tiles;
    int const part_tiles = max_of(most.quotient(tiles + most_parts - 1) + unit - 1, unit) / unit * unit;
    return max_of(parts_of(tiles, part_tiles), 1);
  }

  // All sequences' tiles stand in a line, of which a team takes `share`.
  struct Line {
    int share;
    int each;  // tiles that every sequence is given room for, where all are about as long; else 0

    // Tiles that a sequence with `tiles` takes of the line: one where there are none, so that somebody writes zeros.
    FLASHCORE_HD int room(int tiles) const { return each > 0 ? each : max_of(tiles, 1); }
  };
  // Of sequences that take `total` tiles, one at least each, and the longest `longest`.
  FLASHCORE_HD Line line(int total, int longest) const {
    longest = max_of(longest, 1);
    if (int64_t{32} * longest * batch <= int64_t{33} * total) {
      if (alike.divisor > 0) {
        int const share = alike.quotient(longest + alike.divisor - 1);
        return {share, share * alike.divisor};
      }
      if (whole > 0) return {longest * whole, longest};
    }
    return {max_of(teams.quotient(total + teams.divisor - 1), 1), 0};
  }

  // What a team has of a sequence with `tiles` tiles that begins at `start` of the line: the `index`-th of its parts,
  // tiles first, first + step, ... before end. Tiles go to the parts in turn; but those of the first and the last,
  // which may be shorter, lie at the sequence's ends.
  struct Piece {
    int index, parts, first, end, step;
  };
  static FLASHCORE_HD Piece piece(const Line& line, int start, int tiles, int team) {
    int const room = line.room(tiles), first_team = start / line.share;
    int const parts = (start + room - 1) / line.share - first_team + 1, index = team - first_team;
    if (parts == 1 || line.each > 0) return {index, parts, index, tiles, parts};
    int const of_first = (first_team + 1) * line.share - start;
    int const before_last = (first_team + parts - 1) * line.share - start;
    if (index == 0) return {index, parts, 0, of_first, 1};
    if (index == parts - 1) return {index, parts, before_last, tiles, 1};
    return {index, parts, of_first + index - 1, before_last, parts - 2};
  }
  // A team has at most two pieces of sequences that others have a part of, too: it ends one, or has a part between, and
  // begins one.
  static FLASHCORE_HD int slot(int team, int index) { return 2 * team + (index == 0 ? 1 : 0); }
};

}  // namespace
}  // namespace flashcore

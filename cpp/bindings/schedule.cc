// SPDX-License-Identifier: Apache-2.0
// _core.decode_schedule and _core.decode_parts: how the decode kernels of sm80 and sm90 would divide the work, for the
// tests. A block's warps find its place together; here it is found sequence by sequence, and all else is the kernels'
// own arithmetic.
#include "attention/decode_parts.h"

#include <nanobind/stl/vector.h>

#include <vector>

#include "bind.h"

namespace flashcore {

namespace nb = nanobind;

using namespace nb::literals;

namespace {

KvCacheParams lengths_of(const std::vector<int>& lengths, int capacity, int tokens, int new_tokens, int window_left,
                         int window_right) {
  KvCacheParams p{};
  p.batch = static_cast<int>(lengths.size());
  p.cache_seqlens = lengths.data();
  p.seqlen_k = capacity;
  p.seqlen_q = tokens;
  p.new_tokens = new_tokens;
  p.window_left = window_left < 0 ? unlimited : window_left;
  p.window_right = window_right < 0 ? unlimited : window_right;
  return p;
}

nb::tuple decode_schedule(const std::vector<int>& lengths, int capacity, int tokens, int new_tokens, int window_left,
                          int window_right, int lines, int blocks, int most_parts) {
  KvCacheParams const p = lengths_of(lengths, capacity, tokens, new_tokens, window_left, window_right);
  DecodeSchedule const schedule{blocks, lines, most_parts};

  std::vector<int64_t> before{0};
  for (int b = 0; b < p.batch; ++b) before.push_back(before.back() + schedule.item(p, b).units);
  int64_t const total = before.back() * lines, active = schedule.active(total);

  nb::list parts;  // (block, sequence, line, first tile, end tile, slot)
  for (int block = 0; block < active; ++block) {
    int64_t const at = DecodeSchedule::start(total, active, block),
                  end = DecodeSchedule::start(total, active, block + 1);
    int b = 0;
    while (before[static_cast<size_t>(b) + 1] <= at / lines) ++b;
    auto walk = DecodeSchedule::Walk::make(schedule, p, at, end, b, before[static_cast<size_t>(b)]);
    bool more = at < end;
    while (more) {
      DecodeSchedule::Part const part = walk.part(schedule, block);
      parts.append(nb::make_tuple(block, walk.sequence, walk.line, part.begin, part.end, part.slot));
      more = walk.next(schedule, p, part);
    }
  }
  nb::list merges;  // (sequence, line, slots in the order of their keys)
  for (int b = 0; b < p.batch; ++b) {
    int const units = schedule.item(p, b).units;
    for (int line = 0; line < lines; ++line) {
      auto const of_item = schedule.parts(total, before[static_cast<size_t>(b)] * lines + int64_t{line} * units, units);
      nb::list slots;
      for (int i = 0; of_item.count > 1 && i < of_item.count; ++i) slots.append(of_item.slot_of(i));
      merges.append(nb::make_tuple(b, line, slots));
    }
  }
  return nb::make_tuple(parts, merges);
}

nb::list decode_parts(const std::vector<int>& lengths, int capacity, int tokens, int new_tokens, int window_left,
                      int window_right, int lines, int teams, int most_parts) {
  KvCacheParams const p = lengths_of(lengths, capacity, tokens, new_tokens, window_left, window_right);
  DecodeParts const parts = DecodeParts::of(lines, p.batch, most_parts, teams);
  auto const tiles = [&](int b) { return parts.range(p, cached_keys(p, b) + p.new_tokens).count(); };
  int total = 0, longest = 0;
  for (int b = 0; b < p.batch; ++b) {
    total += max_of(tiles(b), 1);
    longest = max_of(longest, tiles(b));
  }
  DecodeParts::Line const line = parts.line(total, longest);
  nb::list found;  // of each sequence, its tiles and its parts: (team, first, end, step, slot) each; or how many
  int start = 0;
  for (int b = 0; b < p.batch; ++b) {
    int const room = line.room(tiles(b));
    nb::list pieces;
    for (int team = start / line.share; most_parts == 0 && team <= (start + room - 1) / line.share; ++team) {
      auto const piece = DecodeParts::piece(line, start, tiles(b), team);
      int const slot = piece.parts == 1 ? -1 : DecodeParts::slot(team, piece.index);
      pieces.append(nb::make_tuple(team, piece.first, piece.end, piece.step, slot));
    }
    start += room;
    if (most_parts > 0) {
      found.append(nb::make_tuple(tiles(b), parts.parts(tiles(b))));
    } else {
      found.append(nb::make_tuple(tiles(b), pieces));
    }
  }
  return found;
}

int divide(int x, int divisor) { return Divisor::of(divisor).quotient(x); }

}  // namespace

void bind_schedule(nb::module_& m) {
  m.def(
      "decode_schedule", &decode_schedule, "lengths"_a, "capacity"_a, "tokens"_a, "new_tokens"_a, "window_left"_a,
      "window_right"_a, "lines"_a, "blocks"_a, "most_parts"_a,
      nb::sig("def decode_schedule(lengths: list[int], capacity: int, tokens: int, new_tokens: int, window_left: int, "
              "window_right: int, lines: int, blocks: int, most_parts: int) -> tuple[list, list]"),
      "How sm80's decode kernel divides its work: parts, and what is merged. A window side below 0 is none. For "
      "tests.");
  m.def("decode_parts", &decode_parts, "lengths"_a, "capacity"_a, "tokens"_a, "new_tokens"_a, "window_left"_a,
        "window_right"_a, "lines"_a, "teams"_a, "most_parts"_a,
        nb::sig("def decode_parts(lengths: list[int], capacity: int, tokens: int, new_tokens: int, window_left: int, "
                "window_right: int, lines: int, teams: int, most_parts: int) -> list"),
        "Each sequence's tiles of keys, and the parts that they fall into on Hopper. For tests.");
  m.def("divide", &divide, "x"_a, "divisor"_a, nb::sig("def divide(x: int, divisor: int) -> int"),
        "x / divisor as Hopper's decode kernel divides. For tests.");
}

}  // namespace flashcore

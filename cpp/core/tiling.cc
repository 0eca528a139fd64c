// SPDX-License-Identifier: Apache-2.0
// How many tiles a problem's queries are, and which of them are scheduled together.
#include "core/tiling.h"

#include <algorithm>
#include <limits>

#include "attention/scheduler.h"
#include "core/problem_facts.h"
#include "flashcore/error.h"

namespace flashcore {

int64_t tiles(const Problem& problem, int tile_q, int64_t heads) {
  Sizes const s = sizes(problem);
  if (s.total_q == 0) return 0;
  int64_t const count =
      TileScheduler<false>::slots(problem.varlen(), problem.varlen() ? s.total_q : s.seqlen_q, s.batch, tile_q) * heads;
  if (count > std::numeric_limits<int32_t>::max()) {
    throw ValueError("query: " + std::to_string(count) + " tiles of " + std::to_string(tile_q) +
                     " queries pass the grid's 2^31 - 1; expected a smaller batch");
  }
  return count;
}

bool uneven(const Problem& problem) {
  Sizes const s = sizes(problem);
  return (problem.causal || problem.window_right.has_value()) && s.seqlen_k / 2 < s.seqlen_q &&
         (!problem.window_left.has_value() || *problem.window_left > s.seqlen_k / 2);
}

int heads_per_section(const Problem& problem, const DeviceProperties& device, int64_t pairs,
                      int64_t pairs_per_key_head) {
  Sizes const s = sizes(problem);
  if (!uneven(problem) || problem.varlen() || pairs == 0) return 1;
  int64_t const bytes_per_pair = std::max<int64_t>(1, 2 * s.seqlen_k * s.head_dim * 2 / pairs_per_key_head);
  return static_cast<int>(std::clamp<int64_t>(device.l2_bytes / 2 / bytes_per_pair, 1, pairs));
}

Tiling tiling(const Problem& problem, const DeviceProperties& device, int tile_q) {
  Sizes const s = sizes(problem);
  int64_t const group = group_of(s);
  auto const with = [&](int64_t pack) {
    int64_t const count = tiles(problem, static_cast<int>(tile_q / pack), s.heads_q / pack);
    return Tiling{static_cast<int>(pack), count, (count + device.units - 1) / device.units * tile_q};
  };
  Tiling const plain = with(1);
  // TMA steps over whole groups of packed heads.
  int const heads_axis = problem.varlen() ? 1 : problem.layout == Layout::bshd ? 2 : 1;
  bool const encodes = problem.query.stride[heads_axis] < tma_limit / problem.query.dtype.bytes() / group;
  if (group == 1 || group > tile_q || problem.batch_invariant || !encodes) return plain;
  Tiling const packed = with(group);
  return packed.tiles < plain.tiles ? packed : plain;
}

}  // namespace flashcore

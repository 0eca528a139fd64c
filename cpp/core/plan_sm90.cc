// SPDX-License-Identifier: Apache-2.0
// The Hopper forward kernel's plan: its tile, and the sections of tiles that give its blocks even loads.
#include <algorithm>
#include <limits>
#include <optional>
#include <vector>

#include "attention/mask.h"
#include "core/forward_params.h"
#include "core/forward_plans.h"
#include "core/problem_facts.h"
#include "core/tiling.h"

namespace flashcore {
namespace {

struct HopperTile {
  int head_dim, tile_k, warpgroups, slots;
  bool in_turn;
  int q_buffers;
  bool plain_score;
  int tile_q() const { return 64 * warpgroups; }
  // Queries, the ring's slots and (head dimension 64) a panel of ones, two bytes an element; the barriers and what
  // aligning them takes are less than 2 KiB.
  int shared_memory() const {
    int const ones = head_dim == 64 ? tile_k : 0;
    return (q_buffers * tile_q() + slots * tile_k + ones) * head_dim * 2 + 2048;
  }
  // What a row of queries costs with this tile, in hundredths of what it costs with three warpgroups (sm90/tiles.inc).
  // Two share keys and values with fewer others: 0.96 of the speed at 96. At head dimension 64 four of 64 keys need 4%
  // more clocks than three of 128, under load 2% more time, but leave more of an uneven tile out; and two hide less of
  // each other's softmax than four: 0.84 to 0.9 of their speed.
  int row_cost(bool uneven) const {
    if (warpgroups == 3) return 100;
    if (head_dim != 64) return 104;
    int const four = uneven ? 96 : 102;
    return warpgroups == 4 ? four : four * 115 / 100;
  }
};

constexpr HopperTile sm90_tiles[] = {
#define FLASHCORE_SM90_TILE(...) {__VA_ARGS__},
#include "sm90/tiles.inc"
#undef FLASHCORE_SM90_TILE
};

// What a tile of `rows` rows of queries takes, of what a whole one does: warpgroups without rows have nothing to do,
// and the others are slower alone.
double share_of_tile(int64_t rows, int64_t tile_q) {
  return static_cast<double>(1 + (rows + 63) / 64) / static_cast<double>(1 + tile_q / 64);
}

// How long the busiest block works, in tiles of keys, where blocks take the tiles of sections of `width` pairs in turn,
// forwards and backwards (`next_tile` in sm90/forward_producer.cuh). `lengths` is what a pair's tiles take, the last
// one's first.
double busiest_block(const std::vector<double>& lengths, int64_t width, int64_t pairs, int64_t blocks) {
  std::vector<double> busy(static_cast<size_t>(blocks), 0.0);
  int64_t place = 0;
  for (int64_t first = 0; first < pairs; first += width) {
    int64_t const heads = std::min(width, pairs - first);
    for (double const length : lengths) {
      for (int64_t head = 0; head < heads; ++head, ++place) {
        int64_t const row = place / blocks, column = place - row * blocks;
        int64_t const from_first = row % 2 == 0 ? column : blocks - 1 - column;
        busy[static_cast<size_t>((from_first + blocks - row / 2 * 2 % blocks) % blocks)] += length;
      }
    }
    place = (place + blocks - 1) / blocks * blocks;
  }
  return *std::max_element(busy.begin(), busy.end());
}

// Blocks that take tiles in turn, forwards and backwards, share a section of uneven tiles evenly where it fills whole
// rounds. Of the sections that leave the fewest places of their rounds empty the one is taken that gives the busiest
// block the least to do; one of more than `most` pairs, whose keys and values pass the L2 cache's share, where that
// saves more than 5%. Simulated for a causal mask, 132 blocks and 16,384 tokens: 0.94 to 0.999 of perfect balance,
// where sections of as many heads as the L2 cache holds gave 0.83 to 0.98. (One head of 128 tiles a section, not filled
// up to 132 places, measured 467 TFLOP/s at head dimension 128, and filled up 644 to 664.)
void set_sections(Plan& plan, const Problem& problem, int most, int64_t pairs) {
  if (problem.varlen() || plan.blocks == 0) return;
  int64_t const tiles_per_pair = plan.tiles / pairs;
  plan.section_slots = static_cast<int>(tiles_per_pair);
  if (!uneven(problem)) return;
  auto const rounds = [&](int64_t width) { return (width * tiles_per_pair + plan.blocks - 1) / plan.blocks; };
  // More than the L2 cache's share of pairs is worth 5% of the time.
  auto const weighed = [&](auto cost, int64_t width) { return cost * (width > most ? 21 : 20); };
  auto const cost = [&](int64_t width) {
    return weighed(pairs / width * rounds(width) + rounds(pairs % width), width);
  };
  int64_t const widest = std::min<int64_t>(std::clamp(most, 16, 256), pairs);
  int64_t fewest = std::numeric_limits<int64_t>::max();
  auto const take = [&](int64_t width) {
    plan.heads_per_section = static_cast<int>(width);
    plan.section_slots = static_cast<int>(rounds(width) * plan.blocks);
  };
  for (int64_t width = 1; width <= widest; ++width) {
    if (cost(width) >= fewest) continue;
    fewest = cost(width);
    take(width);
  }
  // Many tiles even out by themselves, and would take long to simulate.
  constexpr int64_t most_tiles = 8192;
  if (plan.tiles > most_tiles) return;
  Sizes const s = sizes(problem);
  ForwardParams const p = forward_params(problem);
  Mask const mask = Mask::make(p.seqlen_q, p.seqlen_k, p.window_left, p.window_right);
  // What a job takes beside its tiles of keys: 160 to 430 keys on an H100 (2026-11-26).
  double const beside = 240.0 / plan.tile_k;
  int64_t const queries = plan.tile_q / plan.packed_heads;
  std::vector<double> lengths;
  for (int64_t first = (tiles_per_pair - 1) * queries; first >= 0; first -= queries) {
    KeyRange const range =
        mask.key_range(static_cast<int>(first), static_cast<int>(std::min(first + queries, s.seqlen_q)), plan.tile_k);
    int64_t const rows = std::min(queries, s.seqlen_q - first) * plan.packed_heads;
    lengths.push_back(range.count() * share_of_tile(rows, plan.tile_q) + beside);
  }
  double least = std::numeric_limits<double>::max();
  for (int64_t width = 1; width <= widest; ++width) {
    if (cost(width) > fewest) continue;
    double const busiest = weighed(busiest_block(lengths, width, pairs, plan.blocks), width);
    if (busiest >= least) continue;
    least = busiest;
    take(width);
  }
}

}  // namespace

Plan plan_sm90(const Problem& problem, const DeviceProperties& device) {
  if (std::optional<Plan> const small = plan_small(problem, device)) return *small;
  Sizes const s = sizes(problem);
  bool const plain = plain_score(problem);
  HopperTile const* tile = nullptr;
  Tiling chosen{};
  int64_t least = 0;
  for (HopperTile const& candidate : sm90_tiles) {
    if (candidate.head_dim < s.head_dim || candidate.plain_score != plain) continue;
    if (tile != nullptr && candidate.head_dim > tile->head_dim) break;
    Tiling const tiling = flashcore::tiling(problem, device, candidate.tile_q());
    int64_t const cost = tiling.rows * candidate.row_cost(uneven(problem) && !problem.varlen());
    // What a sequence's tiles are must not depend on its batch, where that is asked for: then the first will do.
    if (tile == nullptr || (cost < least && !problem.batch_invariant)) {
      tile = &candidate;
      chosen = tiling;
      least = cost;
    }
  }
  Plan plan;
  plan.backend = Backend::sm90;
  plan.kernel = "sm90_forward";
  plan.head_dim = tile->head_dim;
  plan.tile_q = tile->tile_q();
  plan.tile_k = tile->tile_k;
  plan.packed_heads = chosen.packed_heads;
  plan.threads = 128 * (1 + tile->warpgroups);
  plan.plain_score = plain;
  plan.shared_memory = tile->shared_memory();
  plan.tiles = chosen.tiles;
  plan.blocks = std::min<int64_t>(plan.tiles, int64_t{device.units});
  // The counter that hands out tiles, where a block gets several: how uneven sequences are is not known here.
  if (problem.varlen() && plan.tiles > 2 * plan.blocks) plan.workspace = 16;
  int64_t const pairs = s.batch * s.heads_q / plan.packed_heads;
  set_sections(plan, problem, heads_per_section(problem, device, pairs, group_of(s) / plan.packed_heads), pairs);
  return plan;
}

}  // namespace flashcore

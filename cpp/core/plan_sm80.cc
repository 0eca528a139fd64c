// SPDX-License-Identifier: Apache-2.0
// The sm80 forward kernel's plan: its tile, by head dimension and the device's shared memory.
#include "core/forward_plans.h"
#include "core/problem_facts.h"
#include "core/tiling.h"
#include "flashcore/error.h"

namespace flashcore {
namespace {

struct Tile {
  int head_dim, tile_q, tile_k, warps, stages;
  bool plain_score;
  // Queries, and keys and values of each stage, two bytes an element; and what the kernel keeps beside them.
  int shared_memory() const { return (tile_q + 2 * stages * tile_k) * head_dim * 2; }
};

constexpr int static_shared_memory = 1152;  // the kernel's own 128 bytes and the 1 KiB that the driver reserves a block

constexpr Tile sm80_tiles[] = {
#define FLASHCORE_SM80_TILE(...) {__VA_ARGS__},
#include "sm80/tiles.inc"
#undef FLASHCORE_SM80_TILE
};

// The tile for a head dimension: of the smallest instance that holds it the first that fits the device's shared memory.
const Tile& sm80_tile(int64_t head_dim, bool plain_score, const DeviceProperties& device) {
  for (Tile const& tile : sm80_tiles) {
    if (tile.head_dim >= head_dim && tile.plain_score == plain_score &&
        tile.shared_memory() + 128 <= device.shared_memory_per_block &&
        tile.shared_memory() + static_shared_memory <= device.shared_memory_per_unit) {
      return tile;
    }
  }
  throw RuntimeError("no sm80 tile for head_dim " + std::to_string(head_dim) + " fits the " +
                     std::to_string(device.shared_memory_per_block) + " bytes of shared memory of " + device.name);
}

}  // namespace

Plan plan_sm80(const Problem& problem, const DeviceProperties& device) {
  Sizes const s = sizes(problem);
  Tile const& tile = sm80_tile(s.head_dim, plain_score(problem), device);
  Plan plan;
  plan.backend = Backend::sm80;
  plan.kernel = "sm80_forward";
  plan.head_dim = tile.head_dim;
  plan.tile_q = tile.tile_q;
  plan.tile_k = tile.tile_k;
  plan.threads = 32 * tile.warps;
  plan.plain_score = plain_score(problem);
  plan.shared_memory = tile.shared_memory();
  plan.tiles = plan.blocks = tiles(problem, plan.tile_q, s.heads_q);
  plan.heads_per_section = heads_per_section(problem, device, s.batch * s.heads_q, group_of(s));
  return plan;
}

}  // namespace flashcore

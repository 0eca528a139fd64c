// SPDX-License-Identifier: Apache-2.0
// Which kernel runs a problem, with which tiles: a pure function of the problem and the device's properties.
#include <algorithm>
#include <limits>

#include "attention/scheduler.h"
#include "core/problem_facts.h"
#include "cpu/cpu.h"
#include "flashcore/flashcore.h"

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

int64_t blocks(const Problem& problem, int tile_q) {
  Sizes const s = sizes(problem);
  if (s.total_q == 0) return 0;
  return TileScheduler::slots(problem.varlen(), problem.varlen() ? s.total_q : s.seqlen_q, s.batch, tile_q) * s.heads_q;
}

// A plain score is only multiplied by a positive scale, which the exponent's multiplication takes over. A scale so
// small that the product with the score's factor is subnormal goes the general way, like zero and negative ones.
bool plain_score(const Problem& problem) { return problem.softcap == 0.0 && effective_scale(problem) > 1e-30; }

Plan plan_cpu(const Problem& problem, const DeviceProperties& device) {
  Sizes const s = sizes(problem);
  Plan plan;
  plan.backend = Backend::cpu;
  plan.kernel = "cpu_forward";
  plan.head_dim = static_cast<int>(s.head_dim);
  plan.tile_q = cpu::tile_q;
  plan.tile_k = cpu::tile_k;
  plan.threads = device.units;
  plan.plain_score = plain_score(problem);
  plan.blocks = blocks(problem, plan.tile_q);
  return plan;
}

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
  plan.blocks = blocks(problem, plan.tile_q);
  if (plan.blocks > std::numeric_limits<int32_t>::max()) {
    throw ValueError("query: " + std::to_string(plan.blocks) + " tiles of " + std::to_string(plan.tile_q) +
                     " queries pass the grid's 2^31 - 1; expected a smaller batch");
  }
  // Where later queries have more keys (causal), long tiles go first among the pairs whose keys and values fit in half
  // of the L2 cache; elsewhere the tiles of a pair follow each other, and its keys and values stay in the cache anyway.
  bool const uneven = problem.causal || problem.window_right.has_value();
  int64_t const pairs = s.batch * s.heads_q;
  if (uneven && !problem.varlen() && pairs > 0) {
    int64_t const bytes_per_pair = std::max<int64_t>(1, 2 * s.seqlen_k * s.head_dim * 2 * s.heads_k / s.heads_q);
    plan.heads_per_section = static_cast<int>(std::clamp<int64_t>(device.l2_bytes / 2 / bytes_per_pair, 1, pairs));
  }
  return plan;
}

}  // namespace

Plan plan(const Problem& problem, const DeviceProperties& device) {
  if (device.type == DeviceType::cpu) {
    if (problem.backend == Backend::sm80) {
      throw ValueError("backend: got \"sm80\" for the device cpu; expected \"cpu\" or None");
    }
    return plan_cpu(problem, device);
  }
  if (problem.backend == Backend::cpu) {
    throw ValueError("backend: got \"cpu\" for the device " + device.name + "; expected \"sm80\" or None");
  }
  if (device.compute_capability < 80) {
    throw RuntimeError(device.name + " has compute capability " + std::to_string(device.compute_capability / 10) + "." +
                       std::to_string(device.compute_capability % 10) +
                       "; FlashCore's kernels need 8.0 (Ampere) or later: move the arrays to the CPU");
  }
  return plan_sm80(problem, device);
}

std::string explain(const Problem& problem, const DeviceProperties& device, const Plan& plan) {
  Sizes const s = sizes(problem);
  std::string const why = problem.backend == Backend::automatic ? "" : " (backend forced)";
  std::string text;
  if (plan.backend == Backend::cpu) {
    text = "The arrays are on the CPU" + why + ": tiles of " + std::to_string(plan.tile_q) + " queries and " +
           std::to_string(plan.tile_k) + " keys, divided over " + std::to_string(plan.threads) + " threads.";
  } else {
    text = device.name + " has compute capability " + std::to_string(device.compute_capability / 10) + "." +
           std::to_string(device.compute_capability % 10) + why + ": mma.sync tiles of " + std::to_string(plan.tile_q) +
           " queries and " + std::to_string(plan.tile_k) + " keys for head dimensions to " +
           std::to_string(plan.head_dim) +
           (plan.head_dim == s.head_dim ? "" : " (padded from " + std::to_string(s.head_dim) + ")") + ", " +
           std::to_string(plan.shared_memory / 1024) + " of " + std::to_string(device.shared_memory_per_block / 1024) +
           " KiB of shared memory a block.";
    if (plan.heads_per_section > 1) {
      text += " Longest tiles first among " + std::to_string(plan.heads_per_section) +
              " heads, whose keys and values share the L2 cache.";
    }
  }
  if (!plan.plain_score)
    text += problem.softcap > 0 ? " Scores are capped." : " The scale is not positive: scores are scaled one by one.";
  return text;
}

}  // namespace flashcore

// SPDX-License-Identifier: Apache-2.0
// Which kernel runs attention over a cache, with which tiles: a pure function of the problem and the device's
// properties. How the keys are divided among the blocks is decided on the device, from the lengths
// (attention/decode_schedule.h); here stands how many blocks there are and how much they may need.
#include <algorithm>
#include <limits>

#include "attention/decode_schedule.h"
#include "attention/decode_tile.h"
#include "core/problem_facts.h"
#include "flashcore/flashcore.h"

namespace flashcore {
namespace {

constexpr DecodeTile tiles[] = {
#define FLASHCORE_SM80_DECODE(...) {__VA_ARGS__},
#include "sm80/decode_tiles.inc"
#undef FLASHCORE_SM80_DECODE
};

// The smallest instance that holds the head dimension; with two slices of rows where one is not enough for all.
const DecodeTile& tile_for(int64_t head_dim, int64_t rows) {
  const DecodeTile* found = nullptr;
  for (const DecodeTile& tile : tiles) {
    if (tile.head_dim < head_dim || (found && tile.head_dim > found->head_dim)) continue;
    if (!found || rows > found->rows()) found = &tile;
  }
  return *found;
}

// Blocks of a multiprocessor and tiles of keys that each has on their way: two blocks with at least two each, else one
// block with as many as fit.
struct Occupancy {
  int blocks, stages;
};
Occupancy occupancy(const DecodeTile& tile, const DeviceProperties& device) {
  auto const stages = [&](int blocks) {
    int const bytes = std::min(device.shared_memory_per_block - 1024,
                               device.shared_memory_per_unit / blocks - DecodeTile::static_bytes);
    int most = DecodeTile::most_stages;
    while (most > 0 && tile.shared_memory(most) > bytes) --most;
    return most;
  };
  if (int const two = stages(2); two >= 2) return {2, two};
  int const one = stages(1);
  if (one == 0) {
    throw RuntimeError("no tile of the decode kernel for head_dim " + std::to_string(tile.head_dim) + " fits the " +
                       std::to_string(device.shared_memory_per_block) + " bytes of shared memory of " + device.name);
  }
  return {1, one};
}

Plan plan_gpu(const KvCacheProblem& problem, const DeviceProperties& device) {
  Sizes const s = sizes(problem);
  int64_t const group = s.heads_k == 0 ? 0 : s.heads_q / s.heads_k, rows = group * s.seqlen_q;
  DecodeTile const& tile = tile_for(s.head_dim, rows);
  auto const [blocks_a_unit, stages] = occupancy(tile, device);
  int64_t const row_tiles = (rows + tile.rows() - 1) / tile.rows(), lines = s.heads_k * row_tiles;
  int64_t const tiles_a_line = std::max<int64_t>((s.seqlen_k + DecodeSchedule::tile_k - 1) / DecodeSchedule::tile_k, 1);
  int64_t const most_parts = DecodeSchedule::parts_bound(lines, tiles_a_line);
  int64_t const items = s.batch * lines;

  // Everything that is counted below stays within 63 bits.
  if (static_cast<double>(items) * static_cast<double>(tiles_a_line) > 1LL << 47 ||
      static_cast<double>(s.batch) * static_cast<double>(s.heads_q) * static_cast<double>(s.seqlen_q) >
          std::numeric_limits<int32_t>::max()) {
    throw ValueError("query: batch " + std::to_string(s.batch) + " times heads " + std::to_string(s.heads_q) +
                     " times tokens " + std::to_string(s.seqlen_q) +
                     " is too much for one call; expected a smaller batch");
  }

  Plan plan;
  plan.backend = Backend::sm80;
  plan.kernel = "sm80_decode";
  plan.head_dim = tile.head_dim;
  plan.tile_q = tile.rows();
  plan.tile_k = DecodeSchedule::tile_k;
  plan.packed_heads = static_cast<int>(std::max<int64_t>(group, 1));
  plan.threads = 32 * DecodeTile::warps;
  plan.plain_score = plain_score(options_of(problem));
  plan.shared_memory = tile.shared_memory(stages);
  plan.tiles = items * tiles_a_line;
  int64_t const units = problem.batch_invariant ? items * most_parts : plan.tiles;
  plan.blocks = std::min<int64_t>(units, int64_t{device.units} * blocks_a_unit);
  // New tokens are appended even where nothing asks.
  if (plan.blocks == 0 && s.batch * s.heads_k * new_tokens(problem) > 0) plan.blocks = 1;
  plan.splits = static_cast<int>(
      problem.batch_invariant ? most_parts : std::min<int64_t>(tiles_a_line, std::max<int64_t>(plan.blocks, 1)));
  if (plan.splits > 1 && items > 0) {
    int64_t const slots = problem.batch_invariant ? units : 2 * plan.blocks;
    // A row's output and its log-sum-exp.
    plan.workspace = slots * std::min<int64_t>(rows, tile.rows()) * (s.head_dim_v + 1) * 4;
  }
  return plan;
}

}  // namespace

Plan plan(const KvCacheProblem& problem, const DeviceProperties& device) {
  if (device.type == DeviceType::cpu) {
    Plan plan = flashcore::plan(options_of(problem), device);
    plan.splits = problem.batch_invariant ? 1 : cpu_splits(sizes(problem), problem.layout);
    return plan;
  }
  if (problem.backend == Backend::cpu || problem.backend == Backend::sm90) {
    throw ValueError(std::string("backend: got \"") + to_string(problem.backend) + "\" for the device " + device.name +
                     "; attention over a cache has one kernel, expected \"sm80\" or None");
  }
  if (device.compute_capability < 80) {
    throw RuntimeError(device.name + " has compute capability " + capability(device) +
                       "; FlashCore's kernels need 8.0 (Ampere) or later: move the arrays to the CPU");
  }
  return plan_gpu(problem, device);
}

std::string explain(const KvCacheProblem& problem, const DeviceProperties& device, const Plan& plan) {
  if (plan.backend == Backend::cpu) return explain(options_of(problem), device, plan);
  DecodeTile const tile{plan.head_dim, plan.tile_q / 16};
  std::string text = device.name + " has compute capability " + capability(device) + ": " +
                     std::to_string(plan.blocks) + " blocks take equal shares of all sequences' keys, in tiles of " +
                     std::to_string(plan.tile_k) + " keys, " + std::to_string(tile.stages_of(plan.shared_memory)) +
                     " of them on their way; a tile of queries has up to " + std::to_string(plan.tile_q) +
                     " rows, of " + std::to_string(plan.packed_heads) + " query heads of a key head.";
  if (problem.batch_invariant) text += " A sequence's length alone decides how its keys are divided.";
  if (plan.workspace > 0) text += " Parts of a sequence are merged in the order of their keys.";
  if (!plan.plain_score) {
    text += problem.softcap > 0 ? " Scores are capped." : " The scale is not positive: scores are scaled one by one.";
  }
  return text;
}

}  // namespace flashcore

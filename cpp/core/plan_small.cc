// SPDX-License-Identifier: Apache-2.0
// The plans of the two Hopper kernels for small problems: which of them a problem gets, in which form, or none.
#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <iterator>
#include <optional>
#include <string_view>

#include "core/forward_plans.h"
#include "core/problem_facts.h"
#include "core/tiling.h"
#include "flashcore/error.h"
#include "sm90/small_tile.h"
#include "sm90/stream_tile.h"

namespace flashcore {
namespace {

constexpr SmallTile small_tiles[] = {
#define FLASHCORE_SM90_SMALL_TILE(...) {__VA_ARGS__},
#include "sm90/small_tiles.inc"
#undef FLASHCORE_SM90_SMALL_TILE
};

// How the small kernel divides a problem: rows of a tile of queries, warpgroups of a block and blocks of a cluster that
// divide its keys. No warpgroups: the stream kernel.
struct SmallForm {
  int tile_q, key_groups, cluster;
  bool streams() const { return key_groups == 0; }
  bool fits(SmallTile const& tile) const {
    return tile.tile_q() == tile_q && tile.key_groups == key_groups && tile.cluster == cluster;
  }
};

struct SmallChoice {
  int head_dim;
  int64_t keys, tiles;
  SmallForm form;
};

constexpr SmallChoice small_choices[] = {
#define FLASHCORE_SM90_SMALL_CHOICE(...) {__VA_ARGS__},
#include "sm90/small_choice.inc"
#undef FLASHCORE_SM90_SMALL_CHOICE
};

// FLASHCORE_SM90_KERNEL: "large", "stream", or "small", which may go on with a form: "small:64:2:4" is tiles of 64
// rows, keys over 2 warpgroups of each of 4 blocks.
struct ForcedKernel {
  bool small = false, large = false, stream = false;
  std::optional<SmallForm> form = std::nullopt;
};

ForcedKernel forced_kernel() {
  char const* const text = std::getenv("FLASHCORE_SM90_KERNEL");
  if (text == nullptr || text[0] == '\0') return {};
  if (std::string_view(text) == "large") return {.large = true};
  if (std::string_view(text) == "stream") return {.stream = true};
  if (std::string_view(text) == "small") return {.small = true};
  SmallForm form{};
  int read = 0;
  bool known = std::sscanf(text, "small:%d:%d:%d%n", &form.tile_q, &form.key_groups, &form.cluster, &read) == 3 &&
               static_cast<size_t>(read) == std::string_view(text).size();
  known = known && std::any_of(std::begin(small_tiles), std::end(small_tiles),
                               [&](SmallTile const& tile) { return form.fits(tile); });
  if (!known) {
    std::string forms;
    for (SmallTile const& tile : small_tiles) {
      std::string const name = "\"small:" + std::to_string(tile.tile_q()) + ":" + std::to_string(tile.key_groups) +
                               ":" + std::to_string(tile.cluster) + "\"";
      if (forms.find(name) == std::string::npos) forms += (forms.empty() ? "" : ", ") + name;
    }
    throw ValueError(std::string("FLASHCORE_SM90_KERNEL: got \"") + text +
                     "\"; expected \"large\", \"stream\", \"small\" or one of " + forms);
  }
  return {.small = true, .form = form};
}

// The plan for the small kernel with one of its tiles; none where the keys of a part do not fit the shared memory.
std::optional<Plan> plan_small(const Problem& problem, const DeviceProperties& device, const SmallTile& tile) {
  constexpr int64_t most_blocks_an_axis = 65535;
  Sizes const s = sizes(problem);
  int64_t const all_chunks = (s.seqlen_k + tile.chunk - 1) / tile.chunk;
  int64_t const chunks = std::max<int64_t>((all_chunks + tile.parts() - 1) / tile.parts(), 1);
  if (chunks * tile.steps() > SmallTile::most_steps) return std::nullopt;
  int const shared_memory = tile.shared_memory(static_cast<int>(chunks) * tile.steps());
  Tiling const tiling = flashcore::tiling(problem, device, tile.tile_q());
  int64_t const pairs = s.batch * s.heads_q / tiling.packed_heads;
  if (shared_memory > device.shared_memory_per_block || s.batch > most_blocks_an_axis ||
      tiling.tiles / std::max<int64_t>(pairs, 1) > most_blocks_an_axis) {
    return std::nullopt;
  }
  Plan plan;
  plan.backend = Backend::sm90;
  plan.kernel = "sm90_small";
  plan.head_dim = tile.head_dim;
  plan.tile_q = tile.tile_q();
  plan.tile_k = static_cast<int>(chunks) * tile.chunk * tile.key_groups;
  plan.packed_heads = tiling.packed_heads;
  plan.threads = tile.threads();
  plan.plain_score = tile.plain_score;
  plan.shared_memory = shared_memory;
  plan.tiles = tiling.tiles;
  plan.splits = tile.parts();
  plan.blocks = plan.tiles * tile.cluster;
  return plan;
}

// The plan for the stream kernel; none where it has no code for the problem (masks, heads that share a tile, general
// scores, nothing to do), or a block no place for the list of its tiles.
std::optional<Plan> plan_stream(const Problem& problem, const DeviceProperties& device) {
  Sizes const s = sizes(problem);
  bool const masks = problem.causal || problem.window_left.has_value() || problem.window_right.has_value();
  if (s.head_dim > StreamTile::head_dim || masks || !plain_score(problem)) return std::nullopt;
  Tiling const tiling = flashcore::tiling(problem, device, StreamTile::tile_q);
  int64_t const blocks = std::min<int64_t>(tiling.tiles, int64_t{StreamTile::blocks_a_unit} * device.units);
  if (tiling.packed_heads > 1 || tiling.tiles == 0 || s.seqlen_k == 0 ||
      tiling.tiles > blocks * StreamTile::most_jobs) {
    return std::nullopt;
  }
  Plan plan;
  plan.backend = Backend::sm90;
  plan.kernel = "sm90_stream";
  plan.head_dim = StreamTile::head_dim;
  plan.tile_q = StreamTile::tile_q;
  plan.tile_k = StreamTile::tile_k;
  plan.threads = StreamTile::threads;
  plan.plain_score = true;
  plan.shared_memory = StreamTile::shared_memory;
  plan.tiles = tiling.tiles;
  plan.blocks = blocks;
  return plan;
}

// The row of the table of choices for a problem with `tiles` tiles of 64 rows; `streams`: whether those of the stream
// kernel count.
const SmallChoice* small_choice(int head_dim, int64_t keys, int64_t tiles, bool streams,
                                const DeviceProperties& device) {
  int64_t keys_of_rows = 0;
  for (SmallChoice const& row : small_choices) {
    if (row.head_dim != head_dim || row.keys < keys || (row.form.streams() && !streams)) continue;
    if (keys_of_rows == 0) keys_of_rows = row.keys;
    if (row.keys == keys_of_rows && tiles * SmallTile::units <= row.tiles * device.units) return &row;
  }
  return nullptr;
}

}  // namespace

std::optional<Plan> plan_small(const Problem& problem, const DeviceProperties& device) {
  Sizes const s = sizes(problem);
  ForcedKernel const forced = forced_kernel();
  if (forced.large || problem.varlen() || problem.seqused_k.present() || problem.batch_invariant) return std::nullopt;
  if (forced.stream) return plan_stream(problem, device);
  // Beyond this no row holds, and the number of tiles might not fit its type.
  constexpr double most_tiles = 1e6;
  double const about = static_cast<double>(s.batch) * static_cast<double>(s.heads_q) * (s.seqlen_q / 64.0 + 1);
  if (about > most_tiles) return std::nullopt;
  bool const plain = plain_score(problem);
  int head_dim = 0;
  for (SmallTile const& tile : small_tiles) {
    if (head_dim == 0 && tile.head_dim >= s.head_dim) head_dim = tile.head_dim;
  }
  if (head_dim == 0) return std::nullopt;
  // With the tile of that form, or else the first of this kind of score that holds the keys.
  auto const plan_with = [&](std::optional<SmallForm> const& form) {
    std::optional<Plan> plan;
    for (SmallTile const& tile : small_tiles) {
      if (tile.head_dim != head_dim || tile.plain_score != plain) continue;
      if (form && form->fits(tile)) return plan_small(problem, device, tile);
      if (!plan) plan = plan_small(problem, device, tile);
    }
    return plan;
  };
  if (forced.form) return plan_with(forced.form);
  Tiling const tiling = flashcore::tiling(problem, device, 64);
  std::optional<Plan> const stream = plan_stream(problem, device);
  if (SmallChoice const* row = small_choice(head_dim, s.seqlen_k, tiling.tiles, stream.has_value(), device)) {
    if (row->form.streams() && !forced.small) return stream;
    std::optional<Plan> const plan = plan_with(row->form);
    // More heads of a key head than the tile has rows would each read its keys.
    bool const packs = !plan || plan->packed_heads > 1 || flashcore::tiling(problem, device, 128).packed_heads == 1;
    if (plan && (packs || forced.small)) return plan;
  }
  return forced.small ? plan_with(std::nullopt) : std::nullopt;
}

std::string explain_small(const Plan& plan) {
  std::string_view const kernel = plan.kernel;
  if (kernel == "sm90_stream") {
    return forced_kernel().stream ? " The kernel for streams of small tiles is forced:"
                                  : " A small problem, of more tiles than multiprocessors:";
  }
  if (kernel != "sm90_small") return "";
  std::string text = forced_kernel().small ? " The kernel for small problems is forced: " : " A small problem: ";
  text.append(std::to_string(plan.tiles)).append(" tiles, each block with all its keys in shared memory at once");
  if (plan.splits > 1) {
    int const groups = plan.threads / (2 * plan.tile_q), cluster = plan.splits / groups;
    text.append("; ");
    if (groups > 1) text.append(std::to_string(groups)).append(" warpgroups");
    if (groups > 1 && cluster > 1) text.append(" in each of ");
    if (cluster > 1) text.append("the ").append(std::to_string(cluster)).append(" blocks of a cluster");
    text.append(" divide the keys of a tile and merge their results");
  }
  return text.append(".");
}

}  // namespace flashcore

// SPDX-License-Identifier: Apache-2.0
// Which kernel runs a problem, with which tiles: a pure function of the problem and the device's properties.
#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <limits>
#include <optional>
#include <string_view>
#include <vector>

#include "attention/mask.h"
#include "attention/scheduler.h"
#include "core/problem_facts.h"
#include "cpu/cpu.h"
#include "flashcore/flashcore.h"
#include "sm90/small_tile.h"
#include "sm90/stream_tile.h"

namespace flashcore {
namespace {

struct Tile {
  int head_dim, tile_q, tile_k, warps, stages;
  bool plain_score;
  // Queries, and keys and values of each stage, two bytes an element; and what the kernel keeps beside them.
  int shared_memory() const { return (tile_q + 2 * stages * tile_k) * head_dim * 2; }
};

constexpr int static_shared_memory = 1152;  // the kernel's own 128 bytes and the 1 KiB that the driver reserves a block

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

// A build that leaves sm_90a out runs Hopper on the sm80 kernels. Without CUDA plan() tells what a whole build would
// do.
#if FLASHCORE_HAS_CUDA && !FLASHCORE_HAS_SM90
constexpr bool has_sm90 = false;
#else
constexpr bool has_sm90 = true;
#endif

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

// Tiles of `tile_q` queries over all sequences and `heads` heads.
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

// Whether later queries of a sequence have many more keys than the first ones: not where a window to the left makes
// them even, nor where there are many keys before all queries.
bool uneven(const Problem& problem) {
  Sizes const s = sizes(problem);
  return (problem.causal || problem.window_right.has_value()) && s.seqlen_k / 2 < s.seqlen_q &&
         (!problem.window_left.has_value() || *problem.window_left > s.seqlen_k / 2);
}

// Where tiles are uneven, long ones go first among the pairs of sequence and head whose keys and values fit in half of
// the L2 cache; elsewhere the tiles of a pair follow each other, and its keys and values stay in the cache anyway.
// `pairs_per_key_head` of them share their keys.
int heads_per_section(const Problem& problem, const DeviceProperties& device, int64_t pairs,
                      int64_t pairs_per_key_head) {
  Sizes const s = sizes(problem);
  if (!uneven(problem) || problem.varlen() || pairs == 0) return 1;
  int64_t const bytes_per_pair = std::max<int64_t>(1, 2 * s.seqlen_k * s.head_dim * 2 / pairs_per_key_head);
  return static_cast<int>(std::clamp<int64_t>(device.l2_bytes / 2 / bytes_per_pair, 1, pairs));
}

// As large tiles as the cache, or tile registers, and an even load of all threads allow: four for each, and eight where
// they differ (those of whole heads do not). A query's bits do not depend on it.
int cpu_tile_q(const Problem& problem, const DeviceProperties& device) {
  Sizes const s = sizes(problem);
  auto const wanted = [&](int tile_q) {
    bool const differ = uneven(problem) && (problem.varlen() || tile_q < s.seqlen_q);
    return int64_t{differ ? 8 : 4} * device.units;
  };
  if (cpu::holds_keys(problem.query.dtype, s.seqlen_k, s.head_dim) &&
      tiles(problem, cpu::tile_q_held, s.heads_q) >= wanted(cpu::tile_q_held)) {
    return cpu::tile_q_held;
  }
  int tile_q = cpu::tile_q_in(device.l2_bytes, s.head_dim);
  while (tile_q > cpu::least_tile_q && tiles(problem, tile_q, s.heads_q) < wanted(tile_q)) tile_q /= 2;
  return tile_q;
}

Plan plan_cpu(const Problem& problem, const DeviceProperties& device) {
  Sizes const s = sizes(problem);
  Plan plan;
  plan.backend = Backend::cpu;
  plan.kernel = "cpu_forward";
  plan.head_dim = static_cast<int>(s.head_dim);
  plan.tile_q = cpu_tile_q(problem, device);
  plan.tile_k = cpu::tile_k;
  plan.threads = device.units;
  plan.plain_score = plain_score(problem);
  plan.tiles = plan.blocks = tiles(problem, plan.tile_q, s.heads_q);
  plan.splits = problem.varlen() || problem.batch_invariant ? 1 : cpu_splits(s, problem.layout);
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
  plan.tiles = plan.blocks = tiles(problem, plan.tile_q, s.heads_q);
  plan.heads_per_section =
      heads_per_section(problem, device, s.batch * s.heads_q, s.heads_k == 0 ? 1 : s.heads_q / s.heads_k);
  return plan;
}

// TMA takes strides from 0 to 2^40 bytes.
constexpr int64_t tma_limit = int64_t{1} << 40;

bool tma_encodes(const Problem& problem) {
  return tma_encodes(problem.query) && tma_encodes(problem.key) && tma_encodes(problem.value);
}

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

// What a tile costs the GPU's busiest multiprocessor, in rows of queries.
struct Tiling {
  int packed_heads;
  int64_t tiles;
  int64_t rows;
};

// Query heads of one key head share a tile where that leaves fewer of its rows empty.
Tiling tiling(const Problem& problem, const DeviceProperties& device, int tile_q) {
  Sizes const s = sizes(problem);
  int64_t const group = s.heads_k == 0 ? 1 : s.heads_q / s.heads_k;
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

// FLASHCORE_SM90_KERNEL: "large", "stream", or "small", which may go on with a form: "small:64:2:4" is tiles of 64
// rows, keys over 2 warpgroups of each of 4 blocks.
struct ForcedKernel {
  bool small = false, large = false, stream = false;
  std::optional<SmallForm> form;
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

// The small or the stream kernel's plan where it is chosen or forced. Not for sequences that have to get the same bits
// in every batch: the choice depends on how many there are.
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
  int64_t const group = s.heads_k == 0 ? 1 : s.heads_q / s.heads_k;
  int64_t const pairs = s.batch * s.heads_q / plan.packed_heads;
  set_sections(plan, problem, heads_per_section(problem, device, pairs, group / plan.packed_heads), pairs);
  return plan;
}

}  // namespace

bool plain_score(const Problem& problem) { return problem.softcap == 0.0 && effective_scale(problem) > 1e-30; }

bool runs_sm90(const DeviceProperties& device) { return device.compute_capability == 90 && has_sm90; }

bool tma_encodes(const Tensor& tensor) {
  for (int i = 0; i + 1 < tensor.ndim; ++i) {
    if (tensor.shape[i] > 1 && (tensor.stride[i] < 0 || tensor.stride[i] >= tma_limit / tensor.dtype.bytes()))
      return false;
  }
  return true;
}

void check_sm90(const DeviceProperties& device, bool tma_encodes) {
  if (!runs_sm90(device)) {
    throw RuntimeError("backend: got \"sm90\" for " + device.name + ", whose compute capability is " +
                       capability(device) +
                       (has_sm90 ? "; these kernels need 9.0 (Hopper)"
                                 : "; this build has no code for sm_90a (FLASHCORE_CUDA_ARCHS)"));
  }
  if (!tma_encodes) {
    throw ValueError(
        "backend: got \"sm90\" for arrays with strides that TMA cannot take (negative, or 2^40 bytes or more); "
        "expected \"sm80\" or None");
  }
}

std::string capability(const DeviceProperties& device) {
  return std::to_string(device.compute_capability / 10) + "." + std::to_string(device.compute_capability % 10);
}

// A few queries with many keys are divided over the keys. Into how many parts depends on nothing but the problem, so
// that the number of threads changes no bits; the parts' memory is at most 4 MiB.
int cpu_splits(const Sizes& s, Layout layout) {
  constexpr int64_t part_keys = 4096, most_parts = 64;
  if (s.heads_k == 0) return 1;
  int64_t const rows = s.seqlen_q * (s.heads_q / s.heads_k);
  if (rows > cpu::few_rows || s.head_dim % cpu::few_rows_head_dim != 0) return 1;
  int64_t const key_heads = cpu::few_key_heads(rows, s.head_dim, s.heads_k, layout == Layout::bshd);
  int64_t const tasks = s.batch * ((s.heads_k + key_heads - 1) / key_heads);
  if (tasks == 0 || tasks >= most_parts) return 1;
  return static_cast<int>(std::clamp<int64_t>(s.seqlen_k / part_keys, 1, most_parts / tasks));
}

Plan plan(const Problem& problem, const DeviceProperties& device) {
  Plan const forward = plan_forward(problem, device);
  return plan_few_queries(problem, device, forward).value_or(forward);
}

Plan plan_forward(const Problem& problem, const DeviceProperties& device) {
  if (device.type == DeviceType::cpu) {
    if (problem.backend == Backend::sm80 || problem.backend == Backend::sm90) {
      throw ValueError(std::string("backend: got \"") + to_string(problem.backend) +
                       "\" for the device cpu; expected \"cpu\" or None");
    }
    return plan_cpu(problem, device);
  }
  if (problem.backend == Backend::cpu) {
    throw ValueError("backend: got \"cpu\" for the device " + device.name + "; expected \"sm80\", \"sm90\" or None");
  }
  if (device.compute_capability < 80) {
    throw RuntimeError(device.name + " has compute capability " + capability(device) +
                       "; FlashCore's kernels need 8.0 (Ampere) or later: move the arrays to the CPU");
  }
  bool const hopper = runs_sm90(device);
  if (problem.backend == Backend::sm90) check_sm90(device, tma_encodes(problem));
  bool const wants_sm80 = problem.backend == Backend::sm80;
  return hopper && !wants_sm80 && tma_encodes(problem) ? plan_sm90(problem, device) : plan_sm80(problem, device);
}

std::string explain(const Problem& problem, const DeviceProperties& device, const Plan& plan) {
  if (decodes(plan)) return explain(cache_of(problem), device, plan);
  Sizes const s = sizes(problem);
  std::string const why = problem.backend == Backend::automatic ? "" : " (backend forced)";
  std::string text;
  if (plan.backend == Backend::cpu) {
    text = "The arrays are on the CPU" + why + ": tiles of " + std::to_string(plan.tile_q) + " queries and " +
           std::to_string(plan.tile_k) + " keys, divided over " + std::to_string(plan.threads) + " threads.";
  } else {
    bool const hopper = plan.backend == Backend::sm90;
    text = device.name + " has compute capability " + capability(device) + why + ": " +
           (hopper ? "wgmma" : "mma.sync") + " tiles of " + std::to_string(plan.tile_q) + " rows of queries and " +
           std::to_string(plan.tile_k) + " keys for head dimensions to " + std::to_string(plan.head_dim) +
           (plan.head_dim == s.head_dim ? "" : " (padded from " + std::to_string(s.head_dim) + ")") + ", " +
           std::to_string(plan.shared_memory / 1024) + " of " + std::to_string(device.shared_memory_per_block / 1024) +
           " KiB of shared memory a block.";
    if (std::string_view(plan.kernel) == "sm90_small") {
      text.append(forced_kernel().small ? " The kernel for small problems is forced: " : " A small problem: ");
      text.append(std::to_string(plan.tiles)).append(" tiles, each block with all its keys in shared memory at once");
      if (plan.splits > 1) {
        int const groups = plan.threads / (2 * plan.tile_q), cluster = plan.splits / groups;
        text.append("; ");
        if (groups > 1) text.append(std::to_string(groups)).append(" warpgroups");
        if (groups > 1 && cluster > 1) text.append(" in each of ");
        if (cluster > 1) text.append("the ").append(std::to_string(cluster)).append(" blocks of a cluster");
        text.append(" divide the keys of a tile and merge their results");
      }
      text.append(".");
    } else if (hopper) {
      if (std::string_view(plan.kernel) == "sm90_stream") {
        text.append(forced_kernel().stream ? " The kernel for streams of small tiles is forced:"
                                           : " A small problem, of more tiles than multiprocessors:");
      }
      text.append(" ").append(std::to_string(plan.blocks)).append(" blocks share ");
      text.append(std::to_string(plan.tiles)).append(" tiles.");
    }
    if (plan.packed_heads > 1) {
      text += " The rows of " + std::to_string(plan.packed_heads) + " query heads of a key head share a tile.";
    }
    if (plan.heads_per_section > 1) {
      text += " Longest tiles first among " + std::to_string(plan.heads_per_section) +
              " heads, whose keys and values share the L2 cache.";
    }
  }
  if (plan.backend == Backend::sm80 && problem.backend == Backend::automatic && runs_sm90(device)) {
    text += " TMA cannot take the arrays' strides (negative, or 2^40 bytes or more): the sm80 kernel does.";
  }
  if (!plan.plain_score)
    text += problem.softcap > 0 ? " Scores are capped." : " The scale is not positive: scores are scaled one by one.";
  return text;
}

}  // namespace flashcore

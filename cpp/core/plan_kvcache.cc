// SPDX-License-Identifier: Apache-2.0
// Which kernel runs attention over a cache, with which tiles: a pure function of the problem and the device's
// properties. How the keys are divided among the blocks is decided on the device, from the lengths
// (attention/decode_schedule.h); here stands how many blocks there are and how much they may need.
#include <algorithm>
#include <cstdlib>
#include <limits>
#include <optional>
#include <string_view>

#include "attention/decode_parts.h"
#include "attention/decode_tile.h"
#include "core/problem_facts.h"
#include "flashcore/flashcore.h"
#include "sm90/decode_tile.h"
#include "sm90/decode_turned_tile.h"

namespace flashcore {
namespace {

constexpr DecodeTile sm80_tiles[] = {
#define FLASHCORE_SM80_DECODE(...) {__VA_ARGS__},
#include "sm80/decode_tiles.inc"
#undef FLASHCORE_SM80_DECODE
};
constexpr HopperDecodeTile sm90_tiles[] = {
#define FLASHCORE_SM90_DECODE(...) {__VA_ARGS__},
#include "sm90/decode_tiles.inc"
#undef FLASHCORE_SM90_DECODE
};
constexpr TurnedDecodeTile turned_tiles[] = {
#define FLASHCORE_SM90_DECODE_TURNED(...) {__VA_ARGS__},
#include "sm90/decode_turned_tiles.inc"
#undef FLASHCORE_SM90_DECODE_TURNED
};

// The smallest instance that holds the head dimension; with two slices of rows where one is not enough for all.
template <class Tile, size_t count>
const Tile& tile_for(const Tile (&tiles)[count], int64_t head_dim, int64_t rows) {
  const Tile* found = nullptr;
  for (const Tile& tile : tiles) {
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

// What the problem is to every kernel.
struct Work {
  int64_t group, rows;   // query heads of a key head; and times tokens
  int64_t lines, items;  // tiles of rows of a sequence, and of all
  int64_t tiles_a_line;  // of keys, at most

  Work(const Sizes& s, int tile_rows)
      : group(s.heads_k == 0 ? 0 : s.heads_q / s.heads_k),
        rows(group * s.seqlen_q),
        lines(s.heads_k * ((rows + tile_rows - 1) / tile_rows)),
        items(s.batch * lines),
        tiles_a_line(std::max<int64_t>((s.seqlen_k + DecodeSchedule::tile_k - 1) / DecodeSchedule::tile_k, 1)) {}
};

// Whether everything that is counted stays within 63 bits.
bool countable(const Sizes& s) {
  Work const work(s, 16);
  double const rows = static_cast<double>(s.batch) * static_cast<double>(s.heads_q) * static_cast<double>(s.seqlen_q);
  return static_cast<double>(work.items) * static_cast<double>(work.tiles_a_line) <= 1LL << 47 &&
         rows <= std::numeric_limits<int32_t>::max();
}

void check_countable(const Sizes& s) {
  if (!countable(s)) {
    throw ValueError("query: batch " + std::to_string(s.batch) + " times heads " + std::to_string(s.heads_q) +
                     " times tokens " + std::to_string(s.seqlen_q) +
                     " is too much for one call; expected a smaller batch");
  }
}

Plan plan_sm80(const KvCacheProblem& problem, const DeviceProperties& device) {
  Sizes const s = sizes(problem);
  Work const work(s, tile_for(sm80_tiles, s.head_dim, Work(s, 1).rows).rows());
  DecodeTile const& tile = tile_for(sm80_tiles, s.head_dim, work.rows);
  auto const [blocks_a_unit, stages] = occupancy(tile, device);
  int64_t const most_parts = DecodeSchedule::parts_bound(work.lines, work.tiles_a_line);

  Plan plan;
  plan.backend = Backend::sm80;
  plan.kernel = "sm80_decode";
  plan.head_dim = tile.head_dim;
  plan.tile_q = tile.rows();
  plan.tile_k = DecodeSchedule::tile_k;
  plan.packed_heads = static_cast<int>(std::max<int64_t>(work.group, 1));
  plan.threads = 32 * DecodeTile::warps;
  plan.plain_score = plain_score(options_of(problem));
  plan.shared_memory = tile.shared_memory(stages);
  plan.tiles = work.items * work.tiles_a_line;
  int64_t const units = problem.batch_invariant ? work.items * most_parts : plan.tiles;
  plan.blocks = std::min<int64_t>(units, int64_t{device.units} * blocks_a_unit);
  // New tokens are appended even where nothing asks.
  if (plan.blocks == 0 && s.batch * s.heads_k * new_tokens(problem) > 0) plan.blocks = 1;
  plan.splits = static_cast<int>(
      problem.batch_invariant ? most_parts : std::min<int64_t>(work.tiles_a_line, std::max<int64_t>(plan.blocks, 1)));
  if (plan.splits > 1 && work.items > 0) {
    int64_t const slots = problem.batch_invariant ? units : 2 * plan.blocks;
    // A row's output and its log-sum-exp.
    plan.workspace = slots * std::min<int64_t>(work.rows, tile.rows()) * (s.head_dim_v + 1) * 4;
  }
  return plan;
}

// --- Hopper ----------------------------------------------------------------------------------------------------------

// Blocks of a multiprocessor share its memory with the merge's.
constexpr int merge_shared_memory = 4096;

bool decodes_on_sm90(const KvCacheProblem& problem, const DeviceProperties& device) {
  Sizes const s = sizes(problem);
  Work const work(s, 16);
  // The kernel counts tiles, parts and 16-byte pieces of new tokens in 32 bits.
  auto const fits = [](double x) { return x < std::numeric_limits<int32_t>::max() / 4; };
  return runs_sm90(device) && tma_encodes(problem.key_cache) && tma_encodes(problem.value_cache) && work.items > 0 &&
         s.seqlen_k > 0 && problem.key_cache.shape[0] > 0 &&
         fits(static_cast<double>(work.items) * static_cast<double>(work.tiles_a_line)) &&
         fits(static_cast<double>(s.batch) * static_cast<double>(s.heads_q) * static_cast<double>(s.seqlen_q)) &&
         fits(static_cast<double>(s.batch) * static_cast<double>(new_tokens(problem)) *
              static_cast<double>(s.heads_k * s.head_dim));
}

// Tiles of keys that a block may have on their way; with fewer than two each would wait for the one before.
int stages_of(const DeviceProperties& device, const HopperDecodeTile& tile, int cluster_rows) {
  int const bytes = (device.shared_memory_per_unit - merge_shared_memory) / tile.blocks_a_unit() - 1024;
  return tile.stages_of(std::min(device.shared_memory_per_block, bytes), cluster_rows);
}
constexpr int least_stages = 2;

int rows_of_part(const Work& work, const HopperDecodeTile& tile) {
  return static_cast<int>(std::min<int64_t>(work.rows, tile.rows()));
}

// How many blocks, as a cluster, share a part, and how many parts an item falls into: by its own length, at most, or
// where all are about as long.
struct Division {
  int cluster, parts;
  bool by_own_length;
  int shares;  // of a part: a block of the cluster computes one, or several in turn
};

// As many blocks as read a sequence's part of the cache at its full speed, with a multiprocessor each and room for the
// next call's beside them; twice as many where several tiles of rows read the same keys, and products are what takes
// time. More in clusters were slower, whose place on the GPU is not free.
constexpr int most_blocks = 64, least_blocks = 48;

// Items divided among the blocks of clusters, which merge by themselves, as large as they may be: no more than `most`
// blocks, and in more than one part each, merged by another kernel, where these would be too few. H100, 8 key heads of
// dimension 128, one sequence, us: 4,096 keys 9.3 (in 32 parts 13.6), 32,768 46.8 (48.9), with 16 rows 47.6 (60),
// 131,072 keys 177 (178); 8,192 keys of 4 heads 11.6 (in 64 parts 20.5), of 2 heads 9.2 (28.1), of one 7.9 (25.2).
Division in_clusters(int64_t items, const Work& work, int most, bool by_own_length) {
  int cluster = HopperDecodeTile::most_cluster;
  while (cluster > 1 && items * cluster > most) cluster /= 2;
  int64_t const blocks = items * cluster;
  int64_t parts = std::max<int64_t>(most_blocks / blocks, 1);
  if (parts * blocks < least_blocks) ++parts;
  int64_t const whole_parts = (work.tiles_a_line + DecodeSchedule::part_tiles - 1) / DecodeSchedule::part_tiles;
  return {cluster, static_cast<int>(std::clamp<int64_t>(parts, 1, whole_parts)), by_own_length, cluster};
}

// Blocks that run at once. Clusters of 4 and 8 find room on 120 of 132 multiprocessors, which stand in groups of 16 and
// 18, some of less (an H100, two blocks a multiprocessor: 132 clusters of 2, 62 of 4, 30 of 8).
int64_t blocks_at_once(const DeviceProperties& device, const HopperDecodeTile& tile, int cluster) {
  int64_t const units = cluster > 2 ? int64_t{device.units} * 10 / 11 : device.units;
  return units * tile.blocks_a_unit();
}

// batch_invariant: of the blocks that a sequence gets by itself, fewer, each for several shares in turn, where all then
// run at once, one a multiprocessor or nearly two. A share is computed and merged as by a block of its own, so that the
// result has the same bits. H100, us, in clusters of 8 / so: 4 sequences of 8,192 keys 54.6 / 53.4, 8 99.9 / 90.6, in
// pages of 64 100.5 / 92.0, 16 of 4,096 97.9 / 91.0, 32 183 / 177; 12 of 8,192, 96 blocks, 142.9 / 139; but 20 of
// 4,096, 160 blocks, 120 / 124.
Division in_turn(Division division, const Work& work, int rows, const DeviceProperties& device,
                 const HopperDecodeTile& tile) {
  if (tile.slices > 1) return division;  // the outputs of all warps do not fit a stage
  int64_t const all = blocks_at_once(device, tile, 1);
  auto const fits = [&](int cluster) {
    int64_t const blocks = work.items * division.parts * cluster;
    return blocks <= blocks_at_once(device, tile, cluster) && (blocks <= device.units || 4 * blocks >= 3 * all) &&
           stages_of(device, tile, rows * (division.shares / cluster)) >= least_stages;
  };
  int cluster = division.shares;
  while (cluster > 0 && !fits(cluster)) cluster /= 2;
  // More items than blocks run at once: one after the other, whose shares are short (64 sequences of 1,024 keys 125 /
  // 94, 128 of 512 202 / 107), or in clusters, which even out what is uneven (64 of 8,192 691 / 695, of mixed lengths
  // 332 / 348).
  constexpr int64_t short_tiles = 32;  // of an item
  bool const many = work.items * division.parts > all && work.tiles_a_line <= short_tiles * division.parts;
  if (cluster == 0 && many && stages_of(device, tile, rows * division.shares) >= least_stages) cluster = 1;
  if (cluster > 0) division.cluster = cluster;
  return division;
}

Division division_of(const KvCacheProblem& problem, const DeviceProperties& device, const Work& work,
                     HopperDecodeTile const& tile) {
  bool const one_row_tile = work.rows <= tile.rows();
  int64_t const batch = problem.query.shape[0];
  // As if the sequence were alone.
  if (problem.batch_invariant) {
    Division const alone = in_clusters(work.lines, work, one_row_tile ? most_blocks : 2 * most_blocks, true);
    return in_turn(alone, work, rows_of_part(work, tile), device, tile);
  }
  if (one_row_tile) {
    auto const fits = [&](const Division& division) {
      return work.items * division.cluster * division.parts <= blocks_at_once(device, tile, division.cluster);
    };
    // All sequences are known to be as long as each other: a block for each multiprocessor (8 sequences of 8,192 keys
    // 89.6 us, in 4 parts each 93), or half as many where some clusters would have to wait (4 of 8,192 keys, 32 rows,
    // in 32 clusters of 4 68.4, of 2 55.3).
    if (batch > 1 && !problem.cache_seqlens.present() && work.items <= 2 * most_blocks) {
      Division all = in_clusters(work.items, work, 2 * most_blocks, true);
      while (all.cluster > 1 && !fits(all)) all.shares = all.cluster /= 2;
      if (all.cluster <= work.tiles_a_line) return all;
    }
    // Each sequence as if it were alone, where all blocks of that run at once: 2 sequences of 8,192 keys and 4 key
    // heads 20.4 us, in 33 parts 26.5. Tiles of half the size are read by twice as many blocks if there is one sequence
    // alone: 8,192 keys of 32 heads of dimension 64 31.8 us (by 64 blocks 38.7), two sequences of 16 heads 36.9 (32.2).
    int const most = batch == 1 && tile.head_dim <= 64 ? 2 * most_blocks : most_blocks;
    Division alone = in_clusters(work.lines, work, most, batch > 1);
    // In half as many blocks where some would have to wait.
    if (batch <= 4 && alone.cluster > 1 && !fits(alone)) alone.shares = alone.cluster /= 2;
    if (work.lines <= most && fits(alone) && alone.cluster <= work.tiles_a_line) return alone;
  }
  // All blocks that run at once have a part.
  int64_t parts = blocks_at_once(device, tile, 1) / work.items;
  if (parts > 32) parts -= parts % 32;  // the merge takes 32 at a time
  return {1, static_cast<int>(std::clamp<int64_t>(parts, 1, work.tiles_a_line)), false, 1};
}

// Teams of blocks that stay, one for each line: as many as run at once or, where these leave many places empty, as run
// in a few rounds. Their shares are as long whatever the lengths are. (H100, 8 key heads, us, in as many parts as the
// GPU has room for, or in four times as many where lengths differ / in teams, by this kernel / by the turned one: one
// sequence of 8,192 keys and seven of 128 32.9 / 23.5 / 21.3, 20 of 4,096 135 / 114 / 112, 12 of 8,192 147 / 136 / 134,
// 8 91.2 / 91.5 / 89.8, 64 of 128 to 29,376 555 / 550 / 552, 32 of 1,024 53.5 / 47.5 / 47.2.)
int teams_of(const Work& work, int64_t places) {
  constexpr int64_t most_rounds = 4;
  constexpr double worth = 0.05;
  int64_t teams = 1;
  double used = 0;
  for (int64_t rounds = 1; rounds <= most_rounds; ++rounds) {
    int64_t const these = std::max<int64_t>(places * rounds / work.lines, 1);
    double const use = static_cast<double>(these * work.lines) / static_cast<double>(places * rounds);
    if (use > used + worth) teams = these, used = use;
  }
  return static_cast<int>(teams);
}

Plan plan_straight(const KvCacheProblem& problem, const DeviceProperties& device) {
  Sizes const s = sizes(problem);
  Work const work(s, tile_for(sm90_tiles, s.head_dim, Work(s, 1).rows).rows());
  HopperDecodeTile const& tile = tile_for(sm90_tiles, s.head_dim, work.rows);
  Division const division = division_of(problem, device, work, tile);
  int const part_rows = rows_of_part(work, tile);
  int const cluster_rows = division.shares > 1 ? part_rows * (division.shares / division.cluster) : 0;
  int const stages = stages_of(device, tile, cluster_rows);

  Plan plan;
  plan.backend = Backend::sm90;
  plan.kernel = "sm90_decode";
  plan.head_dim = tile.head_dim;
  plan.tile_q = tile.rows();
  plan.tile_k = DecodeParts::tile_k;
  plan.packed_heads = static_cast<int>(work.group);
  plan.threads = tile.threads();
  plan.plain_score = plain_score(options_of(problem));
  plan.shared_memory = tile.shared_memory(stages, cluster_rows);
  plan.tiles = work.items * work.tiles_a_line;
  plan.cluster = division.cluster;
  plan.shares = division.shares;
  int64_t parts = work.items * division.parts, slots = parts;
  if (division.by_own_length || s.batch == 1) {
    plan.even_parts = division.by_own_length ? 0 : division.parts;
    plan.splits = division.parts;
  } else {
    plan.even_parts = 0;
    // No more than there are tiles: then each sequence of one tile is a team's alone, and nothing is merged.
    int64_t const most = s.batch * work.tiles_a_line;
    plan.teams = static_cast<int>(std::min<int64_t>(teams_of(work, blocks_at_once(device, tile, 1)), most));
    parts = plan.teams * work.lines;
    plan.splits = static_cast<int>(std::min<int64_t>(work.tiles_a_line, plan.teams));
    slots = 2 * parts;
  }
  plan.blocks = parts * division.cluster;
  if (plan.splits > 1) plan.workspace = slots * part_rows * (s.head_dim_v + 1) * 4;
  return plan;
}

// The kernel with turned products runs where blocks know their parts without the lengths: one sequence, or a few that
// clusters merge by themselves; and, with few rows, as blocks that stay. It has as many blocks a multiprocessor, or
// more; the plan is otherwise sm90_decode's, `straight`.
std::optional<Plan> plan_turned(const KvCacheProblem& problem, const DeviceProperties& device, const Plan& straight) {
  Sizes const s = sizes(problem);
  int64_t const rows = Work(s, 1).rows;
  bool const known = straight.teams == 0 && (straight.even_parts > 0 || straight.splits == 1);
  if (problem.batch_invariant || rows > straight.tile_q) return std::nullopt;
  TurnedDecodeTile const* found = nullptr;
  for (TurnedDecodeTile const& tile : turned_tiles) {  // those with fewer rows first
    if (tile.head_dim == straight.head_dim && (!found || found->rows() < rows)) found = &tile;
  }
  if (!found || !(known || (straight.teams > 0 && found->walks()))) return std::nullopt;
  int const cluster_rows = straight.cluster > 1 ? static_cast<int>(rows) : 0;
  int const merge = straight.workspace > 0 ? merge_shared_memory : 0;
  int const bytes = (device.shared_memory_per_unit - merge) / found->blocks_a_unit() - 1024;
  Plan plan = straight;
  plan.kernel = "sm90_decode_turned";
  plan.tile_q = found->rows();
  plan.threads = found->threads();
  plan.shared_memory = found->shared_memory(found->stages_of(bytes), cluster_rows);
  // Blocks that merge by themselves count their results.
  if (found->merges(plan.teams, s.batch) && plan.workspace > 0) plan.workspace += plan.blocks * 8;
  return plan;
}

// Whether that is the faster kernel. H100, one sequence, 8 key heads, us, straight / turned, rows x head dimension:
// 512 keys 4 x 64 3.5 / 3.4, 16 x 64 4.13 / 4.22, 16 x 128 4.67 / 4.66, 32 x 64 4.7 / 5.4, 32 x 128 6.1 / 6.6; 1,024 4
// x 128 4.5 / 4.1, 16 x 64 4.6 / 4.5, 32 x 64 5.3 / 5.7, 32 x 128 6.8 / 6.9; 2,048 32 x 64 6.7 / 6.6, 32 x 128 8.5
// / 8.2; 32,768 4 x 64 37 / 27, 4 x 128 46.8 / 45.2, 32 x 128 56.3 / 48.5. Two of 8,192: 4 x 128 30.4 / 29.9, 32 x
// 64 19.4 / 18.6, but 32 x 128 31.2 / 32.3.
bool turned_is_faster(const KvCacheProblem& problem, const Plan& turned) {
  Sizes const s = sizes(problem);
  int64_t const least_keys = turned.tile_q <= 8 ? 0 : turned.tile_q <= 16 ? 1024 : 2048;
  bool const one_of_two_blocks = turned.tile_q > 16 && turned.head_dim > 64;  // sm90_decode has one a multiprocessor
  return s.seqlen_k >= least_keys && (s.batch == 1 || !one_of_two_blocks);
}

// FLASHCORE_SM90_DECODE: "turned", wherever that can run, or "straight"; else plan() chooses.
std::optional<bool> forced_turned() {
  char const* const text = std::getenv("FLASHCORE_SM90_DECODE");
  if (text == nullptr || text[0] == '\0') return std::nullopt;
  if (std::string_view(text) == "turned") return true;
  if (std::string_view(text) == "straight") return false;
  throw ValueError(std::string("FLASHCORE_SM90_DECODE: got \"") + text + "\"; expected \"turned\" or \"straight\"");
}

Plan plan_sm90(const KvCacheProblem& problem, const DeviceProperties& device) {
  std::optional<bool> const forced = forced_turned();
  Plan const straight = plan_straight(problem, device);
  std::optional<Plan> const turned = plan_turned(problem, device, straight);
  return turned && forced.value_or(turned_is_faster(problem, *turned)) ? *turned : straight;
}

// --- Decode kernels and forward kernels ------------------------------------------------------------------------------

// With many queries it is not the keys' way from memory that takes time: where they fill at least so many rows of so
// many tiles, as a part of the multiprocessors, a forward kernel is faster, although it does not divide the keys. H100,
// 8,192 keys of 8 heads, 4 queries each: 64 tokens 62 us (forward about 85), 128 108 (85), 256 213 (90), 2,048 1,761
// (322).
constexpr int64_t least_rows = 64;
constexpr int part_of_units = 5;

// Whether `forward` is the faster plan. batch_invariant, a sequence must get the same kernel in every batch.
bool fills_tiles(const Plan& forward, const Sizes& s, bool batch_invariant, const DeviceProperties& device) {
  int64_t const tiles = batch_invariant ? forward.tiles / std::max<int64_t>(s.batch, 1) : forward.tiles;
  return s.seqlen_q * forward.packed_heads >= least_rows && tiles * part_of_units >= device.units;
}

// A cache in pages is brought together first, in a workspace of at most so many bytes, which pays for at least about so
// many rows: 8,192 keys of 8 heads of dimension 128 take 28 us, of 8 sequences 192 (pages of 16 and 64, H100), and each
// 32 rows of a sequence in decode tiles 6.7.
constexpr int64_t most_gathered = int64_t{512} << 20, least_rows_over_pages = 768;
constexpr int64_t most_gathered_sequences = 65535;  // a grid's blocks along y

// The forward kernel's plan for a prompt; none where a few tokens are decoded, as sequences of uneven length are
// divided better by their keys.
std::optional<Plan> plan_prompt(const KvCacheProblem& problem, const DeviceProperties& device) {
  constexpr int64_t most_decoded_tokens = 16;
  Sizes const s = sizes(problem);
  if (s.seqlen_k == 0 || s.batch == 0 || s.seqlen_q <= most_decoded_tokens) return std::nullopt;
  double const bytes = 4.0 * static_cast<double>(s.batch * s.seqlen_k) * static_cast<double>(s.heads_k * s.head_dim);
  // (batch_invariant, the kernel must not depend on how much all sequences need.)
  bool const gathers = problem.paged();
  if (gathers && (bytes > most_gathered || problem.batch_invariant || s.batch > most_gathered_sequences ||
                  Work(s, 1).rows < least_rows_over_pages)) {
    return std::nullopt;
  }
  Plan forward = plan_forward(forward_of(problem), device);
  if (!fills_tiles(forward, s, problem.batch_invariant, device)) return std::nullopt;
  if (gathers) forward.workspace = static_cast<int64_t>(bytes);
  return forward;
}

}  // namespace

std::optional<Plan> plan_few_queries(const Problem& problem, const DeviceProperties& device, const Plan& forward) {
  // With fewer keys there is nothing to divide; with more rows the decode kernels' small tiles read them too often.
  constexpr int64_t least_keys = 1025, most_rows = 64, small_rows = 16;
  if (forward.backend == Backend::cpu || problem.varlen() || problem.seqused_k.present()) return std::nullopt;
  Sizes const s = sizes(problem);
  if (s.seqlen_k < least_keys || s.batch == 0 || s.heads_k == 0 || s.seqlen_q == 0 || s.seqlen_q > most_rows ||
      Work(s, 1).rows > most_rows || !countable(s)) {
    return std::nullopt;
  }
  // The small kernel divides keys, too, for 64 rows at once (4 sequences of 4,096 keys, 16 heads of dimension 64, a
  // query each: 40.8 us, decoded 33.9).
  std::string_view const kernel = forward.kernel;
  bool const is_small = (kernel == "sm90_small" || kernel == "sm90_stream") && Work(s, 1).rows > small_rows;
  if (is_small || std::getenv("FLASHCORE_SM90_KERNEL") != nullptr ||
      fills_tiles(forward, s, problem.batch_invariant, device)) {
    return std::nullopt;
  }
  return plan(cache_of(problem), device);
}

Plan plan(const KvCacheProblem& problem, const DeviceProperties& device) {
  if (device.type == DeviceType::cpu) {
    Plan plan = flashcore::plan(options_of(problem), device);
    plan.splits = problem.batch_invariant ? 1 : cpu_splits(sizes(problem), problem.layout);
    return plan;
  }
  check_gpu(device, problem.backend);
  check_countable(sizes(problem));
  if (problem.backend == Backend::sm90) {
    check_sm90(device, tma_encodes(problem.key_cache) && tma_encodes(problem.value_cache));
  }
  if (std::optional<Plan> const prompt = plan_prompt(problem, device)) return *prompt;
  // What is empty or too large to be counted in 32 bits is sm80's.
  bool const wants_sm80 = problem.backend == Backend::sm80;
  return decodes_on_sm90(problem, device) && !wants_sm80 ? plan_sm90(problem, device) : plan_sm80(problem, device);
}

bool decodes(const Plan& plan) {
  std::string_view const kernel = plan.kernel;
  return kernel == "sm90_decode" || kernel == "sm90_decode_turned" || kernel == "sm80_decode";
}

std::string explain(const KvCacheProblem& problem, const DeviceProperties& device, const Plan& plan) {
  if (plan.backend == Backend::cpu) return explain(options_of(problem), device, plan);
  if (!decodes(plan)) {
    std::string const pages = problem.paged() ? " The pages of the cache are brought together first." : "";
    return explain(forward_of(problem), device, plan) + pages;
  }
  bool const hopper = plan.backend == Backend::sm90;
  int const rows = static_cast<int>(std::min<int64_t>(plan.tile_q, Work(sizes(problem), plan.tile_q).rows));
  int const cluster_rows = plan.shares > 1 ? rows * (plan.shares / plan.cluster) : 0;
  bool const turned = std::string_view(plan.kernel) == "sm90_decode_turned";
  int const stages = turned ? TurnedDecodeTile{plan.head_dim, plan.tile_q}.stages_of(plan.shared_memory)
                     : hopper
                         ? HopperDecodeTile{plan.head_dim, plan.tile_q / 16}.stages_of(plan.shared_memory, cluster_rows)
                         : DecodeTile{plan.head_dim, plan.tile_q / 16}.stages_of(plan.shared_memory);
  std::string const blocks = std::to_string(plan.blocks);
  std::string text = device.name + " has compute capability " + capability(device) +
                     (problem.backend == Backend::automatic ? "" : " (backend forced)") + ": ";
  if (!hopper) {
    text.append(blocks + " blocks take equal shares of all sequences' keys");
  } else if (plan.teams > 0) {
    text.append(blocks + " blocks take about equal shares of all sequences' keys, in teams of a block for each tile");
    text.append(" of queries of a sequence");
  } else {
    text.append("the keys of all sequences fall into at most ");
    text.append(std::to_string(plan.blocks / plan.cluster) + " parts, ");
    text.append(plan.cluster == 1 ? "a block each" : "a cluster of " + std::to_string(plan.cluster) + " blocks each");
    if (plan.shares > plan.cluster) {
      text.append(" that computes " + std::to_string(plan.shares) + " shares of it in turn");
    }
  }
  text += ", in tiles of " + std::to_string(plan.tile_k) + " keys, " + std::to_string(stages) +
          " of them on their way; a tile of queries has up to " + std::to_string(plan.tile_q) + " rows, of " +
          std::to_string(plan.packed_heads) + " query heads of a key head.";
  if (problem.batch_invariant || (hopper && plan.even_parts == 0 && plan.teams == 0))
    text += " A sequence's length alone decides how its keys are divided.";
  if (plan.workspace > 0) text += " Parts of a sequence are merged in the order of their keys.";
  if (!plan.plain_score) {
    text += problem.softcap > 0 ? " Scores are capped." : " The scale is not positive: scores are scaled one by one.";
  }
  return text;
}

}  // namespace flashcore

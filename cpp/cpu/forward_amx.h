// SPDX-License-Identifier: Apache-2.0
// One tile of queries on the processor's tile registers: Forward's work (forward_isa.cc) with products of 32 x 32
// blocks.
//
// A row's weights are relative to a reference that stays, the largest of the first 32 scores that it sees: bfloat16 has
// exponents enough, and no later unit must look for its maxima first. Only rows of which a pass makes weights too large
// have a new reference, and those weights once more. In bfloat16 the sums are those of the weights as the products take
// them, and products make them: the largest weight is rounded too, and its error cancels.
//
// Where all keys of the tile are packed at a time, a head's mostly are, blocks of 32 rows are packed, computed and
// written one after the other, and a tile may have a whole head's rows: 512 / 2,048 keys 5 / 8 to 20% shorter than with
// all queries packed first and all rows written last, in tiles of 768.
//
// measured.md has what bounds it, and what was tried.
#pragma once

#include "cpu/amx.h"
#include "cpu/amx_pack.h"
#include "cpu/amx_weights.h"

namespace flashcore::cpu {
namespace {

template <typename T, typename Score>
struct ForwardTiles : TileRows<T, Score> {
  using Atom = TileAtom<T>;
  using Base = TileRows<T, Score>;
  using Beside = WeightsBeside<T>;
  using Base::mask, Base::key_row, Base::offset_of, Base::params, Base::query_of, Base::rows, Base::score, Base::tile;
  static constexpr int parts = Atom::parts;
  // Keys of a tile here: storing a block of outputs and loading it again takes as long as its products with 64 keys, so
  // that there should be many. Packed they pass through the second-level cache. In float16 up to head dimension 64 half
  // as many are 4% faster (two passes' weights come to 32 KiB), above it they are slower.
  static constexpr int most_keys_of_tile = 256;
  static constexpr int most_rows = tile_q_held;
  static constexpr int step_elements = parts * 2 * tile_elements;  // of a packed block, in a step
  static constexpr int unit_floats = block_floats;                 // scores of a unit
  static constexpr float largest_sum = 0x1p24f;                    // of a pass: above it a row has a new reference
  static constexpr bool fixed_point = Parts<T>::fixed_point;       // so are weights made, and products sum them
  static constexpr int weight_floats = most_keys_of_tile / tile_depth * Atom::step_floats;
  static_assert(tile_q % amx_block == 0 && most_rows % amx_block == 0 && most_rows >= tile_q &&
                most_keys_of_tile % amx_block == 0 && amx_block == tile_depth);

  // Where `fixed_point`: queries and keys below 2^59 make finite scores; products of values from 2^100 on may overflow,
  // and those of tiles of values below 2^-60, of which tile registers take what is subnormal for 0, may vanish.
  static constexpr int wide_from = 59, values_from = -60, values_up_to = 100;

  // A block of rows with a packed tile of keys, of which it takes in units of 32 keys those that some row sees.
  struct Pass {
    int block, first_key, held;
    Span span;
    Span seen_by_all;  // keys of the sequence
    bool two_tiles;
    bool completes;     // the block, whose rows then are written
    bool rough;         // its scores are Parts<Half>::rough_scores
    uint32_t wide = 0;  // rows that have their weights by the polynomial, if `fixed_point`
    float* weights;
    bool rescales = false;   // the outputs so far,
    float ratio[amx_block];  // by this

    int height() const { return two_tiles ? amx_block : tile_rows; }
    int units() const { return (span.end - span.begin) / amx_block; }
  };

  KeyRange range;  // of tiles of keys
  int keys_of_tile;
  int steps;            // of the head dimension
  int columns;          // head_dim in whole blocks
  int blocks;           // of 32 columns of outputs, the sums of the weights among them
  int packed_elements;  // of a packed tile of keys, or of values
  int held_tiles;       // tiles of keys that are packed at a time
  bool all_held;        // all tiles of keys are: each block of rows is finished, and written, before the next ones
  uint16_t* queries;    // [block of 32 rows][step][part][2 tiles], if `all_held` of the last three blocks: pass() is
                        // that far behind
  uint16_t* keys;       // [tile][32 keys][step][part][2 tiles]
  uint16_t* values;     // [tile][32 columns][32 keys][part][2 tiles]
  float* out;           // [block of 32 rows][block of 32 columns], the last one sums of the weights if `fixed_point`;
                        // if `all_held` of the last two blocks
  float* scores;        // of three units: two in turn, and one to compute again
  float* weights;       // of two passes
  T* gathered;          // [keys_of_tile][head_dim]: rows that lie in pages
  struct {
    float max[most_rows], sum[most_rows];
  } state;                        // of rows that are there
  float exact_sum[most_rows];     // of the weights before they are rounded
  float offset[most_rows];        // offset_for() the row's reference (state.max)
  float exact_offset[most_rows];  // -factor times the reference
  // Of each block the rows of which scores may be NaN, and held tiles of keys.
  uint32_t wide_queries[most_rows / amx_block];
  static constexpr int most_held = packed_bytes / (4 * most_keys_of_tile * tile_depth);
  bool wide_keys[most_held];
  // If in two parts: the largest sums of the second parts' squares of a block's queries and of a held tile's keys.
  float second_queries[most_rows / amx_block], second_keys[most_held];
  bool fresh[most_rows / amx_block];  // blocks that have no output yet
  int settled_block = -1;             // all of whose rows have a reference
  float unseen;                       // the score of a key that a row does not see

  // The pipeline (pass()).
  TileBlocks products;
  struct Unit {
    Pass* pass = nullptr;
    int index = 0;  // in it
    float* scores = nullptr;
  };
  Pass passes[3] = {};
  int last_pass = 0, last_slot = 0;
  Unit waiting;          // whose scores are there
  Unit weighed;          // whose weights are being made
  Pass* made = nullptr;  // whose weights are there, and of whose outputs the first `column` blocks of columns;
  int column = 0;        // the others come
  int turns = 0;         // in so many turns
  int finished = -1;     // block whose rows are to be written
  // If not `fixed_point`, of the weights of a block's rows, lane by lane: their sums with the pass `weighed` and before
  // it, in turn. Where the next block begins, state.sum takes them in.
  Vec sums[2][amx_block];
  int sums_now = 0;
  int summed_block = -1;
  Vec exact[amx_block];  // of the weights before they are rounded, for the log-sum-exp

  ForwardTiles(const ForwardParams& p, const QueryTile& t, float* scratch)
      : Base(p, t),
        steps(ceil_div(p.head_dim, tile_depth)),
        columns(ceil_div(p.head_dim, amx_block) * amx_block),
        blocks(columns / amx_block + (fixed_point ? 1 : 0)),
        products(nullptr) {
    keys_of_tile = parts == 2 && p.head_dim <= 64 ? 128 : most_keys_of_tile;
    range = mask.key_range(tile.q_begin, tile.q_begin + tile.queries, keys_of_tile);
    packed_elements = keys_of_tile * steps * tile_depth * parts;
    held_tiles = max_of(1, packed_bytes / (2 * 2 * packed_elements));
    all_held = range.end - range.begin <= held_tiles;
    float* at = scratch;
    auto const take = [&](int64_t floats) {
      float* const taken = at;
      at += floats;
      return taken;
    };
    scores = take(3 * unit_floats);
    weights = take(2 * weight_floats);
    keys = reinterpret_cast<uint16_t*>(take(held_tiles * packed_elements / 2));
    values = reinterpret_cast<uint16_t*>(take(held_tiles * packed_elements / 2));
    queries = reinterpret_cast<uint16_t*>(take(tile_q * max_head_dim * parts / 2));
    out = take(tile_q * (max_head_dim + amx_block));
    products = TileBlocks(scores + 2 * unit_floats);
    gathered = reinterpret_cast<T*>(at);
    constexpr int64_t floats = tile_q * max_head_dim * parts / 2 + tile_q * (max_head_dim + amx_block) +
                               3 * unit_floats + 2 * weight_floats + most_keys_of_tile * max_head_dim;
    static_assert(floats + packed_bytes / 4 <= scratch_floats &&
                  4 * most_keys_of_tile * max_head_dim * parts <= packed_bytes);
  }

  // Returns whether it has written the result: not where products of parts are not those of the numbers.
  bool run() {
    unseen = -1e9f / score.factor;
    if (unseen < -1e38f || (rows > tile_q && !all_held)) return false;
    TileRegisters const registers;
    for (bool& block : fresh) block = true;
    for (auto& of_rows : sums) {
      for (Vec& sum : of_rows) sum = splat(0.0f);
    }
    clear_exact();
    for (int row = 0; row < ceil_div(rows, amx_block) * amx_block; ++row) {
      refer(row, minus_infinity());
      state.sum[row] = exact_sum[row] = 0.0f;
    }
    for (int t = range.begin; t < range.end; t += held_tiles) {
      int const end = min_of(t + held_tiles, range.end);
      for (int i = t; i < end; ++i) {
        if (!pack(i * keys_of_tile, i - t)) return false;
      }
      FlushedSubnormals const flushed;
      Beside beside(score.factor);
      for (int block = 0; block * amx_block < rows; ++block) {
        if (t == range.begin && !pack_queries(block)) return false;
        for (int i = t; i < end; ++i) pass(block, i * keys_of_tile, i - t, beside);
      }
      finish(beside);
    }
    for (int block = 0; block * amx_block < rows; ++block) {
      if (!all_held || fresh[block]) write(block);
    }
    return true;
  }

  // Returns whether products of parts are those of a block's queries.
  bool pack_queries(int block) {
    int const first = block * amx_block;
    const T* const array = static_cast<const T*>(params.q.data);
    if constexpr (parts == 2) {  // in bfloat16 128 keys take 2 to 3% longer with it, in float32 1%
      for (int row = first + amx_block; row < min_of(first + 2 * amx_block, rows); ++row) {
        fetch_rows(array + offset_of(params.q, row), 0, 0, 1, 1, params.head_dim);
      }
    }
    auto const seen = pack_tile_queries<T>([&](int row) { return array + offset_of(params.q, first + row); },
                                           min_of(amx_block, rows - first), params.head_dim, queries_of(block));
    if constexpr (fixed_point) {
      wide_queries[block] = seen.reaches(wide_from) ? wide_rows_of(block) : 0;
      return true;
    } else if constexpr (parts == 2) {
      second_queries[block] = max_across(seen.largest);
      return true;  // an infinite one makes NaN of its row, as it does without parts
    } else {
      return !(seen.unfit & out_of_range);  // an infinite one makes NaN of its row, as it does without parts
    }
  }

  uint16_t* queries_of(int block) const { return queries + (all_held ? block % 3 : block) * steps * step_elements; }

  // Rows of a block that have a query of which scores may be NaN. The others keep their bits.
  uint32_t wide_rows_of(int block) const {
    uint32_t which = 0;
    for (int i = 0; i < amx_block && block * amx_block + i < rows; ++i) {
      const T* const row = static_cast<const T*>(params.q.data) + offset_of(params.q, block * amx_block + i);
      Largest largest;
      for (int d = 0; d < params.head_dim; d += tile_depth) {
        largest.see(_mm512_maskz_loadu_epi16(mask_of(params.head_dim - d), row + d));
      }
      which |= uint32_t{largest.reaches(wide_from)} << i;
    }
    return which;
  }

  // Filled up to whole blocks, of the tile that begins at first_key.
  int packed_keys(int first_key) const {
    return ceil_div(min_of(keys_of_tile, mask.seqlen_k - first_key), amx_block) * amx_block;
  }

  // The tile of keys from first_key on, into the place `held` of those that are held.
  bool pack(int first_key, int held) {
    int const count = min_of(keys_of_tile, mask.seqlen_k - first_key);
    auto const packed = [&](const Rows<const void*>& array, auto pack_rows, uint16_t* to) {
      const T* from = gathered;
      int64_t stride = params.head_dim;
      if (tile.sequence.pages) {
        for (int k = 0; k < count; ++k) {
          memcpy(gathered + k * stride, key_row(array, first_key + k), params.head_dim * sizeof(T));
        }
      } else {
        from = key_row(array, first_key);
        stride = array.row_stride;
      }
      return pack_rows(from, stride, count, packed_keys(first_key), params.head_dim, to + held * packed_elements);
    };
    auto const seen_keys = packed(params.k, pack_tile_keys<T>, keys);
    auto const seen_values = packed(params.v, pack_tile_values<T>, values);
    if constexpr (fixed_point) {
      wide_keys[held] = seen_keys.reaches(wide_from);
      return seen_values.none_but_zeros() || (seen_values.reaches(values_from) && !seen_values.reaches(values_up_to));
    } else if constexpr (parts == 2) {
      second_keys[held] = max_across(seen_keys.largest);
      return !seen_keys.infinite_or_nan() && !seen_values.infinite_or_nan();
    } else {
      return (seen_keys.unfit | seen_values.unfit) == 0;
    }
  }

  // A block of rows with the packed tile of keys that begins at first_key. The work is a pipeline: products, which make
  // the scores of a unit and some outputs of a pass whose weights are there, beside the weights of the unit before the
  // last, which are the vector units' work. (The last one's scores are still on their way to memory.)
  FLASHCORE_HD void pass(int block, int first_key, int held, Beside& beside) {
    int const row = block * amx_block, end_row = min_of(row + amx_block, rows) - 1;
    int const begin = mask.first_key(query_of(row)) - first_key, end = mask.end_key(query_of(end_row)) - first_key;
    int const packed = packed_keys(first_key);
    if (end <= 0 || begin >= packed || begin >= end) return;
    ++last_pass;
    Pass& next = passes[last_pass % 3];
    next.block = block;
    next.first_key = first_key;
    next.held = held;
    next.span = {max_of(begin, 0) / amx_block * amx_block, min_of(ceil_div(end, amx_block) * amx_block, packed)};
    next.seen_by_all = {mask.first_key(query_of(end_row)), mask.end_key(query_of(row))};
    next.two_tiles = rows - row > tile_rows;
    next.completes = all_held && end <= keys_of_tile;
    if constexpr (fixed_point) next.wide = wide_keys[held] ? ~0u : wide_queries[block];
    next.weights = weights + last_pass % 2 * weight_floats;
    int calls = steps * calls_of_step<Parts<T>::scores>;
    if constexpr (parts == 2) {
      float const most = sqrtf(second_queries[block] * second_keys[held]) * fabsf(params.scale) * log2_e;
      next.rough = params.head_dim >= tile_depth && most <= Parts<T>::negligible;
      if (next.rough) calls = steps * calls_of_step<Parts<T>::rough_scores>;
    }
    for (int i = 0; i < next.units(); ++i) {
      last_slot = 1 - last_slot;
      float* const s = scores + last_slot * unit_floats;
      compute_scores(next, i, s, beside);
      outputs_until(advance(&next, i, s, calls, beside), beside);
    }
  }

  // A unit's scores are there (or there are no more): the next weights are those of the unit before, beside `calls` of
  // products that follow and the outputs that are to be computed now, up to the returned block of columns.
  FLASHCORE_HD int advance(Pass* next, int index, float* next_scores, int calls, Beside& beside) {
    beside.rest();
    if (finished >= 0) write(finished);
    finished = -1;
    if (weighed.pass && weighed.index + 1 == weighed.pass->units()) {
      complete(*weighed.pass, beside.largest);
      beside.largest = _mm512_setzero_si512();
      made = weighed.pass;
      column = 0;
      turns = waiting.pass ? waiting.pass->units() : 1;
    }
    weighed.pass = waiting.pass;
    weighed.index = waiting.index;
    weighed.scores = waiting.scores;
    waiting.pass = next;
    waiting.index = index;
    waiting.scores = next_scores;
    if (weighed.pass) prepare(*weighed.pass, weighed.index, weighed.scores);
    int until = column;
    if (made) {
      until += blocks - column <= turns ? 1 : ceil_div(blocks - column, turns);
      --turns;
      bool const sums_too = fixed_point && until == blocks && column < until;
      calls += (until - column - sums_too) * made->units() * calls_of_step<Parts<T>::outputs>;
      if (sums_too) calls += 2 * made->units();
    }
    begin_weights(weighed, calls, beside);
    return until;
  }

  FLASHCORE_HD void outputs_until(int end, auto& beside) {
    for (; column < end; ++column) outputs(*made, column, beside);
    if (made && column == blocks) {
      fresh[made->block] = false;
      if (made->completes) finished = made->block;
      made = nullptr;
    }
  }

  FLASHCORE_HD void finish(Beside& beside) {
    Nothing nothing;
    for (int i = 0; i < 2; ++i) {
      products.finish();
      outputs_until(advance(nullptr, 0, nullptr, 1, beside), nothing);
    }
    products.finish();
    if constexpr (!fixed_point) begin_sums(-1);
    if (finished >= 0) write(finished);
    finished = -1;
  }

  static float* weights_at(const Pass& p, int unit) { return p.weights + unit * Atom::step_floats; }

  // Field by field: to copy a whole one, just written, the processor waits until all before is in memory.
  FLASHCORE_HD void begin_weights(const Unit& unit, int calls, Beside& beside) {
    beside.row = beside.rows = 0;
    if (!unit.pass) return;
    Pass const& p = *unit.pass;
    if (!fixed_point && unit.index == 0) {
      if (p.block != summed_block) begin_sums(p.block);
      sums_now = 1 - sums_now;
    }
    beside.s = unit.scores;
    beside.offset = offset + p.block * amx_block;
    beside.exact_offset = exact_offset + p.block * amx_block;
    beside.w = weights_at(p, unit.index);
    beside.sums = reinterpret_cast<float*>(sums[sums_now]);
    beside.sums_before = reinterpret_cast<float*>(sums[unit.index == 0 ? 1 - sums_now : sums_now]);
    beside.exact = sums_exactly() ? reinterpret_cast<float*>(exact) : nullptr;
    beside.wide = p.wide;
    beside.slowly = p.wide != 0 || sums_exactly();
    beside.rows = p.height();
    if constexpr (fixed_point) {
      for (beside.each = 1; beside.each * calls < p.height();) beside.each *= 2;
    } else {
      beside.each = ceil_div(p.height(), calls);
    }
  }

  // The weights of a pass are there, `largest` of them lane by lane: takes in the exact sums, and sees to rows with
  // weights that are too large. (Sums of all rows, lane by lane, tell whether there can be one.)
  void complete(Pass& p, __m512i largest) {
    p.rescales = false;
    bool suspect = few();
    if constexpr (fixed_point) {
      suspect |= _mm512_cmpge_epu16_mask(largest, _mm512_set1_epi16(largest_weight)) != 0;
    } else {
      Vec of_all = sums[sums_now][0];
      for (int i = 1; i < p.height(); ++i) of_all = of_all + sums[sums_now][i];
      suspect |= _mm512_cmp_ps_mask((__m512)of_all, (__m512)splat(largest_sum / lanes), _CMP_NLE_UQ) != 0;
    }
    if (!suspect && !sums_exactly()) return;
    for (int first = 0; first < p.height(); first += tile_rows) {
      int const row = p.block * amx_block + first;
      uint32_t const above = few() ? 0xffff : suspect ? too_large(p, first) : 0;
      if (above) raise(p, first, above);
      if (sums_exactly()) store(exact_sum + row, load(exact_sum + row) + total_of(exact + first));
    }
    clear_exact();
  }

  // Those of sixteen rows of a pass that have a weight above the largest; if not `fixed_point`, such a sum.
  uint32_t too_large(const Pass& p, int first) const {
    if constexpr (fixed_point) {
      uint32_t which = 0;
      for (int i = 0; i < tile_rows; ++i) {
        __m512i largest = _mm512_setzero_si512();
        for (int unit = 0; unit < p.units(); ++unit) {
          largest = _mm512_max_epu16(largest, _mm512_loadu_si512(weights_at(p, unit) + (first + i) * lanes));
        }
        if (_mm512_cmpge_epu16_mask(largest, _mm512_set1_epi16(largest_weight)) != 0) which |= 1u << i;
      }
      return which;
    } else {
      Vec const sum = total_of(sums[sums_now] + first) - total_of(sums[1 - sums_now] + first);
      return _mm512_cmp_ps_mask((__m512)sum, (__m512)splat(largest_sum), _CMP_NLE_UQ);
    }
  }

  // From here on the sums are of the rows of a block (or of none); state.sum takes in what they were.
  void begin_sums(int block) {
    if (summed_block >= 0) {
      for (int first = 0; first < amx_block; first += tile_rows) {
        float* const sum = state.sum + summed_block * amx_block + first;
        store(sum, load(sum) + total_of(sums[sums_now] + first));
      }
    }
    summed_block = block;
#pragma GCC unroll 32
    for (Vec& sum : sums[sums_now]) sum = splat(0.0f);
  }

  void clear_exact() {
    if (!sums_exactly()) return;
#pragma GCC unroll 32
    for (Vec& sum : exact) sum = splat(0.0f);
  }

  static Vec total_of(const Vec* lanes_of_rows) {
    return across_each(reinterpret_cast<const Vec(&)[sixteen]>(*lanes_of_rows), [](Vec x, Vec y) { return x + y; });
  }

  // Of a sequence with few rows (not of one of its tiles, or bits would depend on those) each pass has the largest
  // score so far as the reference. The rounding of the largest weight, which then is 1, makes errors up to 1.13 times
  // as large in bfloat16, over many rows; over few that scatters.
  bool few() const { return tile.sequence.seqlen_q * tile.heads <= amx_block; }

  bool sums_exactly() const { return fixed_point && params.lse; }

  // Those of sixteen rows of a pass whose weights are too large or NaN have their largest score as the new reference,
  // and their weights once more.
  void raise(Pass& p, int first, uint32_t which) {
    float* const s = scores + 2 * unit_floats;
    auto const for_each = [&](auto row_of_unit) {
      for (int unit = 0; unit < p.units(); ++unit) {
        Nothing nothing;
        compute_scores(p, unit, s, nothing);
        products.finish();
        see(p, unit, s);
        for (int i = first; i < first + tile_rows; ++i) {
          if (which >> (i - first) & 1) row_of_unit(unit, i, s + i * lanes);
        }
      }
    };
    int const row = p.block * amx_block;
    float most[amx_block];
    for (int i = 0; i < amx_block; ++i) {
      most[i] = state.max[row + i];
      if (!p.rescales) p.ratio[i] = 1.0f;
    }
    p.rescales = true;
    for_each([&](int, int i, const float* of_row) {
      most[i] = max_across(larger(load(of_row), larger(load(of_row + column_floats), splat(most[i]))));
    });
    for (int i = first; i < first + tile_rows; ++i) {
      if (!(which >> (i - first) & 1)) continue;
      float const before = state.max[row + i], offset_before = offset[row + i];
      if (most[i] > unseen) refer(row + i, most[i]);
      float const ratio = before == minus_infinity() ? 0.0f : lane_exp2((before - state.max[row + i]) * score.factor);
      p.ratio[i] = ratio;
      if (fixed_point && !few() && ratio != 0.0f) {
        p.ratio[i] = lane_exp2((offset[row + i] - offset_before) / fixed_point_scale);
      }
      state.sum[row + i] *= ratio;
      exact_sum[row + i] *= ratio;
      exact[i] = splat(0.0f);
      if constexpr (!fixed_point) sums[sums_now][i] = sums[1 - sums_now][i] * splat(ratio);
    }
    for_each([&](int unit, int i, const float* of_row) {
      Vec const s[2] = {load(of_row), load(of_row + column_floats)};
      Vec x[2];
      for (int j = 0; j < 2; ++j) x[j] = exponents<T>(s[j], score.factor, offset[row + i]);
      if constexpr (fixed_point) {
        Vec y[2];
        for (int j = 0; j < 2; ++j) {
          y[j] = s[j] * splat(score.factor) + splat(exact_offset[row + i]);
          if (few()) x[j] = y[j] - splat(static_cast<float>(fixed_point_exponent));  // no other weights are beside them
        }
        exp2_of<true>(y);
        exact[i] = exact[i] + (y[0] + y[1]);
      }
      exp2_of<sizeof(T) == 2>(x);
      Atom::store_weights(weights_at(p, unit) + i * lanes, x);
      if constexpr (!fixed_point) sums[sums_now][i] = sums[sums_now][i] + (x[0] + x[1]);
    });
  }

  // A row's weights are 2^(factor · (s - reference)) from here on; where `fixed_point` 2^-24 times that.
  void refer(int row, float reference) {
    state.max[row] = reference;
    offset[row] = offset_for<T>(reference, score.factor);
    exact_offset[row] = reference == minus_infinity() ? 0.0f : -(reference * score.factor);
  }

  // The outputs of a block in 32 columns, the c-th, with what a pass makes of the values; or the sums of its weights.
  FLASHCORE_HD void outputs(const Pass& p, int c, auto& beside) {
    float* const to = out_of(p.block) + c * 2 * column_floats;
    bool const none = fresh[p.block];
    if (p.rescales && !none) {
      products.finish();
      rescale(p, to);
    }
    const uint16_t* const left = reinterpret_cast<const uint16_t*>(p.weights);
    const float* const start = none ? nullptr : to;
    if (fixed_point && c == blocks - 1) return products.sum(left, p.units(), start, to, beside);
    int const packed_steps = packed_keys(p.first_key) / tile_depth;
    const uint16_t* const right =
        values + p.held * packed_elements + (c * packed_steps + p.span.begin / tile_depth) * step_elements;
    if (p.two_tiles) {
      products.template multiply<Parts<T>::outputs, parts, 2>(left, right, p.units(), start, to, beside);
    } else {
      Nothing nothing;
      products.template multiply<Parts<T>::outputs, parts, 1>(left, right, p.units(), start, to, nothing);
    }
  }

  static void rescale(const Pass& p, float* to) {
    for (int row = 0; row < p.height(); ++row) {
      if (p.ratio[row] == 1.0f) continue;
      for (int i = 0; i < 2; ++i) {
        float* const at = to + i * column_floats + row * lanes;
        store(at, load(at) * splat(p.ratio[row]));
      }
    }
  }

  FLASHCORE_HD void compute_scores(const Pass& p, int unit, float* to, auto& beside) {
    const uint16_t* const left = queries_of(p.block);
    const uint16_t* const right =
        keys + p.held * packed_elements + (p.span.begin / amx_block + unit) * steps * step_elements;
    if (p.two_tiles) {
      if constexpr (parts == 2) {
        if (p.rough) {
          return products.template multiply<Parts<T>::rough_scores, parts, 2>(left, right, steps, nullptr, to, beside);
        }
      }
      products.template multiply<Parts<T>::scores, parts, 2>(left, right, steps, nullptr, to, beside);
    } else {
      Nothing nothing;
      products.template multiply<Parts<T>::scores, parts, 1>(left, right, steps, nullptr, to, nothing);
    }
  }

  float* out_of(int block) const { return out + (all_held ? block % 2 : block) * blocks * block_floats; }

  // What must be before the scores of a unit become weights.
  void prepare(const Pass& p, int unit, float* s) {
    see(p, unit, s);
    if (settled_block != p.block) settle(p, s);
  }

  // Scores are transformed, and those of keys that a row does not see have no weight.
  void see(const Pass& p, int unit, float* s) {
    if constexpr (!Score::plain) {
      for (int c = 0; c < 2; ++c) {
        for (int i = 0; i < p.height(); ++i) {
          float* const at = s + c * column_floats + i * lanes;
          store(at, transform(score, load(at)));
        }
      }
    }
    int const row = p.block * amx_block, key = p.first_key + p.span.begin + unit * amx_block;
    if (p.seen_by_all.begin <= key && p.seen_by_all.end >= key + amx_block) return;
    __m512 const nothing = _mm512_set1_ps(unseen);
    for (int i = 0; i < p.height(); ++i) {
      int const query = query_of(min_of(row + i, rows - 1));
      __mmask32 const hidden = ~(mask_of(mask.end_key(query) - key) & ~mask_of(mask.first_key(query) - key));
      float* const at = s + i * lanes;
      _mm512_mask_storeu_ps(at, static_cast<__mmask16>(hidden), nothing);
      _mm512_mask_storeu_ps(at + column_floats, static_cast<__mmask16>(hidden >> 16), nothing);
    }
  }

  // Rows without a reference take the largest of a unit's scores, if they see one.
  void settle(const Pass& p, const float* s) {
    settled_block = p.block;
    for (int first = 0; first < p.height(); first += tile_rows) {
      int const row = p.block * amx_block + first;
      __m512 const before = (__m512)load(state.max + row);
      __mmask16 const open = _mm512_cmp_ps_mask(before, _mm512_set1_ps(minus_infinity()), _CMP_EQ_OQ);
      if (open == 0) continue;
      Vec v[sixteen];
#pragma GCC unroll 16
      for (int i = 0; i < sixteen; ++i) {
        const float* const at = s + (first + i) * lanes;
        v[i] = larger(load(at), larger(load(at + column_floats), splat(unseen)));
      }
      __m512 const most = (__m512)across_each(v, [](Vec x, Vec y) { return larger(x, y); });
      __mmask16 const settles = _mm512_mask_cmp_ps_mask(open, most, _mm512_set1_ps(unseen), _CMP_GT_OQ);
      if (settles != open) settled_block = -1;
      _mm512_mask_storeu_ps(state.max + row, settles, most);
      _mm512_mask_storeu_ps(offset + row, settles, (__m512)offsets_for<T>((Vec)most, score.factor));
      _mm512_mask_storeu_ps(exact_offset + row, settles, (__m512)((Vec)most * splat(-score.factor)));
    }
  }

  // The sums of the weights of sixteen rows.
  Vec sums_of_rows(int row) const {
    if constexpr (fixed_point) {
      if (fresh[row / amx_block]) return splat(0.0f);
      const float* const at = out_of(row / amx_block) + (blocks - 1) * block_floats + row % amx_block * lanes;
      __m512i const rows = _mm512_mullo_epi32(_mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15),
                                              _mm512_set1_epi32(lanes));
      return (Vec)_mm512_add_ps(_mm512_i32gather_ps(rows, at, 4), _mm512_i32gather_ps(rows, at + column_floats, 4));
    } else {
      return load(state.sum + row);
    }
  }

  // The rows of a block, whose outputs are there.
  void write(int block) const {
    __mmask32 const all = mask_of(amx_block), present = mask_of(params.head_dim - (columns - amx_block));
    int const end = min_of((block + 1) * amx_block, rows);
    for (int row = block * amx_block; row < end; row += tile_rows) {
      Vec const zero = splat(0.0f), sum = sums_of_rows(row);
      float sums_here[tile_rows], inverse[tile_rows];
      store(sums_here, sum);
      store(inverse, (Vec)_mm512_mask_div_ps((__m512)zero, _mm512_cmp_ps_mask((__m512)sum, (__m512)zero, _CMP_NEQ_UQ),
                                             (__m512)splat(1.0f), (__m512)sum));
      bool const none = fresh[block];
      const float* from = out_of(block) + row % amx_block * lanes;
      T* const first_row = static_cast<T*>(params.o.data) + offset_of(params.o, row);
      for (int i = 0; i < min_of(tile_rows, rows - row); ++i, from += lanes) {
        T* const to = tile.heads == 1 ? first_row + i * params.o.row_stride
                                      : static_cast<T*>(params.o.data) + offset_of(params.o, row + i);
        __m512 const factor = _mm512_set1_ps(inverse[i]);
        for (int c = 0; c < columns; c += amx_block) {
          const float* const at = from + c / amx_block * block_floats;
          __m512 const first = none ? (__m512)zero : (__m512)load(at);
          __m512 const second = none ? (__m512)zero : (__m512)load(at + column_floats);
          Parts<T>::join(first, second, factor, to + c, c + amx_block == columns ? present : all);
        }
        if (params.lse)
          this->write_lse({state.max[row + i], sums_exactly() ? exact_sum[row + i] : sums_here[i]}, row + i);
      }
    }
  }
};

}  // namespace
}  // namespace flashcore::cpu

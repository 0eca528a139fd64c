// SPDX-License-Identifier: Apache-2.0
// One tile of queries on the processor's tile registers: Forward's work (forward_isa.cc) with products of 32 x 32
// blocks.
#pragma once

#include "cpu/amx.h"
#include "cpu/amx_pack.h"

namespace flashcore::cpu {
namespace {

// 2^x to 3e-5, 0 below 2^-126 (as exp2_of), 2^100 above. Of x the nearest multiple of 1/32 chooses a power from a
// table; what remains, at most 1/64, takes a straight line. While tile registers multiply, half of the processor's
// multiply-add units are theirs, so that additions and shuffles are to be preferred: three multiplies here, seven in
// exp2_of.
struct PowerTable {
  uint32_t bits[32];  // of 2^(i/32), less the i that exp2_by_table adds
};
constexpr double power_of_two(double x) {  // |x| <= 1
  double sum = 1, term = 1;
  for (int i = 1; i < 24; ++i) sum += term *= x * 0.69314718055994530942 / i;
  return sum;
}
constexpr PowerTable make_power_table() {
  PowerTable table{};
  for (uint32_t i = 0; i < 32; ++i) {
    // In [1, 2): the mantissa, rounded.
    auto const mantissa = static_cast<uint32_t>((power_of_two(i / 32.0) - 1) * (1 << 23) + 0.5);
    table.bits[i] = (127u << 23) + mantissa - (i << 18);
  }
  return table;
}
alignas(64) constexpr PowerTable power_table = make_power_table();

template <int n>
FLASHCORE_HD void exp2_by_table(Vec (&x)[n]) {
  __m512i const low = _mm512_load_si512(power_table.bits), high = _mm512_load_si512(power_table.bits + 16);
  Vec const shifter = splat(1.5f * (1 << 18));  // 32 steps to 1
  Vec shifted[n];
#pragma GCC unroll 4
  for (int i = 0; i < n; ++i) {
    x[i] = (Vec)_mm512_min_ps(_mm512_set1_ps(100.0f), (__m512)x[i]);  // NaN stays
    shifted[i] = x[i] + shifter;
  }
#pragma GCC unroll 4
  for (int i = 0; i < n; ++i) {
    __m512i const steps = _mm512_castps_si512((__m512)shifted[i]);
    __m512i const power = _mm512_add_epi32(_mm512_permutex2var_epi32(low, steps, high), _mm512_slli_epi32(steps, 18));
    Vec const rest = x[i] - (shifted[i] - shifter);
    Vec const line = rest * splat(ln_2) + splat(1.0f);
    __mmask16 const normal = _mm512_cmp_ps_mask((__m512)x[i], (__m512)splat(-125.5f), _CMP_NLT_UQ);
    x[i] = (Vec)_mm512_maskz_mul_ps(normal, _mm512_castsi512_ps(power), (__m512)line);
  }
}

template <typename T, typename Score>
struct ForwardTiles : TileRows<T, Score> {
  using Atom = TileAtom<T>;
  using Base = TileRows<T, Score>;
  using Base::mask, Base::key_row, Base::offset_of, Base::params, Base::query_of, Base::rows, Base::score, Base::tile;
  static constexpr int parts = Atom::parts;
  static constexpr bool rough = sizeof(T) == 2;
  // Keys of a tile here: storing a block and loading it again takes longer than its products with 64 keys, so that
  // there should be many. Packed they pass through the second-level cache.
  static constexpr int keys_of_tile = 256;
  static constexpr int step_elements = parts * 2 * tile_elements;  // of a packed block, in a step
  static constexpr int panel_floats = panel_width * amx_block;     // scores of a panel
  static constexpr int pass_floats = keys_of_tile * amx_block;     // scores of a pass
  static constexpr int weight_floats = keys_of_tile / tile_depth * Atom::step_floats;
  static_assert(tile_q % amx_block == 0 && panel_width % amx_block == 0);

  // A block of rows with a packed tile of keys.
  struct Pass {
    int block, first_key, held;
    Span span;  // the keys that some of its rows see, in whole panels
    float* weights;
    bool two_tiles;

    int height() const { return two_tiles ? amx_block : tile_rows; }
  };

  int steps;            // of the head dimension
  int columns;          // head_dim in whole blocks
  int packed_elements;  // of a packed tile of keys, or of values
  int held_tiles;       // tiles of keys that are packed at a time
  uint16_t* queries;    // [block of 32 rows][step][part][2 tiles]
  uint16_t* keys;       // [tile][32 keys][step][part][2 tiles]
  uint16_t* values;     // [tile][32 columns][32 keys][part][2 tiles]
  float* out;           // [block of 32 rows] of `columns`
  float* panel_scores;  // of two panels
  float* scores;        // of a pass
  float* weights;       // of two passes
  T* gathered;          // [keys_of_tile][head_dim]: rows that lie in pages
  RowStates<tile_q> state;
  bool fresh[tile_q / amx_block];  // blocks that have no output yet

  // The pipeline: a panel whose scores are there and whose weights are next, and a pass whose weights are there.
  bool weighing = false, outputs_left = false, finished_fresh = false;
  Pass passes[3] = {};
  int next_pass = 0;
  const Pass* weighed = &passes[0];
  const Pass* finished = &passes[0];
  int weighed_key = 0, columns_done = 0;
  float* weighed_scores = nullptr;
  int other_weights = 0, other_scores = 0;
  Vec sums[amx_block];  // of the weights of weighed so far

  ForwardTiles(const ForwardParams& p, const QueryTile& t, float* scratch)
      : Base(p, t), steps(ceil_div(p.head_dim, tile_depth)), columns(ceil_div(p.head_dim, amx_block) * amx_block) {
    packed_elements = keys_of_tile * steps * tile_depth * parts;
    held_tiles = max_of(1, packed_bytes / (2 * 2 * packed_elements));
    float* at = scratch;
    auto const take = [&](int64_t floats) {
      float* const taken = at;
      at += floats;
      return taken;
    };
    keys = reinterpret_cast<uint16_t*>(take(held_tiles * packed_elements / 2));
    values = reinterpret_cast<uint16_t*>(take(held_tiles * packed_elements / 2));
    queries = reinterpret_cast<uint16_t*>(take(tile_q * max_head_dim * parts / 2));
    out = take(tile_q * max_head_dim);
    scores = take(pass_floats);
    panel_scores = take(2 * panel_floats);
    weights = take(2 * weight_floats);
    gathered = reinterpret_cast<T*>(at);
    constexpr int64_t floats = tile_q * max_head_dim * parts / 2 + tile_q * max_head_dim + pass_floats +
                               2 * panel_floats + 2 * weight_floats + keys_of_tile * max_head_dim;
    static_assert(floats + packed_bytes / 4 <= scratch_floats &&
                  4 * keys_of_tile * max_head_dim * parts <= packed_bytes);
  }

  // Returns whether it has written the result: not where products of parts are not those of the numbers.
  bool run() {
    TileRegisters const registers;
    KeyRange const range = mask.key_range(tile.q_begin, tile.q_begin + tile.queries, keys_of_tile);
    const T* const array = static_cast<const T*>(params.q.data);
    // An infinite query makes NaN of its row, as it does without parts, and other rows keep their bits.
    unsigned const unfit =
        pack_tile_queries<T>([&](int row) { return array + offset_of(params.q, row); }, rows, params.head_dim, queries);
    if (unfit & out_of_range) return false;
    for (bool& block : fresh) block = true;
    for (int t = range.begin; t < range.end; t += held_tiles) {
      int const end = min_of(t + held_tiles, range.end);
      for (int i = t; i < end; ++i) {
        if (!pack(i * keys_of_tile, i - t)) return false;
      }
      for (int block = 0; block * amx_block < rows; ++block) {
        for (int i = t; i < end; ++i) pass(block, i * keys_of_tile, i - t);
      }
      finish();
    }
    write();
    return true;
  }

  // In whole panels, of the tile that begins at first_key.
  int packed_keys(int first_key) const {
    return ceil_div(min_of(keys_of_tile, mask.seqlen_k - first_key), panel_width) * panel_width;
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
    return packed(params.k, pack_tile_keys<T>, keys) == 0 && packed(params.v, pack_tile_values<T>, values) == 0;
  }

  // A block of rows with the packed tile of keys that begins at first_key.
  void pass(int block, int first_key, int held) {
    int const row = block * amx_block, last = min_of(row + amx_block, rows) - 1;
    int const begin = mask.first_key(query_of(row)) - first_key, end = mask.end_key(query_of(last)) - first_key;
    int const packed = packed_keys(first_key);
    if (end <= 0 || begin >= packed || begin >= end) return;
    other_weights = !other_weights;
    next_pass = (next_pass + 1) % 3;
    Pass& next = passes[next_pass];
    next = {block,
            first_key,
            held,
            {max_of(begin, 0) / panel_width * panel_width, min_of(ceil_div(end, panel_width) * panel_width, packed)},
            weights + other_weights * weight_floats,
            rows - row > tile_rows};
    for (int k = next.span.begin; k < next.span.end; k += panel_width) advance<true>(next, k);
  }

  // The work is a pipeline over the panels of all passes: scores of one panel, and outputs of the pass before, beside
  // the weights of the panel before, which take the vector units.
  template <bool more>
  void advance(const Pass& next, int k) {
    if (weighing) prepare();
    float* const next_scores = panel_scores + other_scores * panel_floats;
    other_scores = !other_scores;
    int columns_end = 0;
    if (outputs_left) {
      int const panels = (weighed->span.end - weighed->span.begin) / panel_width;
      int const panel = (weighed_key - weighed->span.begin) / panel_width;
      columns_end = weighing ? steps * (panel + 1) / panels : steps;
    }
    Beside beside{&score.factor, weighing ? weighed->height() : 0, 0};
    if (weighing) {
      beside.s = weighed_scores;
      beside.offset = state.max + weighed->block * amx_block;
      beside.w = weighed->weights + weighed_key / tile_depth * Atom::step_floats;
      beside.sum = sums;
    }
    if (more) beside.calls += 2 * steps * calls_of_step<Parts<T>::scores>(next.two_tiles ? 2 : 1);
    if (outputs_left) {
      beside.calls += (columns_end - columns_done) * (finished->span.end - finished->span.begin) / tile_depth *
                      calls_of_step<Parts<T>::outputs>(finished->two_tiles ? 2 : 1);
    }
    if (more) scores_of_panel(next, k, next_scores, beside);
    if (outputs_left) outputs_until(columns_end, beside);
    while (beside.left > 0) beside.weigh();
    if (weighing && weighed_key + panel_width == weighed->span.end) close();
    weighing = more;
    if (more) {
      weighed = &next;
      weighed_key = k;
      weighed_scores = next_scores;
    }
  }

  void finish() {
    if (weighing) advance<false>(*weighed, 0);
    if (outputs_left) advance<false>(*finished, 0);
  }

  // The weights of a panel, row after row, evenly over the calls. All that it needs is in itself: products are said to
  // change memory, and what lies there would be read again after each.
  struct Beside {
    const float* factor;
    int rows, calls;
    const float* s = nullptr;
    const float* offset = nullptr;
    float* w = nullptr;
    Vec* sum = nullptr;
    int credit = 0;

    FLASHCORE_HD void operator()() {
      credit += rows;
      if (credit < calls || left == 0) return;
      credit -= calls;
      weigh();
    }
    FLASHCORE_HD void weigh() {
      weigh_row(s, *factor, *offset, w, *sum);
      s += lanes;
      ++offset;
      w += lanes;
      ++sum;
      --left;
    }
    int left = rows;
  };

  // What a panel's scores still need before they become weights.
  void prepare() {
    if (weighed_key == weighed->span.begin) {
      for (Vec& sum : sums) sum = splat(0.0f);
    }
    prepare_scores(*weighed, weighed_key, weighed_scores);
    if (!fresh[weighed->block] || weighed_key != weighed->span.begin) return;
    for (int i = 0; i < weighed->height(); i += tile_rows) {
      Vec const largest = largest_of(weighed_scores + i * lanes, {0, panel_width});
      store(state.max + weighed->block * amx_block + i, largest * splat(score.factor));
    }
  }

  // The end of a pass: takes in its sums. Weights that are too large, or not numbers because a row had no offset, are
  // computed anew.
  void close() {
    int const row = weighed->block * amx_block;
    Vec total[amx_block / tile_rows];
    bool good = true;
    for (int i = 0; i < weighed->height(); i += tile_rows) {
      total[i / tile_rows] =
          across_each(reinterpret_cast<const Vec(&)[sixteen]>(sums[i]), [](Vec x, Vec y) { return x + y; });
      good &= _mm512_cmp_ps_mask((__m512)total[i / tile_rows], _mm512_set1_ps(0x1p16f), _CMP_NLT_UQ) == 0;
    }
    if (good) {
      for (int i = 0; i < weighed->height(); i += tile_rows) {
        store(state.sum + row + i, load(state.sum + row + i) + total[i / tile_rows]);
      }
    } else {
      weigh_anew(*weighed);
    }
    finished = weighed;
    finished_fresh = fresh[weighed->block];
    fresh[weighed->block] = false;
    outputs_left = true;
    columns_done = 0;
  }

  // The outputs of the finished pass in columns up to the blocks `end`.
  FLASHCORE_HD void outputs_until(int end, auto& beside) {
    int const first_step = finished->span.begin / tile_depth, end_step = finished->span.end / tile_depth;
    const uint16_t* const left = reinterpret_cast<const uint16_t*>(finished->weights) + first_step * step_elements;
    const uint16_t* const right = values + finished->held * packed_elements + first_step * step_elements;
    int const packed_steps = packed_keys(finished->first_key) / tile_depth;
    auto const outputs = [&](auto row_tiles) __attribute__((always_inline)) {
      constexpr int n = decltype(row_tiles)::value;
      for (; columns_done < end; ++columns_done) {
        float* const to = out_of(finished->block) + columns_done * 2 * column_floats;
        finished_fresh ? zero_block<n>() : load_block<n>(to);
        tile_products<Parts<T>::outputs, parts, n>(left, right + columns_done * packed_steps * step_elements,
                                                   end_step - first_step, beside);
        store_block<n>(to);
      }
    };
    finished->two_tiles ? outputs(Constant<2>{}) : outputs(Constant<1>{});
    outputs_left = columns_done < steps;
  }

  FLASHCORE_HD void scores_of_panel(const Pass& p, int k, float* to, auto& beside) {
    const uint16_t* const left = queries + p.block * steps * step_elements;
    const uint16_t* const right = keys + p.held * packed_elements + k / amx_block * steps * step_elements;
    auto const scores_of = [&](auto row_tiles) __attribute__((always_inline)) {
      constexpr int n = decltype(row_tiles)::value;
      for (int i = 0; i < panel_width / amx_block; ++i) {
        zero_block<n>();
        tile_products<Parts<T>::scores, parts, n>(left, right + i * steps * step_elements, steps, beside);
        store_block<n>(to + i * 2 * column_floats);
      }
    };
    p.two_tiles ? scores_of(Constant<2>{}) : scores_of(Constant<1>{});
  }

  float* out_of(int block) const { return out + block * amx_block * columns; }

  // Scores of a panel of keys, from key k of the tile on, are transformed, and those that a row does not see minus
  // infinity.
  void prepare_scores(const Pass& p, int k, float* s) {
    if constexpr (!Score::plain) {
      for (int i = 0; i < panel_floats; i += lanes) store(s + i, transform(score, load(s + i)));
    }
    int const row = p.block * amx_block, key = p.first_key + k;
    int const last = min_of(row + amx_block, rows) - 1;
    if (mask.first_key(query_of(last)) <= key && mask.end_key(query_of(row)) >= key + panel_width) return;
    __m512 const nothing = _mm512_set1_ps(minus_infinity());
    for (int i = 0; i < p.height(); ++i) {
      int const query = query_of(min_of(row + i, rows - 1));
      int const begin = mask.first_key(query) - key, end = mask.end_key(query) - key;
      for (int j = 0; j < panel_width; j += amx_block) {
        __mmask32 const unseen = ~(mask_of(end - j) & ~mask_of(begin - j));
        float* const at = s + j / lanes * column_floats + i * lanes;
        _mm512_mask_storeu_ps(at, static_cast<__mmask16>(unseen), nothing);
        _mm512_mask_storeu_ps(at + column_floats, static_cast<__mmask16>(unseen >> 16), nothing);
      }
    }
  }

  // The weights of a row from a panel of its scores; their sum is added.
  FLASHCORE_HD static void weigh_row(const float* s, float factor, float offset, float* w, Vec& sum) {
    static_assert(panel_vectors == 4);
    Vec weight[panel_vectors];
#pragma GCC unroll 4
    for (int v = 0; v < panel_vectors; ++v) {
      weight[v] = load(s + v * column_floats) * splat(factor) - splat(offset);
    }
    if constexpr (rough) {
      exp2_by_table(weight);
    } else {
      exp2_of(weight);
    }
    sum = sum + sum_of(weight);
    Atom::store_weights(w, {weight[0], weight[1]});
    Atom::store_weights(w + Atom::step_floats, {weight[2], weight[3]});
  }

  // Of sixteen rows' scores.
  static Vec largest_of(const float* s, Span span) {
    Vec v[sixteen];
#pragma GCC unroll 1
    for (int i = 0; i < sixteen; ++i) {
      const float* const at = s + i * lanes;
      v[i] = load(at + span.begin / lanes * column_floats);
      for (int k = span.begin / lanes + 1; k < span.end / lanes; ++k) {
        v[i] = larger(load(at + k * column_floats), v[i]);
      }
    }
    return across_each(v, [](Vec x, Vec y) { return larger(x, y); });
  }

  // A pass's weights with offsets that take in its maxima, and what the outputs so far become of it.
  void weigh_anew(const Pass& p) {
    Alone alone;
    for (int k = p.span.begin; k < p.span.end; k += panel_width) {
      float* const to = scores + k / lanes * column_floats;
      scores_of_panel(p, k, to, alone);
      prepare_scores(p, k, to);
    }
    for (int i = 0; i < p.height(); i += tile_rows) softmax(p, i);
  }

  // Sixteen rows of it.
  void softmax(const Pass& p, int first) {
    int const row = p.block * amx_block + first;
    const float* const s = scores + first * lanes;
    Vec const nothing = splat(minus_infinity());
    // A fresh block's offset is only a guess.
    Vec const old = fresh[p.block] ? nothing : load(state.max + row);
    Vec const offset = larger(largest_of(s, p.span) * splat(score.factor), old);
    Vec const finite = where_less(nothing, offset, offset, splat(0.0f));
    float offsets[sixteen], ratio[sixteen];
    store(offsets, finite);
    Vec const ratios = exp2_of(old - finite);
    store(ratio, ratios);
    Vec sum[sixteen];
    for (int i = 0; i < sixteen; ++i) {
      sum[i] = splat(0.0f);
      for (int k = p.span.begin; k < p.span.end; k += panel_width) {
        weigh_row(s + k / lanes * column_floats + i * lanes, score.factor, offsets[i],
                  p.weights + k / tile_depth * Atom::step_floats + (first + i) * lanes, sum[i]);
      }
    }
    store(state.sum + row, load(state.sum + row) * ratios + across_each(sum, [](Vec x, Vec y) { return x + y; }));
    store(state.max + row, offset);
    if (fresh[p.block]) return;
    unsigned changed = _mm512_cmp_ps_mask((__m512)ratios, (__m512)splat(1.0f), _CMP_NEQ_UQ);
    for (; changed != 0; changed &= changed - 1) {
      int const i = __builtin_ctz(changed);
      float* const to = out_of(p.block) + (first + i) * lanes;
      for (int c = 0; c < columns / lanes; ++c) {
        store(to + c * column_floats, load(to + c * column_floats) * splat(ratio[i]));
      }
    }
  }

  void write() const {
    for (int row = 0; row < rows; row += tile_rows) {
      Vec const zero = splat(0.0f), sum = load(state.sum + row);
      float inverse[tile_rows];
      store(inverse, (Vec)_mm512_mask_div_ps((__m512)zero, _mm512_cmp_ps_mask((__m512)sum, (__m512)zero, _CMP_NEQ_UQ),
                                             (__m512)splat(1.0f), (__m512)sum));
      for (int i = 0; i < min_of(tile_rows, rows - row); ++i) {
        T* const to = static_cast<T*>(params.o.data) + offset_of(params.o, row + i);
        const float* const from = out_of(row / amx_block) + (row % amx_block + i) * lanes;
        for (int c = 0; c < params.head_dim; c += amx_block) {
          __m512 x[2] = {(__m512)zero, (__m512)zero};
          if (!fresh[row / amx_block])
            in_order(from + c / lanes * column_floats, from + (c / lanes + 1) * column_floats, x);
          __m512 const factor = _mm512_set1_ps(inverse[i]);
          Parts<T>::join(_mm512_mul_ps(x[0], factor), _mm512_mul_ps(x[1], factor), to + c, params.head_dim - c);
        }
        if (params.lse) this->write_lse({state.max[row + i], state.sum[row + i]}, row + i, 0, 1.0f);
      }
    }
  }
};

}  // namespace
}  // namespace flashcore::cpu

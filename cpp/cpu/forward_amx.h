// SPDX-License-Identifier: Apache-2.0
// One tile of queries on the processor's tile registers: Forward's work (forward_isa.cc) with products of 32 x 32
// blocks.
#pragma once

#include "cpu/amx.h"
#include "cpu/amx_pack.h"

namespace flashcore::cpu {
namespace {

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
    bool two_tiles;
    float* scores;
    float* weights;
    float ratio[amx_block];  // what its weights make of the outputs so far

    int height() const { return two_tiles ? amx_block : tile_rows; }
    int panels() const { return (span.end - span.begin) / panel_width; }
  };

  int steps;            // of the head dimension
  int columns;          // head_dim in whole blocks
  int packed_elements;  // of a packed tile of keys, or of values
  int held_tiles;       // tiles of keys that are packed at a time
  uint16_t* queries;    // [block of 32 rows][step][part][2 tiles]
  uint16_t* keys;       // [tile][32 keys][step][part][2 tiles]
  uint16_t* values;     // [tile][32 columns][32 keys][part][2 tiles]
  float* out;           // [block of 32 rows] of `columns`
  float* scores;        // of two passes
  float* weights;       // of two passes
  T* gathered;          // [keys_of_tile][head_dim]: rows that lie in pages
  RowStates<tile_q> state;
  bool fresh[tile_q / amx_block];  // blocks that have no output yet

  // The pipeline: a pass whose scores are there and whose weights are next, and one whose weights are there.
  Pass passes[3] = {};
  int last_pass = 0;
  Pass* weighed = nullptr;
  const Pass* finished = nullptr;

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
    scores = take(2 * pass_floats);
    weights = take(2 * weight_floats);
    gathered = reinterpret_cast<T*>(at);
    constexpr int64_t floats = tile_q * max_head_dim * parts / 2 + tile_q * max_head_dim + 2 * pass_floats +
                               2 * weight_floats + keys_of_tile * max_head_dim;
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
    ++last_pass;
    bool const odd = last_pass % 2 != 0;
    Pass& next = passes[last_pass % 3];
    next.block = block;
    next.first_key = first_key;
    next.held = held;
    next.span = {max_of(begin, 0) / panel_width * panel_width,
                 min_of(ceil_div(end, panel_width) * panel_width, packed)};
    next.two_tiles = rows - row > tile_rows;
    next.scores = scores + odd * pass_floats;
    next.weights = weights + odd * weight_floats;
    advance(&next);
  }

  // The work is a pipeline: scores of a pass and outputs of the last but one, which are products, beside the weights of
  // the last, which are the vector units' work. (One thread, 2,048 keys, D 128, against one after the other: about 1.3
  // times as fast in float32, 1.2 in float16 and little in bfloat16. Beside products additions of vectors cost nothing
  // here, but multiply-adds have half of their rate. To fetch the lines that scores go to ahead made it 3% slower.)
  void advance(Pass* next) {
    Vec sums[amx_block];
    float offset[amx_block];
    Beside beside;
    if (weighed) {
      begin_weights(*weighed, offset);
      for (Vec& sum : sums) sum = splat(0.0f);
      beside = {&score.factor,
                weighed->height(),
                weighed->height() * weighed->panels(),
                weighed->scores,
                offset,
                weights_at(*weighed, weighed->span.begin),
                sums};
      if (next) {
        beside.calls += 2 * next->panels() * steps * calls_of_step<Parts<T>::scores>(next->two_tiles ? 2 : 1);
      }
      if (finished) {
        beside.calls += 2 * finished->panels() * columns / amx_block *
                        calls_of_step<Parts<T>::outputs>(finished->two_tiles ? 2 : 1);
      }
    }
    if (next) compute_scores(*next, beside);
    if (finished) outputs(*finished, beside);
    beside.rest();
    if (weighed) {
      for (int i = 0; i < weighed->height(); i += tile_rows) {
        float* const sum = state.sum + weighed->block * amx_block + i;
        store(sum, load(sum) + across_each(reinterpret_cast<const Vec(&)[sixteen]>(sums[i]),
                                           [](Vec x, Vec y) { return x + y; }));
      }
    }
    finished = weighed;
    weighed = next;
  }

  void finish() {
    advance(nullptr);
    advance(nullptr);
  }

  static float* weights_at(const Pass& p, int k) { return p.weights + k / tile_depth * Atom::step_floats; }

  // The weights of a pass, a row of a panel at a time, evenly over the calls. All that it needs is in itself: products
  // are said to change memory, and what lies there would be read again after each.
  struct Beside {
    const float* factor = nullptr;
    int height = 0, left = 0;  // rows of a panel, and of all panels those that are left
    const float* s = nullptr;
    const float* offset = nullptr;
    float* w = nullptr;
    Vec* sum = nullptr;
    int calls = 0, all = left, credit = 0, row = 0;

    FLASHCORE_HD void operator()() {
      credit += all;
      if (credit < calls || left == 0) return;
      credit -= calls;
      weigh();
    }
    FLASHCORE_HD void rest() {
      while (left > 0) weigh();
    }
    FLASHCORE_HD void weigh() {
      weigh_row(s + row * lanes, *factor, offset[row], w + row * lanes, sum[row]);
      --left;
      if (++row == height) {
        row = 0;
        s += panel_floats;
        w += panel_width / tile_depth * Atom::step_floats;
      }
    }
  };

  // What must be before the scores of a pass become weights: the maxima.
  void begin_weights(Pass& p, float* offset) {
    for (int k = p.span.begin; k < p.span.end; k += panel_width) {
      prepare_scores(p, k, p.scores + (k - p.span.begin) / lanes * column_floats);
    }
    for (int first = 0; first < p.height(); first += tile_rows) {
      int const row = p.block * amx_block + first;
      Vec const nothing = splat(minus_infinity());
      Vec const old = load(state.max + row);
      Vec const largest = larger(largest_of(p.scores + first * lanes, p.panels() * panel_vectors), old);
      Vec const finite = where_less(nothing, largest, largest, splat(0.0f));
      Vec const ratios = exp2_of((old - finite) * splat(score.factor));
      store(offset + first, finite);
      store(state.max + row, largest);
      store(state.sum + row, load(state.sum + row) * ratios);
      store(p.ratio + first, ratios);
    }
  }

  // The outputs so far of rows that had a new maximum: of 16 tiles of random keys in three.
  void rescale(const Pass& p) {
    for (int row = 0; row < p.height(); ++row) {
      if (p.ratio[row] == 1.0f) continue;
      float* const to = out_of(p.block) + row * lanes;
      for (int c = 0; c < columns / lanes; ++c) {
        store(to + c * column_floats, load(to + c * column_floats) * splat(p.ratio[row]));
      }
    }
  }

  // Adds to the outputs of a block what a pass makes of the values.
  FLASHCORE_HD void outputs(const Pass& p, auto& beside) {
    if (!fresh[p.block]) rescale(p);
    int const first_step = p.span.begin / tile_depth, packed_steps = packed_keys(p.first_key) / tile_depth;
    const uint16_t* const left = reinterpret_cast<const uint16_t*>(weights_at(p, p.span.begin));
    const uint16_t* const right = values + p.held * packed_elements + first_step * step_elements;
    auto const in_tiles = [&](auto row_tiles) __attribute__((always_inline)) {
      constexpr int n = decltype(row_tiles)::value;
      for (int c = 0; c < columns / amx_block; ++c) {
        float* const to = out_of(p.block) + c * 2 * column_floats;
        fresh[p.block] ? zero_block<n>() : load_block<n>(to);
        tile_products<Parts<T>::outputs, parts, n>(left, right + c * packed_steps * step_elements, 2 * p.panels(),
                                                   beside);
        store_block<n>(to);
      }
    };
    p.two_tiles ? in_tiles(Constant<2>{}) : in_tiles(Constant<1>{});
    fresh[p.block] = false;
  }

  FLASHCORE_HD void compute_scores(const Pass& p, auto& beside) {
    const uint16_t* const left = queries + p.block * steps * step_elements;
    const uint16_t* const right = keys + p.held * packed_elements + p.span.begin / amx_block * steps * step_elements;
    auto const in_tiles = [&](auto row_tiles) __attribute__((always_inline)) {
      constexpr int n = decltype(row_tiles)::value;
      for (int i = 0; i < 2 * p.panels(); ++i) {
        zero_block<n>();
        tile_products<Parts<T>::scores, parts, n>(left, right + i * steps * step_elements, steps, beside);
        store_block<n>(p.scores + i * 2 * column_floats);
      }
    };
    p.two_tiles ? in_tiles(Constant<2>{}) : in_tiles(Constant<1>{});
  }

  float* out_of(int block) const { return out + block * amx_block * columns; }

  // Scores of a panel of keys, from key k of the tile on, are transformed, and those that a row does not see minus
  // infinity.
  void prepare_scores(const Pass& p, int k, float* s) {
    if constexpr (!Score::plain) {
      for (int c = 0; c < panel_vectors; ++c) {
        for (int i = 0; i < p.height(); ++i) {
          float* const at = s + c * column_floats + i * lanes;
          store(at, transform(score, load(at)));
        }
      }
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
    static_assert(panel_vectors == 4 && panel_width == 2 * tile_depth);
    Vec weight[panel_vectors];
#pragma GCC unroll 4
    for (int v = 0; v < panel_vectors; ++v) {
      weight[v] = (load(s + v * column_floats) - splat(offset)) * splat(factor);
    }
    exp2_of<rough>(weight);
    sum = sum + sum_of(weight);
    Atom::store_weights(w, {weight[0], weight[1]});
    Atom::store_weights(w + Atom::step_floats, {weight[2], weight[3]});
  }

  // Of sixteen rows' scores, `vectors` of each.
  static Vec largest_of(const float* s, int vectors) {
    Vec v[sixteen];
#pragma GCC unroll 1
    for (int i = 0; i < sixteen; ++i, s += lanes) {
      v[i] = load(s);
      for (int k = 1; k < vectors; ++k) v[i] = larger(load(s + k * column_floats), v[i]);
    }
    return across_each(v, [](Vec x, Vec y) { return larger(x, y); });
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
        if (params.lse) this->write_lse({state.max[row + i], state.sum[row + i]}, row + i);
      }
    }
  }
};

}  // namespace
}  // namespace flashcore::cpu

// SPDX-License-Identifier: Apache-2.0
// One tile of queries on the processor's tile registers: Forward's work (forward_isa.cc) with products of 32 x 32
// blocks.
#pragma once

#include "cpu/amx.h"
#include "cpu/amx_pack.h"

namespace flashcore::cpu {
namespace {

// 2^x to 3e-5 for x < 128, 0 below 2^-126 (as exp2_of). Of x the nearest multiple of 1/32 chooses a power from a table;
// what remains, at most 1/64, takes a straight line. While tile registers multiply, half of the processor's multiply-add
// units are theirs, so that additions and shuffles are to be preferred: three multiplies here, seven in exp2_of.
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
  for (int i = 0; i < n; ++i) shifted[i] = x[i] + shifter;
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
  // A vector more than what there is: rows of a power of two of bytes would fall into the same few sets of the cache.
  static constexpr int score_stride = keys_of_tile + lanes;
  static constexpr int weight_floats = Atom::in_place ? score_stride : keys_of_tile * Atom::key_bytes / 4 + lanes;
  static constexpr int largest_out = max_head_dim + lanes;
  static_assert(tile_q % amx_block == 0 && panel_width % amx_block == 0);

  int steps;            // of the head dimension
  int out_stride;       // head_dim in whole blocks, and a vector
  int packed_elements;  // of a packed tile of keys, or of values
  int held_tiles;       // tiles of keys that are packed at a time
  uint16_t* queries;    // [block of 32 rows][step][part][2 tiles]
  uint16_t* keys;       // [tile][32 keys][step][part][2 tiles]
  uint16_t* values;     // [tile][32 columns][32 keys][part][2 tiles]
  float* out;           // [row][out_stride]
  float* scores;        // [row of a block][score_stride]
  float* weights;       // [row of a block][weight_floats], or in the place of the scores
  T* gathered;          // [keys_of_tile][head_dim]: rows that lie in pages
  RowStates<tile_q> state;
  bool fresh[tile_q / amx_block];  // blocks that have no output yet

  ForwardTiles(const ForwardParams& p, const QueryTile& t, float* scratch)
      : Base(p, t),
        steps(ceil_div(p.head_dim, tile_depth)),
        out_stride(ceil_div(p.head_dim, amx_block) * amx_block + lanes) {
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
    out = take(tile_q * largest_out);
    scores = take(amx_block * score_stride);
    weights = Atom::in_place ? scores : take(amx_block * weight_floats);
    gathered = reinterpret_cast<T*>(at);
    constexpr int64_t floats = tile_q * max_head_dim * parts / 2 + tile_q * largest_out +
                               amx_block * (score_stride + weight_floats) + keys_of_tile * max_head_dim;
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
    // The keys that some of its rows see, in whole panels.
    int const begin = mask.first_key(query_of(row)) - first_key, end = mask.end_key(query_of(last)) - first_key;
    int const packed = packed_keys(first_key);
    if (end <= 0 || begin >= packed || begin >= end) return;
    Span const span = {max_of(begin, 0) / panel_width * panel_width,
                       min_of(ceil_div(end, panel_width) * panel_width, packed)};
    rows - row > tile_rows ? pass<2>(block, first_key, span, held) : pass<1>(block, first_key, span, held);
  }

  template <int row_tiles>
  void pass(int block, int first_key, Span span, int held) {
    int const row = block * amx_block;
    if (!weigh<row_tiles>(block, first_key, span, held)) weigh_anew<row_tiles>(block, first_key, span, held);

    int const first_step = span.begin / tile_depth;
    const char* const left = reinterpret_cast<const char*>(weights) + first_step * parts * 64;
    const uint16_t* const tile_values = values + held * packed_elements;
    for (int c = 0; c < out_stride - lanes; c += amx_block) {
      tile_outputs<T, row_tiles>(
          left, 4 * weight_floats,
          tile_values + (c / amx_block * (packed_keys(first_key) / tile_depth) + first_step) * step_elements,
          span.end / tile_depth - first_step, fresh[block], out + row * out_stride + c, out_stride);
    }
    fresh[block] = false;
  }

  // The first of the keys [k, k + 32) of the tile that a row sees, and the end of those.
  Span seen_of(int row, int first_key, int k) const {
    int const query = query_of(min_of(row, rows - 1));
    return {clamp_to(mask.first_key(query) - first_key - k, 0, amx_block),
            clamp_to(mask.end_key(query) - first_key - k, 0, amx_block)};
  }

  // Scores of the block with the 32 keys from k on, those that a row does not see minus infinity, at `to`.
  template <int row_tiles, typename Between>
  FLASHCORE_HD void scores_at(int block, int first_key, int k, int held, float* to, Between between) {
    tile_scores<T, row_tiles>(queries + block * steps * step_elements,
                              keys + held * packed_elements + k / amx_block * steps * step_elements, steps, to,
                              score_stride, between);
    int const row = block * amx_block;
    if constexpr (!Score::plain) {
      for (int i = 0; i < row_tiles * tile_rows; ++i) {
        float* const at = to + i * score_stride;
        for (int j = 0; j < amx_block; j += lanes) store(at + j, transform(score, load(at + j)));
      }
    }
    int const last = min_of(row + amx_block, rows) - 1;
    if (seen_of(last, first_key, k).begin == 0 && seen_of(row, first_key, k).end == amx_block) return;
    for (int i = 0; i < row_tiles * tile_rows; ++i) {
      Span const seen = seen_of(row + i, first_key, k);
      __mmask32 const unseen = ~(mask_of(seen.end) & ~mask_of(seen.begin));
      __m512 const nothing = _mm512_set1_ps(minus_infinity());
      float* const at = to + i * score_stride;
      _mm512_mask_storeu_ps(at, static_cast<__mmask16>(unseen), nothing);
      _mm512_mask_storeu_ps(at + lanes, static_cast<__mmask16>(unseen >> 16), nothing);
    }
  }

  // Weights of the rows [begin, end) of a block from the scores of 32 keys at `s`, to `w`; their sums are added.
  FLASHCORE_HD void weigh_rows(int begin, int end, const float* s, const float* offset, float* w,
                               Vec (&sums)[amx_block]) {
    static_assert(panel_vectors == 4);
    for (int i = begin; i < end; i += 2) {
      Vec weight[panel_vectors];
#pragma GCC unroll 4
      for (int v = 0; v < panel_vectors; ++v) {
        Vec const x = load(s + (i + v / 2) * score_stride + v % 2 * lanes);
        weight[v] = x * splat(score.factor) - splat(offset[i + v / 2]);
      }
      if constexpr (rough) {
        exp2_by_table(weight);
      } else {
        exp2_of(weight);
      }
#pragma GCC unroll 2
      for (int v = 0; v < 2; ++v) {
        Vec const two[2] = {weight[2 * v], weight[2 * v + 1]};
        sums[i + v] = sums[i + v] + (two[0] + two[1]);
        Atom::store_weights(w + (i + v) * weight_floats, two);
      }
    }
  }

  // The weights of a tile of keys by the offsets that the rows have, 32 keys at a time beside the products of the next.
  // Whether that will do: not where a row has no offset yet, or so small a one that its weights are too large.
  template <int row_tiles>
  bool weigh(int block, int first_key, Span span, int held) {
    constexpr int height = row_tiles * tile_rows;
    int const row = block * amx_block;
    if (fresh[block]) return false;
    Vec sums[amx_block] = {};
    float* const offset = state.max + row;
    int const rows_of_step = ceil_div(height / 2, steps) * 2;
    scores_at<row_tiles>(block, first_key, span.begin, held, scores + span.begin, [](int) {});
    for (int k = span.begin; k < span.end; k += amx_block) {
      const float* const s = scores + k;
      float* const w = weights + k * Atom::key_bytes / 4;
      if (k + amx_block == span.end) {
        weigh_rows(0, height, s, offset, w, sums);
      } else {
        scores_at<row_tiles>(block, first_key, k + amx_block, held, scores + k + amx_block, [&](int step) {
          weigh_rows(min_of(step * rows_of_step, height), min_of((step + 1) * rows_of_step, height), s, offset, w, sums);
        });
      }
    }
    for (int i = 0; i < height; i += tile_rows) {
      Vec const sum = across_each(reinterpret_cast<const Vec(&)[sixteen]>(sums[i]), [](Vec x, Vec y) { return x + y; });
      if (_mm512_cmp_ps_mask((__m512)sum, _mm512_set1_ps(0x1p64f), _CMP_NLT_UQ) != 0) return false;
      if (_mm512_cmp_ps_mask((__m512)load(offset + i), _mm512_set1_ps(minus_infinity()), _CMP_EQ_OQ) != 0) return false;
      store(sums_of_rows + i, sum);
    }
    for (int i = 0; i < height; ++i) state.sum[row + i] += sums_of_rows[i];
    return true;
  }
  float sums_of_rows[amx_block];

  // The same with offsets that take in the maxima of this tile; what the outputs so far become of it.
  template <int row_tiles>
  void weigh_anew(int block, int first_key, Span span, int held) {
    int const row = block * amx_block;
    for (int k = span.begin; k < span.end; k += amx_block) {
      scores_at<row_tiles>(block, first_key, k, held, scores + k, [](int) {});
    }
    for (int i = 0; i < row_tiles * tile_rows; i += tile_rows) {
      softmax(row + i, span, scores + i * score_stride, weights + i * weight_floats);
    }
  }

  void softmax(int row, Span span, float* s, float* w) {
    Vec const nothing = splat(minus_infinity());
    Vec v[sixteen];
    for (int i = 0; i < sixteen; ++i) {
      v[i] = nothing;
      for (int k = span.begin; k < span.end; k += 2 * lanes) {
        v[i] = larger(larger(load(s + i * score_stride + k), load(s + i * score_stride + k + lanes)), v[i]);
      }
    }
    Vec const largest = across_each(v, [](Vec x, Vec y) { return larger(x, y); });
    Vec const old = load(state.max + row);
    Vec const fresh_offset = larger(largest * splat(score.factor), old);
    Vec const offset = where_less(nothing, fresh_offset, fresh_offset, splat(0.0f));
    float offsets[sixteen], ratio[sixteen];
    store(offsets, offset);
    Vec const ratios = exp2_of(old - offset);
    store(ratio, ratios);
    Vec sums[amx_block] = {};
    for (int k = span.begin; k < span.end; k += amx_block) {
      weigh_rows(0, sixteen, s + k, offsets, w + k * Atom::key_bytes / 4, sums);
    }
    store(state.sum + row, load(state.sum + row) * ratios +
                               across_each(reinterpret_cast<const Vec(&)[sixteen]>(sums[0]), [](Vec x, Vec y) { return x + y; }));
    store(state.max + row, fresh_offset);
    if (fresh[row / amx_block]) return;
    unsigned changed = _mm512_cmp_ps_mask((__m512)load(ratio), (__m512)splat(1.0f), _CMP_NEQ_UQ);
    for (; changed != 0; changed &= changed - 1) {
      int const i = __builtin_ctz(changed);
      float* const to = out + (row + i) * out_stride;
      for (int c = 0; c < out_stride - lanes; c += lanes) store(to + c, load(to + c) * splat(ratio[i]));
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
        const float* const from = out + (row + i) * out_stride;
        for (int c = 0; c < params.head_dim; c += amx_block) {
          __m512 columns[2] = {(__m512)zero, (__m512)zero};
          if (!fresh[row / amx_block]) in_order(from + c, from + c + lanes, columns);
          __m512 const factor = _mm512_set1_ps(inverse[i]);
          Parts<T>::join(_mm512_mul_ps(columns[0], factor), _mm512_mul_ps(columns[1], factor), to + c,
                         params.head_dim - c);
        }
        if (params.lse) this->write_lse({state.max[row + i], state.sum[row + i]}, row + i, 0, 1.0f);
      }
    }
  }
};

}  // namespace
}  // namespace flashcore::cpu

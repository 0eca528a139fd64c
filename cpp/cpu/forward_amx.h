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
    bool const all_seen =
        mask.first_key(query_of(last)) - first_key <= span.begin && mask.end_key(query_of(row)) - first_key >= span.end;

    bool const two_tiles = rows - row > tile_rows;
    auto const scores_of = two_tiles ? tile_scores<T, 2> : tile_scores<T, 1>;
    auto const outputs_of = two_tiles ? tile_outputs<T, 2> : tile_outputs<T, 1>;
    const uint16_t* const tile_keys = keys + held * packed_elements;
    for (int k = span.begin; k < span.end; k += amx_block) {
      scores_of(queries + block * steps * step_elements, tile_keys + k / amx_block * steps * step_elements, steps,
                scores + k, score_stride);
    }

    for (int i = 0; i < (two_tiles ? amx_block : tile_rows); i += tile_rows) {
      float* const s = scores + i * score_stride;
      float* const w = weights + i * weight_floats;
      all_seen ? softmax<false>(row + i, first_key, span, s, w) : softmax<true>(row + i, first_key, span, s, w);
    }

    int const first_step = span.begin / tile_depth;
    const char* const left = reinterpret_cast<const char*>(weights) + first_step * parts * 64;
    const uint16_t* const tile_values = values + held * packed_elements;
    for (int c = 0; c < out_stride - lanes; c += amx_block) {
      outputs_of(left, 4 * weight_floats,
                 tile_values + (c / amx_block * (packed / tile_depth) + first_step) * step_elements,
                 span.end / tile_depth - first_step, fresh[block], out + row * out_stride + c, out_stride);
    }
    fresh[block] = false;
  }

  // The scores of sixteen rows become weights, and their outputs so far what the new maxima make of them.
  template <bool masked>
  void softmax(int row, int first_key, Span span, float* s, float* w) {
    int first[tile_rows], end[tile_rows];
    for (int i = 0; masked && i < tile_rows; ++i) {
      int const query = query_of(min_of(row + i, rows - 1));
      first[i] = clamp_to(mask.first_key(query) - first_key, 0, keys_of_tile);
      end[i] = clamp_to(mask.end_key(query) - first_key, 0, keys_of_tile);
    }
    constexpr bool rough = sizeof(T) == 2;
    float ratio[tile_rows];
    softmax_rows<masked, rough, Atom>(score, tile_rows, s, score_stride, reinterpret_cast<uint32_t*>(w), weight_floats,
                                      span, first, end, state.max + row, state.sum + row, ratio);
    if (fresh[row / amx_block]) return;
    // Where rows have a new maximum: of 16 tiles of random keys in three.
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
        if (params.lse) this->write_lse({state.max[row + i], state.sum[row + i]}, row + i);
      }
    }
  }
};

}  // namespace
}  // namespace flashcore::cpu

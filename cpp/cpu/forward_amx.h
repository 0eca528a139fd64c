// SPDX-License-Identifier: Apache-2.0
// One tile of queries on the processor's tile registers: Forward's work (forward_isa.cc) with products of 32 x 32 blocks.
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
  static constexpr int strip_blocks = 2;  // blocks of rows that pass over the packed keys together
  // A vector more than what there is: rows of a power of two of bytes would fall into the same few sets of the cache.
  static constexpr int score_stride = tile_k + lanes;
  static constexpr int weight_floats = Atom::in_place ? score_stride : tile_k * Atom::key_bytes / 4 + lanes;
  static constexpr int largest_out = max_head_dim + lanes;
  static_assert(tile_q % amx_block == 0 && panel_width % amx_block == 0);

  int steps;          // of the head dimension
  int out_stride;     // head_dim in whole blocks, and a vector
  uint16_t* queries;  // [block of 32 rows][step][part][2 tiles]
  uint16_t* keys;     // [32 keys][step][part][2 tiles]
  uint16_t* values;   // [32 columns][32 keys][part][2 tiles]
  float* out;         // [row][out_stride]
  float* scores;      // [row of the strip][score_stride]
  float* weights;     // [row of the strip][weight_floats], or in the place of the scores
  T* gathered;        // [tile_k][head_dim]: rows that lie in pages
  RowState state[tile_q];
  bool fresh[tile_q / amx_block];  // blocks that have no output yet
  int packed_keys = 0;             // keys of the packed tile, in whole panels

  ForwardTiles(const ForwardParams& p, const QueryTile& t, float* scratch)
      : Base(p, t),
        steps(ceil_div(p.head_dim, tile_depth)),
        out_stride(ceil_div(p.head_dim, amx_block) * amx_block + lanes) {
    float* at = scratch;
    auto const take = [&](int64_t floats) {
      float* const taken = at;
      at += floats;
      return taken;
    };
    constexpr int strip = strip_blocks * amx_block;
    queries = reinterpret_cast<uint16_t*>(take(tile_q * max_head_dim * parts / 2));
    keys = reinterpret_cast<uint16_t*>(take(tile_k * max_head_dim * parts / 2));
    values = reinterpret_cast<uint16_t*>(take(tile_k * max_head_dim * parts / 2));
    out = take(tile_q * largest_out);
    scores = take(strip * score_stride);
    weights = Atom::in_place ? scores : take(strip * weight_floats);
    gathered = reinterpret_cast<T*>(at);
    constexpr int64_t floats = (tile_q + 2 * tile_k) * max_head_dim * parts / 2 + tile_q * largest_out +
                               strip * (score_stride + weight_floats) + tile_k * max_head_dim;
    static_assert(floats <= scratch_floats);
  }

  // Returns whether it has written the result: not where products of parts are not those of the numbers.
  bool run() {
    TileRegisters const registers;
    KeyRange const range = mask.key_range(tile.q_begin, tile.q_begin + tile.queries, tile_k);
    const T* const array = static_cast<const T*>(params.q.data);
    if (!pack_tile_queries<T>([&](int row) { return array + offset_of(params.q, row); }, rows, params.head_dim,
                              queries)) {
      return false;
    }
    for (bool& block : fresh) block = true;
    for (int t = range.begin; t < range.end; ++t) {
      int const first_key = t * tile_k;
      if (!pack(first_key, min_of(tile_k, mask.seqlen_k - first_key))) return false;
      bool const whole = t >= range.full_begin && t < range.full_end;
      for (int row = 0; row < rows; row += strip_blocks * amx_block) {
        whole ? strip<false>(row, first_key) : strip<true>(row, first_key);
      }
    }
    write();
    return true;
  }

  bool pack(int first_key, int count) {
    packed_keys = ceil_div(count, panel_width) * panel_width;
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
      return pack_rows(from, stride, count, packed_keys, params.head_dim, to);
    };
    return packed(params.k, pack_tile_keys<T>, keys) && packed(params.v, pack_tile_values<T>, values);
  }

  // The keys of the packed tile, which begins at first_key, that some of `height` rows see: whole panels of them.
  template <bool masked>
  Span span_of(int row, int height, int first_key) const {
    if constexpr (!masked) return {0, tile_k};
    int const begin = mask.first_key(query_of(row)) - first_key;
    int const end = mask.end_key(query_of(min_of(row + height, rows) - 1)) - first_key;
    if (end <= 0 || begin >= packed_keys || begin >= end) return {0, 0};
    return {max_of(begin, 0) / panel_width * panel_width,
            min_of(ceil_div(end, panel_width) * panel_width, packed_keys)};
  }

  // Rows [row, row + 32 strip_blocks) with the packed tile of keys, which begins at first_key.
  template <bool masked>
  void strip(int row, int first_key) {
    Span span[strip_blocks];
    bool two_tiles[strip_blocks];  // of rows; else one
    int const count = min_of(ceil_div(rows - row, amx_block), strip_blocks);
    for (int b = 0; b < count; ++b) {
      two_tiles[b] = rows - row - b * amx_block > tile_rows;
      span[b] = span_of<masked>(row + b * amx_block, amx_block, first_key);
    }

    constexpr int step_elements = parts * 2 * tile_elements;
    for (int k = 0; k < packed_keys; k += amx_block) {
      for (int b = 0; b < count; ++b) {
        if (k < span[b].begin || k >= span[b].end) continue;
        (two_tiles[b] ? tile_scores<T, 2> : tile_scores<T, 1>)(
            queries + (row / amx_block + b) * steps * step_elements, keys + k / amx_block * steps * step_elements,
            steps, scores + b * amx_block * score_stride + k, score_stride);
      }
    }

    for (int b = 0; b < count; ++b) {
      if (span[b].begin == span[b].end) continue;
      for (int i = b * amx_block; i < min_of((b + 1) * amx_block, rows - row); ++i) {
        int const first = masked ? clamp_to(mask.first_key(query_of(row + i)) - first_key, 0, tile_k) : 0;
        int const end = masked ? clamp_to(mask.end_key(query_of(row + i)) - first_key, 0, tile_k) : tile_k;
        auto* const to = reinterpret_cast<uint32_t*>(weights + i * weight_floats);
        float const ratio =
            softmax_row<masked, Atom>(score, scores + i * score_stride, to, span[b], first, end, state[row + i]);
        // Where the row has a new maximum: of 16 tiles of random keys in three.
        if (ratio != 1.0f && !fresh[row / amx_block + b]) rescale(out + (row + i) * out_stride, ratio);
      }
    }

    int const tile_steps = packed_keys / tile_depth;
    for (int c = 0; c < out_stride - lanes; c += amx_block) {
      for (int b = 0; b < count; ++b) {
        if (span[b].begin == span[b].end) continue;
        int const first_step = span[b].begin / tile_depth;
        (two_tiles[b] ? tile_outputs<T, 2> : tile_outputs<T, 1>)(
            reinterpret_cast<const char*>(weights + b * amx_block * weight_floats) + first_step * parts * 64,
            4 * weight_floats, values + (c / amx_block * tile_steps + first_step) * step_elements,
            span[b].end / tile_depth - first_step, fresh[row / amx_block + b],
            out + (row + b * amx_block) * out_stride + c, out_stride);
      }
    }
    for (int b = 0; b < count; ++b) fresh[row / amx_block + b] &= span[b].begin == span[b].end;
  }

  void rescale(float* row, float ratio) const {
    for (int c = 0; c < out_stride - lanes; c += lanes) store(row + c, load(row + c) * splat(ratio));
  }

  void write() const {
    for (int row = 0; row < rows; ++row) {
      float* const from = out + row * out_stride;
      for (int c = 0; c < out_stride - lanes; c += amx_block) {
        if (fresh[row / amx_block]) {
          store(from + c, splat(0.0f));
          store(from + c + lanes, splat(0.0f));
        } else {
          in_order(from + c);
        }
      }
      this->write_row(from, {state[row].max, sum_across(state[row].sum)}, row);
    }
  }
};

}  // namespace
}  // namespace flashcore::cpu

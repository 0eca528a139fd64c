// SPDX-License-Identifier: Apache-2.0
// few_rows.h's products of bfloat16 on tile registers: keys are a left operand as they lie in memory, sixteen at a
// time, and values a right one once two of them are interleaved.
#pragma once

#include "cpu/amx.h"
#include "cpu/few_rows.h"

namespace flashcore::cpu {
namespace {

// Tiles 0 and 1 are scores of 16 keys and 4 rows, 2 is keys and 3 queries; 4 and 5 are outputs of 4 rows and 16
// columns, 6 weights and 7 values.
constexpr TileShapes few_shapes = {{16, 16, 16, 16, 4, 4, 4, 16}, {16, 16, 64, 16, 64, 64, 64, 64}};

// to[4 d + r] = rows[r · depth + d]: queries as the right operand.
FLASHCORE_HD void few_queries(const uint32_t* rows, int depth, uint32_t* to) {
  for (int d = 0; d < depth; ++d) {
    for (int r = 0; r < 4; ++r) to[4 * d + r] = rows[r * depth + d];
  }
}

// Scores of the first `count` keys, a multiple of 16: as few_scores.
template <typename Ahead>
FLASHCORE_HD void few_tile_scores(const uint32_t* queries, int head_dim, const BFloat* keys, int64_t stride, int count,
                                  float* scores, Ahead& ahead) {
  for (int k = 0; k < count; k += 2 * tile_rows) {
    bool const two = k + tile_rows < count;
    tile_zero<0>();
    tile_zero<1>();
    for (int d = 0; d < head_dim; d += tile_depth) {
      tile_load<3>(queries + 2 * d, 16);
      tile_load<2>(keys + k * stride + d, 2 * stride);
      tile_multiply_add<0, 2, 3>();
      if (!two) continue;
      tile_load<2>(keys + (k + tile_rows) * stride + d, 2 * stride);
      tile_multiply_add<1, 2, 3>();
    }
    for (int i = 0; i < (two ? 8 : 4); ++i) ahead();
    tile_store<0>(scores + 4 * k, 16);
    if (two) tile_store<1>(scores + 4 * (k + tile_rows), 16);
  }
}

// Lane k of the result: row r of the key k, of sixteen keys' weights.
FLASHCORE_HD __m512 row_of_weights(const __m512 (&weights)[4], int r) {
  __m512i const every_fourth = _mm512_add_epi32(
      _mm512_setr_epi32(0, 4, 8, 12, 16, 20, 24, 28, 0, 4, 8, 12, 16, 20, 24, 28), _mm512_set1_epi32(r));
  __m512 const low = _mm512_permutex2var_ps(weights[0], every_fourth, weights[1]);
  __m512 const high = _mm512_permutex2var_ps(weights[2], every_fourth, weights[3]);
  return _mm512_mask_blend_ps(0xff00, low, high);
}

// As few_outputs; of the weights those of `padded` keys are there.
template <typename Ahead>
FLASHCORE_HD void few_tile_outputs(const float* weights, int padded, const float* ratio, const BFloat* values,
                                   int64_t stride, int count, int head_dim, float* out, Ahead& ahead) {
  alignas(64) float sums[largest_row / amx_block][2][4][tile_columns];
  for (int k = 0; k < count; k += tile_depth) {
    alignas(64) uint32_t rows[4][tile_columns];
    __m512 low[4], high[4];
    for (int i = 0; i < 4; ++i) {
      low[i] = _mm512_loadu_ps(weights + 4 * k + i * lanes);
      high[i] =
          k + tile_rows < padded ? _mm512_loadu_ps(weights + 4 * (k + tile_rows) + i * lanes) : _mm512_setzero_ps();
    }
    for (int r = 0; r < 4; ++r) {
      __m512 const first = nearest_bfloat(row_of_weights(low, r)), second = nearest_bfloat(row_of_weights(high, r));
      _mm512_store_si512(rows[r], upper_halves(first, second));
    }
    tile_load<6>(rows, 64);
    for (int c = 0; c < head_dim; c += amx_block) {
      alignas(64) uint32_t interleaved[2][tile_rows][tile_columns];
      for (int i = 0; i < tile_rows; ++i) {
        ahead();
        // A key too many has the weight 0.
        __m512i const even = _mm512_loadu_si512(values + min_of(k + i, count - 1) * stride + c);
        __m512i const odd = _mm512_loadu_si512(values + min_of(k + tile_rows + i, count - 1) * stride + c);
        _mm512_store_si512(interleaved[0][i], _mm512_unpacklo_epi16(even, odd));
        _mm512_store_si512(interleaved[1][i], _mm512_unpackhi_epi16(even, odd));
      }
      auto& sum = sums[c / amx_block];
      if (k == 0) {
        tile_zero<4>();
        tile_zero<5>();
      } else {
        tile_load<4>(sum[0], 64);
        tile_load<5>(sum[1], 64);
      }
      tile_load<7>(interleaved[0], 64);
      tile_multiply_add<4, 6, 7>();
      tile_load<7>(interleaved[1], 64);
      tile_multiply_add<5, 6, 7>();
      tile_store<4>(sum[0], 64);
      tile_store<5>(sum[1], 64);
    }
  }
  for (int c = 0; c < head_dim; c += amx_block) {
    for (int r = 0; r < 4; ++r) {
      float* const to = out + r * head_dim + c;
      __m512 x[2];
      in_order(_mm512_load_ps(sums[c / amx_block][0][r]), _mm512_load_ps(sums[c / amx_block][1][r]), x);
      for (int i = 0; i < 2; ++i) store(to + i * lanes, load(to + i * lanes) * splat(ratio[r]) + (Vec)x[i]);
    }
  }
}

}  // namespace
}  // namespace flashcore::cpu

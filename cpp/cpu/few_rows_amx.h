// SPDX-License-Identifier: Apache-2.0
// few_rows.h's products of bfloat16 on tile registers, keys and values as they lie in memory. Sixteen keys are a left
// operand, four queries the right one. Values are a right operand whose rows are keys where others have pairs of them:
// its pairs are two columns, so that a row of weights is two of the left operand, (weight, 0) for the even columns and
// (0, weight) for the odd ones. Half of the products are with 0, and nothing is rearranged: with the stages of
// on_tiles() (forward_isa.cc) a thread takes in 44 GB/s from the second-level cache, where interleaving the values of
// two keys, a head after the other, came to 31. A value that is not finite makes NaN of the column beside it.
#pragma once

#include "cpu/amx.h"
#include "cpu/few_rows.h"

namespace flashcore::cpu {
namespace {

// Tiles 0 and 1 are scores of 16 keys and 4 rows, 2 is keys or values and 3 queries; 4 and 5 are outputs of 4 rows
// twice, 6 and 7 weights of 4 rows twice and 16 keys.
constexpr TileShapes few_shapes = {{16, 16, 16, 16, 8, 8, 8, 8}, {16, 16, 64, 16, 64, 64, 64, 64}};

// to[4 d + r] = rows[r · depth + d]: queries as the right operand.
FLASHCORE_HD void few_queries(const uint32_t* rows, int depth, uint32_t* to) {
  for (int d = 0; d < depth; ++d) {
    for (int r = 0; r < 4; ++r) to[4 * d + r] = rows[r * depth + d];
  }
}

// The rows from the k-th on, sixteen of which can be read: the last ones of `count` are copied and filled up with
// zeros.
class SixteenRows {
 public:
  const BFloat* at;
  int64_t stride;

  SixteenRows(const BFloat* rows, int64_t row_stride, int k, int count, int head_dim)
      : at(rows + k * row_stride), stride(row_stride) {
    if (k + tile_rows <= count) return;
    for (int i = 0; i < tile_rows; ++i) {
      for (int d = 0; d < head_dim; ++d) copy_[i * head_dim + d] = k + i < count ? at[i * stride + d] : BFloat{0};
    }
    at = copy_;
    stride = head_dim;
  }
  SixteenRows(const SixteenRows&) = delete;

 private:
  BFloat copy_[tile_rows * largest_row];
};

// As few_scores.
template <typename Ahead>
FLASHCORE_HD void few_tile_scores(const uint32_t* queries, int head_dim, const BFloat* keys, int64_t stride, int count,
                                  float* scores, Ahead& ahead) {
  for (int k = 0; k < count; k += 2 * tile_rows) {
    bool const two = k + tile_rows < count;
    SixteenRows const first(keys, stride, k, count, head_dim),
        second(keys, stride, two ? k + tile_rows : k, count, head_dim);
    tile_zero<0>();
    tile_zero<1>();
    for (int d = 0; d < head_dim; d += tile_depth) {
      tile_load<3>(queries + 2 * d, 16);
      tile_stream<2>(first.at + d, 2 * first.stride);
      tile_multiply_add<0, 2, 3>();
      ahead();
      if (!two) continue;
      tile_stream<2>(second.at + d, 2 * second.stride);
      tile_multiply_add<1, 2, 3>();
      ahead();
    }
    tile_store<0>(scores + 4 * k, 16);
    if (two) tile_store<1>(scores + 4 * (k + tile_rows), 16);
  }
}

// Of sixteen keys: of[4 k + r] as the left operand.
FLASHCORE_HD void few_tile_weights(const float* of, uint32_t* to) {
  __m512 const a = _mm512_loadu_ps(of), b = _mm512_loadu_ps(of + 16);
  __m512 const c = _mm512_loadu_ps(of + 32), d = _mm512_loadu_ps(of + 48);
  // Of each four lanes (a key of a vector) rows 0 and 1, and 2 and 3, of two vectors.
  __m512d const low[2] = {_mm512_castps_pd(_mm512_unpacklo_ps(a, b)), _mm512_castps_pd(_mm512_unpacklo_ps(c, d))};
  __m512d const high[2] = {_mm512_castps_pd(_mm512_unpackhi_ps(a, b)), _mm512_castps_pd(_mm512_unpackhi_ps(c, d))};
  __m512d const rows[4] = {_mm512_unpacklo_pd(low[0], low[1]), _mm512_unpackhi_pd(low[0], low[1]),
                           _mm512_unpacklo_pd(high[0], high[1]), _mm512_unpackhi_pd(high[0], high[1])};
  __m512i const in_order = _mm512_setr_epi32(0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15);
  for (int r = 0; r < 4; ++r) {
    __m512 const row = nearest_bfloat(_mm512_permutexvar_ps(in_order, _mm512_castpd_ps(rows[r])));
    _mm512_store_si512(to + 2 * r * lanes, _mm512_srli_epi32(_mm512_castps_si512(row), 16));
    _mm512_store_si512(to + (2 * r + 1) * lanes, _mm512_castps_si512(row));
  }
}

constexpr int few_tile_floats = 8 * tile_columns;  // of outputs of 4 rows and 32 columns

// out = ratio · out + weights · values, out as [32 columns][row, its even columns and its odd ones][16]. Weights are
// there for `count` keys filled up to whole sixteens.
template <typename Ahead>
FLASHCORE_HD void few_tile_outputs(const float* weights, const float* ratio, const BFloat* values, int64_t stride,
                                   int count, int head_dim, float* out, Ahead& ahead) {
  if (_mm512_cmp_ps_mask(_mm512_loadu_ps(ratio), _mm512_set1_ps(1.0f), _CMP_NEQ_UQ) != 0) {
    for (int i = 0; i < head_dim / amx_block * 8; ++i) {
      store(out + i * lanes, load(out + i * lanes) * splat(ratio[i % 8 / 2]));
    }
  }
  for (int k = 0; k < count; k += 2 * tile_rows) {
    bool const two = k + tile_rows < count;
    SixteenRows const first(values, stride, k, count, head_dim),
        second(values, stride, two ? k + tile_rows : k, count, head_dim);
    alignas(64) uint32_t left[2][8 * tile_columns];
    few_tile_weights(weights + 4 * k, left[0]);
    if (two) few_tile_weights(weights + 4 * (k + tile_rows), left[1]);
    tile_load<6>(left[0]);
    if (two) tile_load<7>(left[1]);
    auto const columns = [&](int c, auto tile) {
      constexpr int sum = decltype(tile)::value;
      float* const to = out + c / amx_block * few_tile_floats;
      tile_load<sum>(to);
      tile_stream<2>(first.at + c, 2 * first.stride);
      tile_multiply_add<sum, 6, 2>();
      ahead();
      if (two) {
        tile_stream<2>(second.at + c, 2 * second.stride);
        tile_multiply_add<sum, 7, 2>();
        ahead();
      }
      tile_store<sum>(to, 64);
    };
    for (int c = 0; c < head_dim; c += 2 * amx_block) {
      columns(c, Constant<4>{});
      if (c + amx_block < head_dim) columns(c + amx_block, Constant<5>{});
    }
  }
}

// The same outputs as rows, in their place.
FLASHCORE_HD void few_tile_rows(float* out, int head_dim) {
  float tiles[4 * largest_row];
  memcpy(tiles, out, sizeof(float) * 4 * head_dim);
  __m512i const low = _mm512_setr_epi32(0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5, 21, 6, 22, 7, 23);
  __m512i const high = _mm512_add_epi32(low, _mm512_set1_epi32(8));
  for (int c = 0; c < head_dim; c += amx_block) {
    for (int r = 0; r < 4; ++r) {
      const float* const from = tiles + c / amx_block * few_tile_floats + 2 * r * lanes;
      __m512 const even = _mm512_loadu_ps(from), odd = _mm512_loadu_ps(from + lanes);
      _mm512_storeu_ps(out + r * head_dim + c, _mm512_permutex2var_ps(even, low, odd));
      _mm512_storeu_ps(out + r * head_dim + c + lanes, _mm512_permutex2var_ps(even, high, odd));
    }
  }
}

}  // namespace
}  // namespace flashcore::cpu

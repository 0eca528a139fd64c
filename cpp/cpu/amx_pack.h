// SPDX-License-Identifier: Apache-2.0
// How queries, keys and values are laid out for products on tile registers. Rows that the tile has not, and elements
// that fill head dimensions up to a multiple of 32, are zeros. Each function returns what there is whose parts do not
// stand for it (Unfit).
#pragma once

#include "cpu/amx.h"
#include "cpu/pack.h"

namespace flashcore::cpu {
namespace {

// Rows [0, count), row_of(i) their places, as [block of 32][step of 32 elements][part][2 tiles of 16 rows].
template <typename T, typename RowOf>
unsigned pack_tile_queries(RowOf row_of, int count, int head_dim, uint16_t* to) {
  constexpr int parts = Parts<T>::count;
  int const steps = ceil_div(head_dim, tile_depth);
  unsigned unfit = 0;
  for (int row = 0; row < ceil_div(count, tile_rows) * tile_rows; ++row) {
    const T* const from = row < count ? row_of(row) : nullptr;
    uint16_t* at = to + (row / amx_block * steps * parts * 2 + row / tile_rows % 2) * tile_elements;
    at += row % tile_rows * tile_depth;
    for (int s = 0; s < steps; ++s, at += parts * 2 * tile_elements) {
      __m512i part[parts] = {};
      if (from) unfit |= Parts<T>::template split<Order::any>(from + s * tile_depth, head_dim - s * tile_depth, part);
      for (int i = 0; i < parts; ++i) _mm512_storeu_si512(at + i * 2 * tile_elements, part[i]);
    }
  }
  return unfit;
}

// Keys [0, count), filled up to `keys` of them (a multiple of 32), as [32 keys][step][part][2 tiles], a tile's row two
// elements of each of 16 keys.
template <typename T>
unsigned pack_tile_keys(const T* from, int64_t stride, int count, int keys, int head_dim, uint16_t* to) {
  constexpr int parts = Parts<T>::count;
  int const steps = ceil_div(head_dim, tile_depth);
  unsigned unfit = 0;
  for (int key = 0; key < keys; key += tile_columns) {
    uint16_t* at = to + (key / amx_block * steps * parts * 2 + key / tile_columns % 2) * tile_elements;
    for (int s = 0; s < steps; ++s, at += parts * 2 * tile_elements) {
      __m512i rows[parts][16];
#pragma GCC unroll 16
      for (int k = 0; k < tile_columns; ++k) {
        __m512i part[parts] = {};
        if (key + k < count) {
          unfit |= Parts<T>::template split<Order::any>(from + (key + k) * stride + s * tile_depth,
                                                        head_dim - s * tile_depth, part);
        }
        for (int i = 0; i < parts; ++i) rows[i][k] = part[i];
      }
      for (int i = 0; i < parts; ++i)
        transpose_sixteen(rows[i], reinterpret_cast<uint32_t*>(at + i * 2 * tile_elements), tile_columns);
    }
  }
  return unfit;
}

// Values [0, count), filled up to `keys` of them, as [32 columns][32 keys][part][2 tiles], a tile's row the keys i and
// 16 + i of 16 columns: of each eight the lower four in the first tile, the upper four in the second (in_order puts
// them back).
template <typename T>
unsigned pack_tile_values(const T* from, int64_t stride, int count, int keys, int head_dim, uint16_t* to) {
  constexpr int parts = Parts<T>::count;
  int const blocks = ceil_div(head_dim, amx_block), steps = keys / tile_depth;
  unsigned unfit = 0;
  for (int s = 0; s < steps; ++s) {
    for (int i = 0; i < tile_rows; ++i) {
      int const key = s * tile_depth + i, other = key + tile_rows;
      for (int c = 0; c < blocks; ++c) {
        uint16_t* const at = to + (c * steps + s) * parts * 2 * tile_elements + i * tile_depth;
        __m512i low[parts] = {}, high[parts] = {};
        const T* const column = from + c * amx_block;
        if (key < count)
          unfit |= Parts<T>::template split<Order::kept>(column + key * stride, head_dim - c * amx_block, low);
        if (other < count)
          unfit |= Parts<T>::template split<Order::kept>(column + other * stride, head_dim - c * amx_block, high);
        for (int j = 0; j < parts; ++j) {
          _mm512_storeu_si512(at + 2 * j * tile_elements, _mm512_unpacklo_epi16(low[j], high[j]));
          _mm512_storeu_si512(at + (2 * j + 1) * tile_elements, _mm512_unpackhi_epi16(low[j], high[j]));
        }
      }
    }
  }
  return unfit;
}

}  // namespace
}  // namespace flashcore::cpu

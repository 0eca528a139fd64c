// SPDX-License-Identifier: Apache-2.0
// How queries, keys and values are laid out for products on tile registers. Rows that the tile has not, and elements
// that fill head dimensions up to a multiple of 32, are zeros. Each function returns what it has seen of what is unfit.
#pragma once

#include "cpu/amx.h"
#include "cpu/pack.h"

namespace flashcore::cpu {
namespace {

// Rows [0, count), row_of(i) their places, as [block of 32][step of 32 elements][part][2 tiles of 16 rows].
template <typename T, typename RowOf>
typename Parts<T>::Seen pack_tile_queries(RowOf row_of, int count, int head_dim, uint16_t* to) {
  constexpr int parts = Parts<T>::count;
  int const steps = ceil_div(head_dim, tile_depth);
  typename Parts<T>::Seen seen;
  for (int first = 0; first < count; first += tile_rows) {
    int const present = min_of(tile_rows, count - first);
    const T* from[tile_rows];
    for (int i = 0; i < present; ++i) from[i] = row_of(first + i);
    uint16_t* at = to + (first / amx_block * steps * parts * 2 + first / tile_rows % 2) * tile_elements;
    auto const pack = [&](auto whole) {
      for (int s = 0; s < steps; ++s, at += parts * 2 * tile_elements) {
        __mmask32 const mask = mask_of(head_dim - s * tile_depth);
        for (int i = 0; i < tile_rows; ++i) {
          __m512i part[parts] = {};
          if (decltype(whole)::value || i < present) {
            Parts<T>::split(from[i] + s * tile_depth, mask, part, seen, i);
          }
          for (int j = 0; j < parts; ++j) _mm512_storeu_si512(at + j * 2 * tile_elements + i * tile_depth, part[j]);
        }
      }
    };
    present == tile_rows ? pack(Constant<1>{}) : pack(Constant<0>{});
    seen.end_rows();
  }
  return seen;
}

// Brings rows [begin, end), of which there are `count`, into the second-level cache: the processor looks ahead only so
// far, and what it does with some rows' elements keeps it from the next rows. (8 heads of 512 keys from the last-level
// cache, in all: 4% shorter with 128 columns of bfloat16, 11% with 64 of float16, which takes more to pack.)
template <typename T>
FLASHCORE_HD void fetch_rows(const T* rows, int64_t stride, int begin, int end, int count, int head_dim) {
  for (int i = begin; i < min_of(end, count); ++i) {
    const char* const row = reinterpret_cast<const char*>(rows + i * stride);
    for (int at = 0; at < head_dim * static_cast<int>(sizeof(T)); at += 64) fetch(row + at);
  }
}

// Keys [0, count), filled up to `keys` of them (a multiple of 32), as [32 keys][step][part][2 tiles], a tile's row two
// elements of each of 16 keys.
template <typename T>
typename Parts<T>::Seen pack_tile_keys(const T* from, int64_t stride, int count, int keys, int head_dim, uint16_t* to) {
  constexpr int parts = Parts<T>::count;
  int const steps = ceil_div(head_dim, tile_depth);
  typename Parts<T>::Seen seen;
  for (int key = 0; key < keys; key += tile_columns) {
    fetch_rows(from, stride, key + tile_columns, key + 2 * tile_columns, count, head_dim);
    uint16_t* at = to + (key / amx_block * steps * parts * 2 + key / tile_columns % 2) * tile_elements;
    for (int s = 0; s < steps; ++s, at += parts * 2 * tile_elements) {
      __mmask32 const mask = mask_of(head_dim - s * tile_depth);
      __m512i rows[parts][16];
#pragma GCC unroll 16
      for (int k = 0; k < tile_columns; ++k) {
        __m512i part[parts] = {};
        if (key + k < count) {
          Parts<T>::split(from + (key + k) * stride + s * tile_depth, mask, part, seen, k);
        }
        for (int i = 0; i < parts; ++i) rows[i][k] = part[i];
      }
      for (int i = 0; i < parts; ++i)
        transpose_sixteen(rows[i], reinterpret_cast<uint32_t*>(at + i * 2 * tile_elements), tile_columns);
    }
    seen.end_rows();
  }
  return seen;
}

// Which two of 32 keys stand side by side in the i-th row of a packed tile of values, as their weights do: where those
// are packed by the processor's instruction (FixedPoint), which takes four of each vector by turns, two
// neighbours; else one from each half.
template <typename T>
constexpr int first_of_pair(int i) {
  return Parts<T>::fixed_point ? i / 4 * 4 + i % 2 * 2 + (i % 4 >= 2 ? 16 : 0) : i;
}

// Values [0, count), filled up to `keys` of them, as [32 columns][32 keys][part][2 tiles], a tile's row a pair of keys
// in 16 columns: of each eight, in the order of split(), the lower four in the first tile, the upper four in the second
// (join() puts them back).
template <typename T>
typename Parts<T>::Seen pack_tile_values(const T* from, int64_t stride, int count, int keys, int head_dim,
                                         uint16_t* to) {
  constexpr int parts = Parts<T>::count;
  int const blocks = ceil_div(head_dim, amx_block), steps = keys / tile_depth;
  typename Parts<T>::Seen seen;
  auto const pack = [&](int s, auto whole) {
    fetch_rows(from, stride, (s + 1) * tile_depth, (s + 2) * tile_depth, count, head_dim);
    for (int c = 0; c < blocks; ++c) {
      __mmask32 const mask = mask_of(head_dim - c * amx_block);
      const T* const column = from + c * amx_block;
      uint16_t* at = to + (c * steps + s) * parts * 2 * tile_elements;
      for (int i = 0; i < tile_rows; ++i, at += tile_depth) {
        int const key = s * tile_depth + first_of_pair<T>(i), other = key + (Parts<T>::fixed_point ? 1 : tile_rows);
        __m512i low[parts] = {}, high[parts] = {};
        if (decltype(whole)::value || key < count) {
          Parts<T>::split(column + key * stride, mask, low, seen, i);
        }
        if (decltype(whole)::value || other < count) {
          Parts<T>::split(column + other * stride, mask, high, seen, i);
        }
        for (int j = 0; j < parts; ++j) {
          _mm512_storeu_si512(at + 2 * j * tile_elements, _mm512_unpacklo_epi16(low[j], high[j]));
          _mm512_storeu_si512(at + (2 * j + 1) * tile_elements, _mm512_unpackhi_epi16(low[j], high[j]));
        }
      }
    }
  };
  for (int s = 0; s < steps; ++s) (s + 1) * tile_depth <= count ? pack(s, Constant<1>{}) : pack(s, Constant<0>{});
  seen.end_rows();
  return seen;
}

}  // namespace
}  // namespace flashcore::cpu

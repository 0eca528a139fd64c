// SPDX-License-Identifier: Apache-2.0
// How a tile of queries, keys or values is laid out for the atoms: in panels as wide as a register block, each step of
// the inner dimension beside the next. Rows that the tile has not are zeros, so that what lies behind them in memory
// never matters.
#pragma once

#include "cpu/atoms.h"

namespace flashcore::cpu {
namespace {

constexpr int largest_row = 256;  // elements of the largest head dimension

// Brings the line at `p` into the second-level cache.
FLASHCORE_HD void fetch([[maybe_unused]] const void* p) {
#if defined(__GNUC__)
  __builtin_prefetch(p, 0, 2);
#endif
}

// A row as an atom's lanes, `depth` of them: elements widened to float32, or pairs of bfloat16 as they are. float32
// rows are used where they lie; others go through `room`.
template <typename Atom>
struct Row;

template <>
struct Row<FloatAtom> {
  FLASHCORE_HD static const float* lanes_of(const float* row, int /*head_dim*/, float* /*room*/) { return row; }
  template <typename T>
  FLASHCORE_HD static const float* lanes_of(const T* row, int head_dim, float* room) {
    widen(row, head_dim, room);
    return room;
  }
};

#if defined(__AVX512BF16__)
template <>
struct Row<BFloatAtom> {
  FLASHCORE_HD static const uint32_t* lanes_of(const BFloat* row, int head_dim, uint32_t* room) {
    room[(head_dim - 1) / 2] = 0;  // an odd dimension's last pair
    memcpy(room, row, static_cast<size_t>(head_dim) * 2);
    return room;
  }
};
#endif

// to[d · stride + i] = rows[i][d] for four rows.
template <typename Lane>
FLASHCORE_HD void transpose_four(const Lane* const (&rows)[4], int depth, Lane* to, int stride) {
  int d = 0;
#if defined(__GNUC__)
  typedef uint32_t Four __attribute__((vector_size(16)));
  typedef uint32_t FourUnaligned __attribute__((vector_size(16), aligned(4), may_alias));
  for (; d + 4 <= depth; d += 4) {
    Four x[4];
#pragma GCC unroll 4
    for (int i = 0; i < 4; ++i) x[i] = *reinterpret_cast<const FourUnaligned*>(rows[i] + d);
    Four const a = __builtin_shufflevector(x[0], x[1], 0, 4, 1, 5);  // 00 10 01 11
    Four const b = __builtin_shufflevector(x[2], x[3], 0, 4, 1, 5);
    Four const c = __builtin_shufflevector(x[0], x[1], 2, 6, 3, 7);
    Four const e = __builtin_shufflevector(x[2], x[3], 2, 6, 3, 7);
    Lane* const out = to + d * stride;
    *reinterpret_cast<FourUnaligned*>(out) = __builtin_shufflevector(a, b, 0, 1, 4, 5);
    *reinterpret_cast<FourUnaligned*>(out + stride) = __builtin_shufflevector(a, b, 2, 3, 6, 7);
    *reinterpret_cast<FourUnaligned*>(out + 2 * stride) = __builtin_shufflevector(c, e, 0, 1, 4, 5);
    *reinterpret_cast<FourUnaligned*>(out + 3 * stride) = __builtin_shufflevector(c, e, 2, 3, 6, 7);
  }
#endif
  for (; d < depth; ++d) {
    for (int i = 0; i < 4; ++i) to[d * stride + i] = rows[i][d];
  }
}

#if defined(__AVX512F__) && defined(__GNUC__)
// to[j · stride + i] = dword j of rows[i].
FLASHCORE_HD void transpose_sixteen(const __m512i (&rows)[16], uint32_t* to, int stride) {
  __m512i a[16], b[16];
#pragma GCC unroll 8
  for (int i = 0; i < 16; i += 2) {
    a[i] = _mm512_unpacklo_epi32(rows[i], rows[i + 1]);
    a[i + 1] = _mm512_unpackhi_epi32(rows[i], rows[i + 1]);
  }
#pragma GCC unroll 4
  for (int i = 0; i < 16; i += 4) {  // b[i + j]: of rows i to i + 3 the dwords j, 4 + j, 8 + j and 12 + j
    b[i] = _mm512_unpacklo_epi64(a[i], a[i + 2]);
    b[i + 1] = _mm512_unpackhi_epi64(a[i], a[i + 2]);
    b[i + 2] = _mm512_unpacklo_epi64(a[i + 1], a[i + 3]);
    b[i + 3] = _mm512_unpackhi_epi64(a[i + 1], a[i + 3]);
  }
#pragma GCC unroll 4
  for (int j = 0; j < 4; ++j) {
    __m512i const low = _mm512_shuffle_i32x4(b[j], b[4 + j], 0x88);  // dwords j and 8 + j of rows 0 to 7
    __m512i const high = _mm512_shuffle_i32x4(b[8 + j], b[12 + j], 0x88);
    __m512i const odd_low = _mm512_shuffle_i32x4(b[j], b[4 + j], 0xdd);  // 4 + j and 12 + j
    __m512i const odd_high = _mm512_shuffle_i32x4(b[8 + j], b[12 + j], 0xdd);
    _mm512_storeu_si512(to + stride * j, _mm512_shuffle_i32x4(low, high, 0x88));
    _mm512_storeu_si512(to + stride * (8 + j), _mm512_shuffle_i32x4(low, high, 0xdd));
    _mm512_storeu_si512(to + stride * (4 + j), _mm512_shuffle_i32x4(odd_low, odd_high, 0x88));
    _mm512_storeu_si512(to + stride * (12 + j), _mm512_shuffle_i32x4(odd_low, odd_high, 0xdd));
  }
}
#endif

// Keys [0, count) as panels of panel_width keys: to[panel][d][key].
template <typename Atom, typename T>
void pack_keys(const T* keys, int64_t stride, int count, int head_dim, typename Atom::Lane* to) {
  using Lane = typename Atom::Lane;
  static constexpr Lane zeros[largest_row] = {};
  int const depth = ceil_div(head_dim, Atom::depth);
#if defined(__AVX512F__) && defined(__GNUC__)
  Lane room[sixteen][largest_row];
  for (int k = 0; k < ceil_div(count, panel_width) * panel_width; k += sixteen) {
    const Lane* rows[sixteen];
    for (int i = 0; i < sixteen; ++i) {
      rows[i] = k + i < count ? Row<Atom>::lanes_of(keys + (k + i) * stride, head_dim, room[i]) : zeros;
    }
    Lane* const panel = to + k / panel_width * panel_width * depth + k % panel_width;
    for (int d = 0; d < depth; d += sixteen) {
      __mmask16 const present = static_cast<__mmask16>((1u << min_of(sixteen, depth - d)) - 1);
      __m512i x[sixteen];
#pragma GCC unroll 16
      for (int i = 0; i < sixteen; ++i) x[i] = _mm512_maskz_loadu_epi32(present, rows[i] + d);
      if (depth - d >= sixteen) {
        transpose_sixteen(x, reinterpret_cast<uint32_t*>(panel + d * panel_width), panel_width);
      } else {
        uint32_t last[sixteen * sixteen];
        transpose_sixteen(x, last, sixteen);
        for (int j = 0; j < depth - d; ++j) memcpy(panel + (d + j) * panel_width, last + j * sixteen, 4 * sixteen);
      }
    }
  }
#else
  Lane room[4][largest_row];
  for (int panel = 0; panel < count; panel += panel_width, to += panel_width * depth) {
    for (int k = 0; k < panel_width; k += 4) {
      const Lane* rows[4];
      for (int i = 0; i < 4; ++i) {
        int const key = panel + k + i;
        rows[i] = key < count ? Row<Atom>::lanes_of(keys + key * stride, head_dim, room[i]) : zeros;
      }
      transpose_four(rows, depth, to + k, panel_width);
    }
  }
#endif
}

// Values [0, count), filled with zeros to whole panels of keys, as panels of panel_width columns (the last as narrow as
// whole vectors allow): to[panel][key][column].
template <typename Atom, typename T>
void pack_values(const T* values, int64_t stride, int count, int head_dim, float* to) {
  int const columns = ceil_div(head_dim, lanes) * lanes;
  int const keys = ceil_div(count, panel_width) * panel_width;
  int const whole = head_dim / panel_width * panel_width;
  for (int k = 0; k < count; ++k) {
    const T* const row = values + k * stride;
    float* panel = to;
    for (int c = 0; c < whole; c += panel_width) {
      widen(row + c, panel_width, panel + k * panel_width);
      panel += keys * panel_width;
    }
    int const width = columns - whole;
    widen(row + whole, head_dim - whole, panel + k * width);
    for (int d = head_dim - whole; d < width; ++d) panel[k * width + d] = 0.0f;
  }
  for (int c = 0; c < columns; c += panel_width) {
    int const width = min_of(panel_width, columns - c);
    for (int i = count * width; i < keys * width; ++i) to[keys * c + i] = 0.0f;
  }
}

#if defined(__AVX512BF16__)
// The same with two keys in a lane: to[panel][key / 2][column][key % 2].
template <typename Atom>
void pack_values(const BFloat* values, int64_t stride, int count, int head_dim, uint32_t* to) {
  static constexpr BFloat zeros[largest_row] = {};
  int const columns = ceil_div(head_dim, lanes) * lanes;
  int const pairs = ceil_div(count, panel_width) * panel_width / 2;
  for (int pair = 0; pair < pairs; ++pair) {
    const BFloat* const even = 2 * pair < count ? values + 2 * pair * stride : zeros;
    const BFloat* const odd = 2 * pair + 1 < count ? values + (2 * pair + 1) * stride : zeros;
    for (int c = 0; c < columns; c += panel_width) {
      int const width = min_of(panel_width, columns - c);
      uint32_t* const panel = to + pairs * c + pair * width;
      for (int v = 0; v < width; v += lanes) {
        int const present = clamp_to(head_dim - c - v, 0, lanes);
        __mmask16 const mask = static_cast<__mmask16>((1u << present) - 1);
        __m512i const low = _mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(mask, even + c + v));
        __m512i const high = _mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(mask, odd + c + v));
        _mm512_storeu_si512(panel + v, _mm512_or_si512(low, _mm512_slli_epi32(high, 16)));
      }
    }
  }
}
#endif

}  // namespace
}  // namespace flashcore::cpu

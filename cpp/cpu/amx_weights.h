// SPDX-License-Identifier: Apache-2.0
// How scores become weights, the left operand of products with values, while tile registers are at other products.
#pragma once

#include "cpu/amx.h"

namespace flashcore::cpu {
namespace {

// Weights in bfloat16 by whole numbers: ten instructions for 32 of them, where the polynomial and the rounding take 24.
// A weight is 2^(x - 24) for an exponent x relative to the row's reference, so that weights of up to 2^24 times the
// reference's are below 1. The score times 512 / ln 2 and so on, in one multiply-add with fixed_point_offset(), is a
// float whose last bit is 2^-9; less the bits of `fixed_point_zero` it is a whole number: seven bits of exponent, of
// which the reference's is 103 = 127 - 24, and nine of a fraction f. 2^f - 1 is f less a correction of up to 0.086,
// from a table by f's upper six bits (to 0.3%, of the rounding's 0.4%), and the upper seven bits of what remains are
// bfloat16's fraction. What is below 2^-103 times the reference's is 0; what is too large is 65535 and so above
// `largest_weight`. NaN may be 0: where scores may be, the weights are made by the polynomial.
constexpr int fixed_point_exponent = 24;
constexpr float fixed_point_scale = 512.0f;
constexpr float fixed_point_one = 12582912.0f;  // 1.5 · 2^23
constexpr int32_t fixed_point_zero = 0x4b400000;
constexpr uint16_t largest_weight = 127 << 7;  // bits of 1

// What the multiply-add adds, for a reference whose exponent is not yet relative to itself: half a unit of bfloat16's
// last place in it, which rounds.
FLASHCORE_HD float fixed_point_offset(float exponent_of_reference) {
  return (127 - fixed_point_exponent) * fixed_point_scale + 2.0f + fixed_point_one -
         exponent_of_reference * fixed_point_scale;
}

// 512 (1 + f - 2^f) for the upper six bits of f (without the rounding's 2 / 512). The first, 1, is 0: so 0 stays 0.
alignas(64) constexpr uint8_t fixed_point_corrections[64] = {
    0,  3,  5,  8,  10, 12, 14, 16, 18, 20, 22, 24, 25, 27, 28, 30, 31, 33, 34, 35, 36, 37,
    38, 39, 40, 41, 42, 42, 43, 43, 43, 44, 44, 44, 44, 44, 44, 44, 43, 43, 42, 42, 41, 40,
    39, 38, 37, 36, 35, 33, 32, 30, 28, 27, 25, 23, 21, 18, 16, 14, 11, 8,  5,  2};

// What FixedPoint needs, in registers: the compiler would make some of it anew each time, by the unit that
// permutes.
struct FixedPoint {
  __m512i zero = _mm512_set1_epi32(fixed_point_zero);
  __m512i corrections = _mm512_load_si512(fixed_point_corrections);
  __m512 scale;  // 512 times the scores' factor
  __mmask64 low_bytes = 0x5555555555555555u;

  FLASHCORE_HD explicit FixedPoint(float factor) : scale(_mm512_set1_ps(factor * fixed_point_scale)) {
    asm("" : "+v"(zero), "+v"(corrections), "+v"(scale), "+k"(low_bytes));
  }

  // Of 32 scores, in the order of first_of_pair().
  FLASHCORE_HD __m512i weights(__m512 low, __m512 high, __m512 offset) const {
    __m512i const first = _mm512_castps_si512(_mm512_fmadd_ps(low, scale, offset));
    __m512i const second = _mm512_castps_si512(_mm512_fmadd_ps(high, scale, offset));
    __m512i const x = _mm512_packus_epi32(_mm512_sub_epi32(first, zero), _mm512_sub_epi32(second, zero));
    __m512i const correction = _mm512_maskz_permutexvar_epi8(low_bytes, _mm512_srli_epi16(x, 3), corrections);
    return _mm512_srli_epi16(_mm512_sub_epi16(x, correction), 2);
  }
};

// The exponents of weights, those of the polynomial. `offset` is offset_for() the row's reference. Where they must be
// exactly 0 for the reference itself, the difference comes first; else one instruction does both.
template <typename T>
FLASHCORE_HD float offset_for(float reference, float factor) {
  if (reference == minus_infinity()) reference = 0.0f;
  if constexpr (Parts<T>::fixed_point) return fixed_point_offset(reference * factor);
  return Parts<T>::exact_at_reference ? reference : -(reference * factor);
}
// Of sixteen rows that have a reference.
template <typename T>
FLASHCORE_HD Vec offsets_for(Vec references, float factor) {
  if constexpr (Parts<T>::fixed_point)
    return splat(fixed_point_offset(0.0f)) - references * splat(factor) * splat(fixed_point_scale);
  return Parts<T>::exact_at_reference ? references : references * splat(-factor);
}
template <typename T>
FLASHCORE_HD Vec exponents(Vec scores, float factor, float offset) {
  if constexpr (Parts<T>::fixed_point) {
    return scores * splat(factor) +
           splat((offset - fixed_point_offset(0.0f)) / fixed_point_scale - fixed_point_exponent);
  } else if constexpr (Parts<T>::exact_at_reference) {
    return (scores - splat(offset)) * splat(factor);
  } else {
    return scores * splat(factor) + splat(offset);
  }
}

// Weights as the second product's left operand, [32 keys][part][2 tiles of 16 rows]; side by side the keys of
// first_of_pair().
template <typename T>
struct TileAtom {
  static constexpr int parts = Parts<T>::count;
  static constexpr int step_floats = parts * 2 * tile_bytes / 4;  // weights of 32 keys

  // Of a row and 32 keys, at `to`.
  FLASHCORE_HD static void store_weights(float* to, const Vec (&weights)[2]) {
    __m512i part[parts];
    Parts<T>::split_weights((__m512)weights[0], (__m512)weights[1], part);
#pragma GCC unroll 3
    for (int i = 0; i < parts; ++i) _mm512_storeu_si512(to + i * 2 * tile_floats, part[i]);
  }
};

// The weights of a unit, `each` rows at a call. All that it needs is in itself: products are said to change memory,
// and what lies there would be read again after each.
template <typename T>
struct WeightsBeside {
  using Atom = TileAtom<T>;
  static constexpr bool fixed_point = Parts<T>::fixed_point;

  float factor;
  const float* s = nullptr;
  const float* offset = nullptr;
  const float* exact_offset = nullptr;
  float* w = nullptr;
  const float* sums_before = nullptr;  // the sums of the rows so far,
  float* sums = nullptr;               // and with these weights
  float* exact = nullptr;              // or null
  int64_t row = 0, rows = 0;
  int64_t each = 0;  // rows of a call; if `fixed_point` a power of two
  bool slowly = false;
  uint32_t wide = 0;
  __m512i largest = _mm512_setzero_si512();  // of a pass, lane by lane, if `fixed_point`
  FixedPoint const fixed;

  FLASHCORE_HD explicit WeightsBeside(float factor_of_scores) : factor(factor_of_scores), fixed(factor_of_scores) {}

  // Without a loop for up to 4 rows: its end would be hard to foretell.
  FLASHCORE_HD void operator()() {
    if (row >= rows) return;
    if (fixed_point && slowly) return rest_slowly(row + each);
    int64_t const n = fixed_point ? each : min_of(each, rows - row);
    weigh();
    if (n == 1) return;
    weigh();
    if (n == 2) return;
    weigh();
    if (!fixed_point && n == 3) return;
    weigh();
    for (int64_t i = 4; i < n; ++i) weigh();
  }
  FLASHCORE_HD void rest() {
    if (fixed_point && slowly) return rest_slowly(rows);
    while (row < rows) weigh();
  }

#if defined(__SANITIZE_ADDRESS__) || defined(__SANITIZE_THREAD__)
  __attribute__((noinline))  // in a dozen places with checks GCC 12 takes minutes over it
#else
  FLASHCORE_HD
#endif
  void weigh() {
    int64_t const at = row * lanes;
    if constexpr (fixed_point) {
      __m512i const weights =
          fixed.weights((__m512)load(s + at), (__m512)load(s + at + column_floats), (__m512)splat(offset[row]));
      largest = _mm512_max_epu16(largest, weights);
      _mm512_storeu_si512(w + at, weights);
    } else {
      Vec x[2] = {load(s + at), load(s + at + column_floats)};
      for (Vec& v : x) v = exponents<T>(v, factor, offset[row]);
      exp2_in_range(Parts<T>::exp2_terms, x);
      Atom::store_weights(w + at, x);
      store(sums + at, load(sums_before + at) + (x[0] + x[1]));
    }
    ++row;
  }

  FLASHCORE_HD void rest_slowly(int64_t end) {
    if (row < end) largest = weigh_slowly(*this, end);
    row = end;
  }

  // The same where rows are `wide`, or also exactly. Returns the largest weights. (A copy: the fields stay in
  // registers.)
  __attribute__((noinline)) static __m512i weigh_slowly(WeightsBeside b, int64_t end) {
    for (int64_t at = b.row * lanes; b.row < end; ++b.row, at += lanes) {
      Vec const scores[2] = {load(b.s + at), load(b.s + at + column_floats)};
      if (b.wide >> b.row & 1) {
        Vec x[2];
        for (int i = 0; i < 2; ++i) x[i] = exponents<T>(scores[i], b.factor, b.offset[b.row]);
        exp2_in_range(Parts<T>::exp2_terms, x);
        Atom::store_weights(b.w + at, x);
      } else {
        _mm512_storeu_si512(b.w + at,
                            b.fixed.weights((__m512)scores[0], (__m512)scores[1], (__m512)splat(b.offset[b.row])));
      }
      b.largest = _mm512_max_epu16(b.largest, _mm512_loadu_si512(b.w + at));
      if (!b.exact) continue;
      Vec y[2];
      for (int i = 0; i < 2; ++i) y[i] = scores[i] * splat(b.factor) + splat(b.exact_offset[b.row]);
      exp2_in_range(Parts<Half>::exp2_terms, y);
      store(b.exact + at, load(b.exact + at) + (y[0] + y[1]));
    }
    return b.largest;
  }
};

}  // namespace
}  // namespace flashcore::cpu

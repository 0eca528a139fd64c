// SPDX-License-Identifier: Apache-2.0
// The element types float16 and bfloat16 on the processor: their conversion to and from float32, one and many at a
// time. Exact for subnormals, infinities and NaN, and rounding to nearest even, whatever the instruction set.
#pragma once

#include <cstdint>
#include <cstring>

#include "attention/portable.h"

#if defined(__F16C__) || defined(__AVX512F__) || (defined(_MSC_VER) && defined(__AVX2__))
#include <immintrin.h>
#define FLASHCORE_CPU_F16C 1
#endif

namespace flashcore::cpu {
namespace {

struct Half {
  static constexpr bool is_half = true;
  uint16_t bits;
};
struct BFloat {
  static constexpr bool is_half = false;
  uint16_t bits;
};

FLASHCORE_HD float float_of_bits(uint32_t bits) {
  float x;
  memcpy(&x, &bits, 4);
  return x;
}
FLASHCORE_HD uint32_t bits_of_float(float x) {
  uint32_t bits;
  memcpy(&bits, &x, 4);
  return bits;
}

FLASHCORE_HD float to_float(float x) { return x; }
FLASHCORE_HD float to_float(BFloat x) { return float_of_bits(uint32_t{x.bits} << 16); }
FLASHCORE_HD float to_float(Half x) {
  uint32_t const magnitude = uint32_t{x.bits} & 0x7fff;
  uint32_t const sign = (uint32_t{x.bits} & 0x8000) << 16;
  uint32_t const moved = (magnitude << 13) + (112u << 23);  // float32's exponent is biased by 112 more
  // Subnormal: m · 2^-24, by taking the implied 1 away again. Infinity and NaN: the exponent becomes float32's own.
  uint32_t const tiny = bits_of_float(float_of_bits(moved + (1u << 23)) - float_of_bits(113u << 23));
  uint32_t const normal = moved + (magnitude >= 0x7c00 ? 112u << 23 : 0u);
  return float_of_bits((magnitude < 0x0400 ? tiny : normal) | sign);
}

FLASHCORE_HD void from_float(float x, float& y) { y = x; }
FLASHCORE_HD void from_float(float x, BFloat& y) {
  uint32_t const bits = bits_of_float(x);
  uint32_t const rounded = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
  uint32_t const quiet = (bits >> 16) | 0x40;
  y.bits = static_cast<uint16_t>((bits & 0x7fffffff) > 0x7f800000 ? quiet : rounded);
}
FLASHCORE_HD void from_float(float x, Half& y) {
  uint32_t const bits = bits_of_float(x);
  uint32_t const magnitude = bits & 0x7fffffff;
  // Normal: rebias, and round the 13 bits that fall off.
  uint32_t const normal = (magnitude - (112u << 23) + 0x0fff + ((magnitude >> 13) & 1)) >> 13;
  // Below 2^-14: adding 1/2 leaves a multiple of 2^-24 in the low bits, rounded by the addition.
  uint32_t const tiny = bits_of_float(float_of_bits(magnitude) + 0.5f) - bits_of_float(0.5f);
  uint32_t const special = magnitude > 0x7f800000 ? 0x7e00 | ((magnitude >> 13) & 0x3ff) : 0x7c00;
  uint32_t const result = magnitude >= 0x477ff000  ? special
                          : magnitude < 0x38800000 ? tiny
                                                   : normal;  // 65520: infinity
  y.bits = static_cast<uint16_t>(result | ((bits >> 16) & 0x8000));
}

// n elements to float32.
template <typename T>
FLASHCORE_HD void widen(const T* __restrict from, int n, float* __restrict to) {
  for (int i = 0; i < n; ++i) to[i] = to_float(from[i]);
}

// n float32 times `factor` to elements.
template <typename T>
FLASHCORE_HD void narrow(const float* __restrict from, float factor, int n, T* __restrict to) {
  for (int i = 0; i < n; ++i) from_float(from[i] * factor, to[i]);
}

#ifdef FLASHCORE_CPU_F16C
FLASHCORE_HD void widen(const Half* from, int n, float* to) {
  int i = 0;
  for (; i + 8 <= n; i += 8) {
    _mm256_storeu_ps(to + i, _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(from + i))));
  }
  for (; i < n; ++i) to[i] = to_float(from[i]);
}

FLASHCORE_HD void narrow(const float* from, float factor, int n, Half* to) {
  int i = 0;
  for (; i + 8 <= n; i += 8) {
    __m256 const x = _mm256_mul_ps(_mm256_loadu_ps(from + i), _mm256_set1_ps(factor));
    _mm_storeu_si128(reinterpret_cast<__m128i*>(to + i),
                     _mm256_cvtps_ph(x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
  }
  for (; i < n; ++i) from_float(from[i] * factor, to[i]);
}
#endif

#if defined(__AVX512F__) && defined(__AVX512BW__)
// As from_float does; the processor's own conversion takes subnormals for 0.
FLASHCORE_HD void narrow(const float* from, float factor, int n, BFloat* to) {
  int i = 0;
  for (; i + 16 <= n; i += 16) {
    __m512 const x = _mm512_mul_ps(_mm512_loadu_ps(from + i), _mm512_set1_ps(factor));
    __m512i const bits = _mm512_castps_si512(x), high = _mm512_srli_epi32(bits, 16);
    __m512i const up = _mm512_add_epi32(_mm512_and_si512(high, _mm512_set1_epi32(1)), _mm512_set1_epi32(0x7fff));
    __m512i const rounded = _mm512_srli_epi32(_mm512_add_epi32(bits, up), 16);
    __mmask16 const nan = _mm512_cmp_ps_mask(x, x, _CMP_UNORD_Q);
    __m512i const result = _mm512_mask_or_epi32(rounded, nan, high, _mm512_set1_epi32(0x40));
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(to + i), _mm512_cvtepi32_epi16(result));
  }
  for (; i < n; ++i) from_float(from[i] * factor, to[i]);
}
#endif

}  // namespace
}  // namespace flashcore::cpu

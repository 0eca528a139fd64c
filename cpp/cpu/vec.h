// SPDX-License-Identifier: Apache-2.0
// A vector of floats as wide as the registers of the instruction set that a file is compiled for, and exp2 and tanh on
// it. GCC's and Clang's vector types where they exist, else a plain array that the compiler may vectorize.
#pragma once

#include <cstdint>
#include <cstring>
#include <initializer_list>

#include "attention/portable.h"

#if defined(__GNUC__) && (defined(__AVX2__) || defined(__AVX512F__))
#include <immintrin.h>
#endif

namespace flashcore::cpu {
namespace {

#if defined(__AVX512F__)
constexpr int lanes = 16;
constexpr int panel_vectors = 4;  // vectors of a row of the register block: 6 x 4 accumulators in 32 registers
#elif defined(__AVX2__)
constexpr int lanes = 8;
constexpr int panel_vectors = 2;  // 6 x 2 accumulators in 16 registers
#elif defined(__aarch64__)
constexpr int lanes = 4;
constexpr int panel_vectors = 4;
#else
constexpr int lanes = 4;
constexpr int panel_vectors = 2;
#endif

#if defined(__GNUC__)

typedef float Vec __attribute__((vector_size(4 * lanes)));
typedef uint32_t VecBits __attribute__((vector_size(4 * lanes)));
typedef float VecUnaligned __attribute__((vector_size(4 * lanes), aligned(4), may_alias));

FLASHCORE_HD Vec load(const float* p) { return *reinterpret_cast<const VecUnaligned*>(p); }
FLASHCORE_HD void store(float* p, Vec v) { *reinterpret_cast<VecUnaligned*>(p) = v; }
FLASHCORE_HD Vec splat(float x) { return x - Vec{}; }
FLASHCORE_HD VecBits bits_of(Vec v) { return reinterpret_cast<VecBits>(v); }
FLASHCORE_HD Vec vec_of(VecBits v) { return reinterpret_cast<Vec>(v); }
FLASHCORE_HD float lane(Vec v, int i) { return v[i]; }

// a < b ? x : y in each lane; y where a or b is NaN.
FLASHCORE_HD Vec where_less(Vec a, Vec b, Vec x, Vec y) { return a < b ? x : y; }
// The larger; b where a is NaN.
FLASHCORE_HD Vec larger(Vec a, Vec b) {
#if defined(__AVX512F__)
  return (Vec)_mm512_max_ps((__m512)a, (__m512)b);  // GCC makes a comparison and a blend of the line below
#elif defined(__AVX2__)
  return (Vec)_mm256_max_ps((__m256)a, (__m256)b);
#else
  return a > b ? a : b;
#endif
}

#if !defined(__clang__)
// Each lane i gets lane (i + step) % lanes.
template <int step>
FLASHCORE_HD Vec rotate(Vec v) {
  VecBits index;
  for (uint32_t i = 0; i < lanes; ++i) index[i] = (i + step) % lanes;
  return __builtin_shuffle(v, index);
}
#endif

#else

struct Vec {
  float at[lanes];
};
struct VecBits {
  uint32_t at[lanes];
};

#define FLASHCORE_LANES(Type, expression)               \
  Type r;                                               \
  for (int i = 0; i < lanes; ++i) r.at[i] = expression; \
  return r

FLASHCORE_HD Vec load(const float* p) { FLASHCORE_LANES(Vec, p[i]); }
FLASHCORE_HD void store(float* p, Vec v) {
  for (int i = 0; i < lanes; ++i) p[i] = v.at[i];
}
FLASHCORE_HD Vec splat(float x) { FLASHCORE_LANES(Vec, x); }
FLASHCORE_HD Vec operator+(Vec a, Vec b) { FLASHCORE_LANES(Vec, a.at[i] + b.at[i]); }
FLASHCORE_HD Vec operator-(Vec a, Vec b) { FLASHCORE_LANES(Vec, a.at[i] - b.at[i]); }
FLASHCORE_HD Vec operator*(Vec a, Vec b) { FLASHCORE_LANES(Vec, a.at[i] * b.at[i]); }
FLASHCORE_HD Vec operator/(Vec a, Vec b) { FLASHCORE_LANES(Vec, a.at[i] / b.at[i]); }
FLASHCORE_HD VecBits operator+(VecBits a, uint32_t b) { FLASHCORE_LANES(VecBits, a.at[i] + b); }
FLASHCORE_HD VecBits operator<<(VecBits a, int b) { FLASHCORE_LANES(VecBits, a.at[i] << b); }
FLASHCORE_HD VecBits bits_of(Vec v) {
  VecBits r;
  memcpy(&r, &v, sizeof r);
  return r;
}
FLASHCORE_HD Vec vec_of(VecBits v) {
  Vec r;
  memcpy(&r, &v, sizeof r);
  return r;
}
FLASHCORE_HD float lane(Vec v, int i) { return v.at[i]; }
FLASHCORE_HD Vec where_less(Vec a, Vec b, Vec x, Vec y) { FLASHCORE_LANES(Vec, a.at[i] < b.at[i] ? x.at[i] : y.at[i]); }
FLASHCORE_HD Vec larger(Vec a, Vec b) { FLASHCORE_LANES(Vec, a.at[i] > b.at[i] ? a.at[i] : b.at[i]); }

#undef FLASHCORE_LANES
#endif

// 0, 1, 2, ...
FLASHCORE_HD Vec lane_indices() {
  alignas(4 * lanes) float index[lanes];
  for (int i = 0; i < lanes; ++i) index[i] = static_cast<float>(i);
  return load(index);
}

#if defined(__GNUC__) && !defined(__clang__)
// The largest lane that is not NaN, and the sum of the lanes.
template <int step = lanes / 2>
FLASHCORE_HD float max_across(Vec v) {
  if constexpr (step == 0) {
    return lane(v, 0);
  } else {
    return max_across<step / 2>(larger(v, rotate<step>(v)));
  }
}
template <int step = lanes / 2>
FLASHCORE_HD float sum_across(Vec v) {
  if constexpr (step == 0) {
    return lane(v, 0);
  } else {
    return sum_across<step / 2>(v + rotate<step>(v));
  }
}
#else
FLASHCORE_HD float max_across(Vec v) {
  float x[lanes];
  store(x, v);
  for (int half = lanes / 2; half > 0; half /= 2) {
    for (int i = 0; i < half; ++i) x[i] = x[i + half] > x[i] ? x[i + half] : x[i];
  }
  return x[0];
}

FLASHCORE_HD float sum_across(Vec v) {
  float x[lanes];
  store(x, v);
  for (int half = lanes / 2; half > 0; half /= 2) {
    for (int i = 0; i < half; ++i) x[i] += x[i + half];
  }
  return x[0];
}
#endif

// 2^x for x <= 0, to 1.2 ulp: 0 below 2^-126 (no subnormal results), exactly 1 at 0, NaN for NaN. x = n + f with n the
// nearest integer; 2^f = 1 + f P(f) on [-1/2, 1/2], P of degree 5 fitted for the smallest relative error (2e-9) with
// the 1 held.
// `n` vectors side by side, since one alone is a chain of 15 dependent instructions. `rough`: P of degree 3 (3e-6), for
// weights that are rounded to 11 bits and fewer.
template <bool rough = false, int n>
FLASHCORE_HD void exp2_of(Vec (&x)[n]) {
  const Vec shifter = splat(12582912.0f);  // 1.5 · 2^23: adding it leaves n in the low bits
  Vec shifted[n], f[n], p[n];
#pragma GCC unroll 4
  for (int i = 0; i < n; ++i) shifted[i] = x[i] + shifter;
#pragma GCC unroll 4
  for (int i = 0; i < n; ++i) f[i] = x[i] - (shifted[i] - shifter);
  if constexpr (rough) {
#pragma GCC unroll 4
    for (int i = 0; i < n; ++i) p[i] = splat(9.58285294e-3f) * f[i] + splat(5.59064262e-2f);
    for (float const coefficient : {2.40240991e-1f, 6.93124175e-1f, 1.0f}) {
#pragma GCC unroll 4
      for (int i = 0; i < n; ++i) p[i] = p[i] * f[i] + splat(coefficient);
    }
  } else {
#pragma GCC unroll 4
    for (int i = 0; i < n; ++i) p[i] = splat(1.5353362e-4f) * f[i] + splat(1.33988746e-3f);
    for (float const coefficient : {9.61843736e-3f, 5.55033247e-2f, 2.40226479e-1f, 6.93147203e-1f, 1.0f}) {
#pragma GCC unroll 4
      for (int i = 0; i < n; ++i) p[i] = p[i] * f[i] + splat(coefficient);
    }
  }
#pragma GCC unroll 4
  for (int i = 0; i < n; ++i) {
#if defined(__GNUC__) && defined(__AVX512F__)
    __mmask16 const normal = _mm512_cmp_ps_mask((__m512)x[i], (__m512)splat(-125.5f), _CMP_NLT_UQ);  // NaN stays
    x[i] = (Vec)_mm512_maskz_scalef_ps(normal, (__m512)p[i], (__m512)(shifted[i] - shifter));
#else
    const Vec power = vec_of((bits_of(shifted[i]) + 127u) << 23);  // 2^n: the bits above n fall off
    x[i] = where_less(x[i], splat(-125.5f), splat(0.0f), p[i] * power);
#endif
  }
}
FLASHCORE_HD Vec exp2_of(Vec x) {
  Vec one[1] = {x};
  exp2_of(one);
  return one[0];
}

FLASHCORE_HD float lane_exp2(float x) { return lane(exp2_of(splat(x)), 0); }

// tanh to 1.6 ulp. Below 0.625 x + x³ P(x²), fitted for the smallest relative error (4e-9); above 1 − 2 / (e^2x + 1).
FLASHCORE_HD Vec tanh_of(Vec x) {
  const Vec zero = splat(0.0f), one = splat(1.0f);
  const Vec magnitude = where_less(x, zero, zero - x, x);
  const Vec decay = exp2_of(magnitude * splat(-2.0f * log2_e));  // e^-2|x|
  const Vec large = one - splat(2.0f) * decay / (one + decay);
  const Vec z = x * x;
  Vec p = splat(-5.70498541e-3f);
  p = p * z + splat(2.06390859e-2f);
  p = p * z + splat(-5.37396547e-2f);
  p = p * z + splat(1.33314422e-1f);
  p = p * z + splat(-3.33332819e-1f);
  const Vec small = x + x * z * p;
  return where_less(magnitude, splat(0.625f), small, where_less(x, zero, zero - large, large));
}

}  // namespace
}  // namespace flashcore::cpu

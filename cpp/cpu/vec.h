// SPDX-License-Identifier: Apache-2.0
// A vector of floats as wide as the registers of the instruction set that a file is compiled for, and exp2 and tanh on
// it. GCC's and Clang's vector types where they exist, else a plain array that the compiler may vectorize.
#pragma once

#include <cstdint>
#include <cstring>

#include "attention/portable.h"

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
FLASHCORE_HD Vec larger(Vec a, Vec b) { return a > b ? a : b; }

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

// The largest lane that is not NaN.
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

// 2^x for x <= 0, to 1.2 ulp: 0 below 2^-126 (no subnormal results), exactly 1 at 0, NaN for NaN. x = n + f with n the
// nearest integer; 2^f = 1 + f P(f) on [-1/2, 1/2], P of degree 5 fitted for the smallest relative error (2e-9) with
// the 1 held.
FLASHCORE_HD Vec exp2_of(Vec x) {
  const Vec shifter = splat(12582912.0f);  // 1.5 · 2^23: adding it leaves n in the low bits
  const Vec shifted = x + shifter;
  const Vec f = x - (shifted - shifter);
  Vec p = splat(1.5353362e-4f);
  p = p * f + splat(1.33988746e-3f);
  p = p * f + splat(9.61843736e-3f);
  p = p * f + splat(5.55033247e-2f);
  p = p * f + splat(2.40226479e-1f);
  p = p * f + splat(6.93147203e-1f);
  p = p * f + splat(1.0f);
  const Vec power = vec_of((bits_of(shifted) + 127u) << 23);  // 2^n: the bits above n fall off
  return where_less(x, splat(-125.5f), splat(0.0f), p * power);
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

// SPDX-License-Identifier: Apache-2.0
// What lets the shared parts of the algorithm compile for host and device alike.
#pragma once

#include <cmath>

#if defined(__CUDACC__)
#define FLASHCORE_HD __host__ __device__ __forceinline__
#elif defined(_MSC_VER)
#define FLASHCORE_HD __forceinline
#else
#define FLASHCORE_HD inline __attribute__((always_inline))
#endif

namespace flashcore {
// Internal linkage: each translation unit has copies of its own, so that code compiled for a newer instruction set
// never becomes the copy that an older processor runs.
namespace {

constexpr float log2_e = 1.44269504088896340736f;
constexpr float ln_2 = 0.69314718055994530942f;

FLASHCORE_HD constexpr int min_of(int a, int b) { return a < b ? a : b; }
FLASHCORE_HD constexpr int max_of(int a, int b) { return a > b ? a : b; }
FLASHCORE_HD constexpr int clamp_to(int x, int low, int high) { return max_of(low, min_of(x, high)); }
FLASHCORE_HD constexpr int ceil_div(int a, int b) { return a / b + (a % b > 0); }

FLASHCORE_HD float minus_infinity() { return -INFINITY; }

// 2^x. On the device the hardware instruction (2 ulp; subnormal results flush to zero), on the host the C library's.
FLASHCORE_HD float exp2_of(float x) {
#ifdef __CUDA_ARCH__
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
#else
  return ::exp2f(x);
#endif
}

FLASHCORE_HD float log2_of(float x) {
#ifdef __CUDA_ARCH__
  return ::__log2f(x);
#else
  return ::log2f(x);
#endif
}

// tanh to about 1e-7 absolute: on the device 1 − 2 / (e^2x + 1) on two hardware instructions, since tanh.approx is only
// good to 2^-11 and a softcap of 50 would make 0.02 of it.
FLASHCORE_HD float tanh_of(float x) {
#ifdef __CUDA_ARCH__
  return 1.0f - __fdividef(2.0f, exp2_of(x * (2.0f * log2_e)) + 1.0f);
#else
  return ::tanhf(x);
#endif
}

}  // namespace
}  // namespace flashcore

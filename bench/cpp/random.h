// SPDX-License-Identifier: Apache-2.0
// Random inputs that are the same on the host and on the device: element i of an array depends on the seed and i alone.
#pragma once

#include <cmath>
#include <cstdint>

#include "attention/portable.h"

namespace flashcore::bench {
namespace {

// SplitMix64's output function (Steele, Lea, Flood 2014).
FLASHCORE_HD uint64_t scramble(uint64_t x) {
  x += 0x9e3779b97f4a7c15u;
  x = (x ^ (x >> 30)) * 0xbf58476d1ce4e5b9u;
  x = (x ^ (x >> 27)) * 0x94d049bb133111ebu;
  return x ^ (x >> 31);
}

// Normally distributed (Box and Muller 1958).
FLASHCORE_HD float normal(uint64_t seed, uint64_t i) {
  uint64_t const bits = scramble(seed ^ scramble(i));
  float const radius = static_cast<float>((bits >> 40) + 1) * 0x1p-24f;  // in (0, 1]
  float const angle = static_cast<float>(bits & 0xffffff) * 0x1p-24f;
  return ::sqrtf(-2.0f * ::logf(radius)) * ::cosf(6.28318531f * angle);
}

// What a row of queries is multiplied by: a quarter to four, so that flat and peaked rows are among them.
FLASHCORE_HD float row_scale(uint64_t row) {
  uint64_t const exponent = row % 5;
  return exponent == 0 ? 0.25f : static_cast<float>(1 << exponent) * 0.25f;
}

}  // namespace
}  // namespace flashcore::bench

// SPDX-License-Identifier: Apache-2.0
// Loops that do one thing only, to learn what a processor can do at most. Compiled once for each instruction set, like
// the kernels. Nothing here has code of its own.
#pragma once

#include <cstdint>

namespace flashcore::bench {

constexpr int loop_floats = 24 * 16;  // the registers of a loop, at most

// Multiplies and adds `repetitions` times in every register of `registers`, loop_floats floats that are read before and
// written after. Returns the operations of the loop, two for a product and its addition; 0 where the instruction set
// has no such product.
using ProductLoop = double (*)(int64_t repetitions, float* registers);

// The sum of `count` floats, a multiple of 1024.
using ReadLoop = float (*)(const float* from, int64_t count);

struct PeakLoops {
  ProductLoop float32, bfloat16;
  ProductLoop bfloat16_dot;  // of vectors, where `bfloat16` takes products of tiles
  ReadLoop read;
};

}  // namespace flashcore::bench

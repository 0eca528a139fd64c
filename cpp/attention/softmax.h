// SPDX-License-Identifier: Apache-2.0
// The online softmax of one row (Milakov and Gimelshein, arXiv:1805.02867) in base 2: the row's running maximum m of
// the transformed scores and the running sum of 2^(factor · (s − m)).
#pragma once

#include "attention/portable.h"

namespace flashcore {
namespace {

struct SoftmaxRow {
  float max = minus_infinity();
  float sum = 0.0f;

  // What is subtracted from factor · s in the exponent. A row that has seen no key has no maximum: 0 keeps −inf − 0 =
  // −inf.
  FLASHCORE_HD static float offset(float max, float factor) { return max == minus_infinity() ? 0.0f : max * factor; }

  // Moves the maximum to `new_max` (>= max) and returns what the sum and the output so far must be multiplied by.
  FLASHCORE_HD float raise(float new_max, float factor) {
    // The difference first: max · factor − new_max · factor would be contracted to one FMA and not be 0 for equal
    // maxima.
    float const ratio = new_max == minus_infinity() ? 1.0f : exp2_of((max - new_max) * factor);
    max = new_max;
    sum *= ratio;
    return ratio;
  }

  // 1 / sum; 0 for a row that saw no key, whose output is then zero. (NaN stays NaN.)
  FLASHCORE_HD float inverse_sum() const { return sum == 0.0f ? 0.0f : 1.0f / sum; }

  // The natural-log log-sum-exp of the scaled scores; −inf for a row that saw no key.
  FLASHCORE_HD float lse(float factor) const {
    return sum == 0.0f ? minus_infinity() : (max * factor + log2_of(sum)) * ln_2;
  }
};

}  // namespace
}  // namespace flashcore

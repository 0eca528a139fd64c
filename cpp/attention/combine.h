// SPDX-License-Identifier: Apache-2.0
// The arithmetic that merges results over disjoint keys, in key order, so that the same parts give the same bits.
#pragma once

#include "attention/portable.h"

namespace flashcore {
namespace {

// The weight of a part whose log-sum-exp is `lse` when the largest of all parts is `max_lse`: e^(lse − max_lse), 0 for
// a part that saw no key.
FLASHCORE_HD float part_weight(float lse, float max_lse) {
  return lse == minus_infinity() ? 0.0f : exp2_of((lse - max_lse) * log2_e);
}

// The merged log-sum-exp, given the largest part's and the sum of the weights.
FLASHCORE_HD float merged_lse(float max_lse, float weight_sum) {
  return weight_sum == 0.0f ? minus_infinity() : max_lse + log2_of(weight_sum) * ln_2;
}

}  // namespace
}  // namespace flashcore

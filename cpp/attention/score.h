// SPDX-License-Identifier: Apache-2.0
// What happens to a score between the first product and the softmax. The softmax computes 2^(factor · transform(s) −
// m), so a plain score costs nothing: its scale is folded into the exponent.
#pragma once

#include "attention/portable.h"

namespace flashcore {
namespace {

// s · scale with scale > 0.
struct PlainScore {
  static constexpr bool plain = true;
  float factor;  // log2(e) · scale

  FLASHCORE_HD static PlainScore make(float scale, float /*softcap*/) { return {scale * log2_e}; }
  FLASHCORE_HD float transform(float s) const { return s; }
};

// Softcap c · tanh(s · scale / c) where c > 0 (Gemma 2, arXiv:2408.00118); else s · scale with a scale that is zero or
// negative, which cannot be folded into the exponent: the row maximum is taken before the factor.
struct CappedScore {
  static constexpr bool plain = false;
  float factor;  // log2(e) · (c or 1)
  float inner;   // scale / (c or 1)
  bool capped;

  FLASHCORE_HD static CappedScore make(float scale, float softcap) {
    bool const capped = softcap > 0.0f;
    float const cap = capped ? softcap : 1.0f;
    return {cap * log2_e, scale / cap, capped};
  }
  FLASHCORE_HD float transform(float s) const { return capped ? tanh_of(s * inner) : s * inner; }

  // Calls each(f) with f being transform() for a whole tile: what kind it is is asked once.
  template <class Each>
  FLASHCORE_HD void transform_all(Each each) const {
    if (capped) {
      each([this](float s) { return tanh_of(s * inner); });
    } else {
      each([this](float s) { return s * inner; });
    }
  }
};

}  // namespace
}  // namespace flashcore

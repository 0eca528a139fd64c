// SPDX-License-Identifier: Apache-2.0
// Attention of a tile with few rows of queries (decoding, the end of a sequence), which is bound by reading keys and
// values: they are used where they lie, without packing. Four rows at a time are the lanes of a vector, so that scores
// and weights of lanes / 4 keys are one vector: lane 4 k + r is row r's of key k.
#pragma once

#include "attention/mask.h"
#include "attention/score.h"
#include "attention/softmax.h"
#include "cpu/isa.h"
#include "cpu/pack.h"

namespace flashcore::cpu {
namespace {

constexpr int group_keys = lanes / 4;  // keys of a vector of scores

FLASHCORE_HD Vec load_lanes(const float* p) { return load(p); }
template <typename T>
FLASHCORE_HD Vec load_lanes(const T* p) {
#if defined(__AVX512F__)
  __m256i const bits = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p));
  if constexpr (T::is_half) {
    return (Vec)_mm512_cvtph_ps(bits);
  } else {
    return (Vec)_mm512_slli_epi32(_mm512_cvtepu16_epi32(bits), 16);
  }
#elif defined(__AVX2__) && defined(__GNUC__)
  __m128i const bits = _mm_loadu_si128(reinterpret_cast<const __m128i*>(p));
  if constexpr (T::is_half) {
    return (Vec)_mm256_cvtph_ps(bits);
  } else {
    return (Vec)_mm256_slli_epi32(_mm256_cvtepu16_epi32(bits), 16);
  }
#else
  float x[lanes];
  for (int i = 0; i < lanes; ++i) x[i] = to_float(p[i]);
  return load(x);
#endif
}

// The dot products of rows: how many elements a step takes, and from what.
template <typename Atom, typename T>
struct Dot;
template <typename T>
struct Dot<FloatAtom, T> {
  static constexpr int step = lanes;
  FLASHCORE_HD static Vec row(const T* p) { return load_lanes(p); }
};
#if defined(__AVX512BF16__)
template <>
struct Dot<BFloatAtom, BFloat> {
  static constexpr int step = 2 * lanes;
  FLASHCORE_HD static __m512i row(const BFloat* p) { return _mm512_loadu_si512(p); }
};
#endif

// Vectors v[0], ..., v[lanes - 1] to one whose lane i is the sum of v[i]'s lanes.
FLASHCORE_HD Vec sums_of(Vec (&v)[lanes]) {
#if defined(__GNUC__) && !defined(__clang__)
#pragma GCC unroll 4
  for (uint32_t bit = 1, count = lanes / 2; bit < lanes; bit *= 2, count /= 2) {
    VecBits low, high;  // of the first vector, where the lane's bit is 0, or the second
    for (uint32_t i = 0; i < lanes; ++i) {
      low[i] = (i & bit ? lanes : 0) + (i & ~bit);
      high[i] = (i & bit ? lanes : 0) + (i | bit);
    }
#pragma GCC unroll 8
    for (uint32_t j = 0; j < count; ++j) {
      v[j] = __builtin_shuffle(v[2 * j], v[2 * j + 1], low) + __builtin_shuffle(v[2 * j], v[2 * j + 1], high);
    }
  }
  return v[0];
#else
  float x[lanes];
  for (int i = 0; i < lanes; ++i) x[i] = sum_across(v[i]);
  return load(x);
#endif
}

// For each of four rows the largest of its lanes, or their sum, in all of them.
FLASHCORE_HD Vec of_four_rows(Vec v, bool largest) {
#if defined(__AVX512F__) && defined(__GNUC__)
  Vec const halves = (Vec)_mm512_shuffle_f32x4((__m512)v, (__m512)v, 0x4e);
  v = largest ? larger(halves, v) : v + halves;
  Vec const quarters = (Vec)_mm512_shuffle_f32x4((__m512)v, (__m512)v, 0xb1);
  return largest ? larger(quarters, v) : v + quarters;
#else
  float x[lanes];
  store(x, v);
  for (int half = lanes / 2; half >= 4; half /= 2) {
    for (int i = 0; i < half; ++i) x[i] = largest ? (x[i + half] > x[i] ? x[i + half] : x[i]) : x[i] + x[i + half];
  }
  for (int i = 4; i < lanes; ++i) x[i] = x[i % 4];
  return load(x);
#endif
}

// The state of four rows.
struct FewRows {
  Vec max, sum;
  float ratio[lanes];
};

// Scores of the keys [0, count) of `keys` with the four rows of `queries` (one after the other, `depth` lanes of the
// atom each), in whole vectors: scores[4 k + r]. Calls ahead() again and again meanwhile.
template <typename Atom, typename T, typename Ahead>
FLASHCORE_HD void few_scores(const typename Atom::Lane* queries, int depth, int head_dim, const T* keys, int64_t stride,
                             int count, float* scores, Ahead& ahead) {
  using D = Dot<Atom, T>;
  for (int k = 0; k < count; k += group_keys) {
    ahead();
    const T* row[group_keys];
    for (int i = 0; i < group_keys; ++i) row[i] = keys + min_of(k + i, count - 1) * stride;
    Vec acc[lanes] = {};
    for (int d = 0; d < head_dim; d += D::step) {
      typename Atom::Wide key[group_keys];
#pragma GCC unroll 4
      for (int i = 0; i < group_keys; ++i) key[i] = D::row(row[i] + d);
#pragma GCC unroll 4
      for (int r = 0; r < 4; ++r) {
        typename Atom::Wide const query = Atom::load_wide(queries + r * depth + d / Atom::depth);
#pragma GCC unroll 4
        for (int i = 0; i < group_keys; ++i) acc[4 * i + r] = Atom::multiply_add(query, key[i], acc[4 * i + r]);
      }
    }
    store(scores + 4 * k, sums_of(acc));
  }
}

#if defined(__AVX512BF16__)
// out = ratio · out + weights · values by the bf16 dot product, over 32 · groups columns: two keys at a time, whose
// rounded weights are side by side in pairs[4 · (k / 2) + r].
template <int groups, typename Ahead>
FLASHCORE_HD void few_output_columns(const uint32_t* pairs, const float* ratio, const BFloat* values, int64_t stride,
                                     int count, int head_dim, float* out, Ahead& ahead) {
  __m512 acc[4][2 * groups];
  for (auto& row : acc) {
    for (__m512& x : row) x = _mm512_setzero_ps();
  }
  for (int k = 0; k < count; k += 2) {
    ahead();
    ahead();
    const BFloat* const first = values + k * stride;
    const BFloat* const second = values + min_of(k + 1, count - 1) * stride;  // a key too many has the weight 0
    __m512i value[2 * groups];
#pragma GCC unroll 2
    for (int g = 0; g < groups; ++g) {
      __m512i const a = _mm512_loadu_si512(first + 32 * g), b = _mm512_loadu_si512(second + 32 * g);
      value[2 * g] = _mm512_unpacklo_epi16(a, b);
      value[2 * g + 1] = _mm512_unpackhi_epi16(a, b);
    }
#pragma GCC unroll 4
    for (int r = 0; r < 4; ++r) {
      __m512i const weight = _mm512_set1_epi32(static_cast<int>(pairs[2 * k + r]));
#pragma GCC unroll 4
      for (int v = 0; v < 2 * groups; ++v) {
        acc[r][v] = _mm512_dpbf16_ps(acc[r][v], (__m512bh)value[v], (__m512bh)weight);
      }
    }
  }
  // Unpacking has left columns 8 j to 8 j + 3 in the first vector of a group, and 8 j + 4 to 8 j + 7 in the second.
  __m512i const low = _mm512_setr_epi32(0, 1, 2, 3, 16, 17, 18, 19, 4, 5, 6, 7, 20, 21, 22, 23);
  __m512i const high = _mm512_add_epi32(low, _mm512_set1_epi32(8));
  for (int r = 0; r < 4; ++r) {
    for (int g = 0; g < groups; ++g) {
      float* const to = out + r * head_dim + 32 * g;
      Vec const x[2] = {(Vec)_mm512_permutex2var_ps(acc[r][2 * g], low, acc[r][2 * g + 1]),
                        (Vec)_mm512_permutex2var_ps(acc[r][2 * g], high, acc[r][2 * g + 1])};
      for (int i = 0; i < 2; ++i) store(to + 16 * i, load(to + 16 * i) * splat(ratio[r]) + x[i]);
    }
  }
}

template <typename Ahead>
FLASHCORE_HD void few_outputs(BFloatAtom, const float* weights, const float* ratio, const BFloat* values,
                              int64_t stride, int count, int head_dim, float* out, Ahead& ahead) {
  alignas(64) uint32_t pairs[2 * tile_k];
  for (int k = 0; k < count; k += group_keys) {
    __m256i const rounded = (__m256i)_mm512_cvtneps_pbh((__m512)load(weights + 4 * k));
    __m256i const paired = _mm256_unpacklo_epi16(rounded, _mm256_bsrli_epi128(rounded, 8));
    _mm256_store_si256(reinterpret_cast<__m256i*>(pairs + 2 * k), paired);
  }
  int c = 0;
  for (; c + 64 <= head_dim; c += 64) {
    few_output_columns<2>(pairs, ratio, values + c, stride, count, head_dim, out + c, ahead);
  }
  if (c < head_dim) few_output_columns<1>(pairs, ratio, values + c, stride, count, head_dim, out + c, ahead);
}
#endif

// out (4 x head_dim) = ratio · out + weights · values, a panel of columns at a time. Calls ahead() meanwhile.
template <typename Atom, typename T, typename Ahead>
FLASHCORE_HD void few_outputs(Atom, const float* weights, const float* ratio, const T* values, int64_t stride,
                              int count, int head_dim, float* out, Ahead& ahead) {
  for (int c = 0; c < head_dim; c += panel_width) {
    int const vectors = min_of(panel_width, head_dim - c) / lanes;
    Vec acc[4][panel_vectors] = {};
    if (vectors == panel_vectors) {
      for (int k = 0; k < count; ++k) {
        ahead();
        const T* const row = values + k * stride + c;
        Vec value[panel_vectors];
#pragma GCC unroll 4
        for (int v = 0; v < panel_vectors; ++v) value[v] = load_lanes(row + v * lanes);
#pragma GCC unroll 4
        for (int r = 0; r < 4; ++r) {
          Vec const weight = splat(weights[4 * k + r]);
#pragma GCC unroll 4
          for (int v = 0; v < panel_vectors; ++v) acc[r][v] = weight * value[v] + acc[r][v];
        }
      }
    } else {
      for (int v = 0; v < vectors; ++v) {
        Vec one[4] = {};
        for (int k = 0; k < count; ++k) {
          Vec const value = load_lanes(values + k * stride + c + v * lanes);
#pragma GCC unroll 4
          for (int r = 0; r < 4; ++r) one[r] = splat(weights[4 * k + r]) * value + one[r];
        }
        for (int r = 0; r < 4; ++r) acc[r][v] = one[r];
      }
    }
    for (int r = 0; r < 4; ++r) {
      for (int v = 0; v < vectors; ++v) {
        float* const to = out + r * head_dim + c + v * lanes;
        store(to, load(to) * splat(ratio[r]) + acc[r][v]);
      }
    }
  }
}

}  // namespace
}  // namespace flashcore::cpu

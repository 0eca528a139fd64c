// SPDX-License-Identifier: Apache-2.0
// What the kernels of a tile of queries have in common: where its rows lie, and the softmax of a row of scores.
#pragma once

#include "attention/mask.h"
#include "attention/score.h"
#include "attention/softmax.h"
#include "cpu/element.h"
#include "cpu/isa.h"
#include "cpu/vec.h"

#if defined(__AVX512F__) && defined(__GNUC__)
#include <immintrin.h>
#endif

namespace flashcore::cpu {
namespace {

// A value as a type.
template <int n>
struct Constant {
  static constexpr int value = n;
};

constexpr int panel_width = panel_vectors * lanes;  // keys, or columns, of a register block

// Keys of a tile that a block of rows looks at, in whole panels of keys.
struct Span {
  int begin, end;
};

template <typename Score>
FLASHCORE_HD Vec transform(const Score& score, Vec s) {
  if constexpr (Score::plain) {
    return s;
  } else {
    s = s * splat(score.inner);
    return score.capped ? tanh_of(s) : s;
  }
}

// What each of n rows so far comes to, as SoftmaxRow says it.
template <int n>
struct RowStates {
  float max[n], sum[n];

  RowStates() {
    for (int i = 0; i < n; ++i) {
      max[i] = minus_infinity();
      sum[i] = 0.0f;
    }
  }
};

// The weights of a panel, added up.
FLASHCORE_HD Vec sum_of(const Vec (&weight)[panel_vectors]) {
  if constexpr (panel_vectors == 2) {
    return weight[0] + weight[1];
  } else {
    return (weight[0] + weight[1]) + (weight[2] + weight[3]);
  }
}

// One row of scores becomes weights 2^(factor · (s − max)), those outside [first, end) zero, as `Atom` reads them, at
// `weights`, which may be where the scores are; `row_max` and `row_sum` take in the maximum and the sum (of the weights
// before they are rounded). Returns what the row's output so far must be multiplied by. The maximum is subtracted
// before the factor comes in, so that the largest score has a weight of exactly 1.
template <bool masked, typename Atom, typename Score>
FLASHCORE_HD float softmax_row(const Score& score, float* scores, typename Atom::Lane* weights, Span span, int first,
                               int end, float& row_max, float& row_sum) {
  Vec const nothing = splat(minus_infinity());
  Vec largest = nothing;
  if (masked || !Score::plain) {
    Vec index = lane_indices() + splat(static_cast<float>(span.begin));
    for (int k = span.begin; k < span.end; k += lanes, index = index + splat(static_cast<float>(lanes))) {
      Vec s = transform(score, load(scores + k));
      if constexpr (masked) {
        s = where_less(index, splat(static_cast<float>(first)), nothing, s);
        s = where_less(index, splat(static_cast<float>(end)), s, nothing);
      }
      store(scores + k, s);
      largest = larger(s, largest);
    }
  } else {
    for (int k = span.begin; k < span.end; k += lanes) largest = larger(load(scores + k), largest);
  }
  float const tile_max = max_across(largest);
  float const new_max = tile_max > row_max ? tile_max : row_max;
  float const offset = new_max == minus_infinity() ? 0.0f : new_max;
  float ratio = row_max == minus_infinity() ? 0.0f : 1.0f;  // nothing seen before, or nothing changed: most tiles
  if (new_max > row_max && ratio != 0.0f) ratio = lane_exp2((row_max - offset) * score.factor);

  Vec sum = splat(0.0f);
  for (int k = span.begin; k < span.end; k += panel_width) {
    Vec weight[panel_vectors];
#pragma GCC unroll 4
    for (int v = 0; v < panel_vectors; ++v) {
      weight[v] = (load(scores + k + v * lanes) - splat(offset)) * splat(score.factor);
    }
    exp2_of(weight);
    sum = sum + sum_of(weight);
    Atom::store_weights(weights, k, weight);
  }
  row_max = new_max;
  row_sum = row_sum * ratio + sum_across(sum);
  return ratio;
}

#if defined(__AVX512F__) && defined(__GNUC__)
constexpr int sixteen = lanes;

// Lane i of the result: v[i]'s lanes, all of them combined by `of` (addition, or the larger), in the order of
// sum_across and max_across.
template <typename Of>
FLASHCORE_HD Vec across_each(const Vec (&v)[sixteen], Of of) {
  auto const quarters = [](Vec x, Vec y, auto which) {
    return (Vec)_mm512_shuffle_f32x4((__m512)x, (__m512)y, decltype(which)::value);
  };
  auto const low = [](Vec x, Vec y) { return (Vec)_mm512_unpacklo_ps((__m512)x, (__m512)y); };
  auto const high = [](Vec x, Vec y) { return (Vec)_mm512_unpackhi_ps((__m512)x, (__m512)y); };
  Vec a[8], b[4], c[2];
#pragma GCC unroll 8
  for (int i = 0; i < 8; ++i) {  // quarters of i, i, i + 8, i + 8
    a[i] = of(quarters(v[i], v[i + 8], Constant<0x44>{}), quarters(v[i], v[i + 8], Constant<0xee>{}));
  }
#pragma GCC unroll 4
  for (int i = 0; i < 4; ++i) {  // of i, i + 8, i + 4, i + 12
    b[i] = of(quarters(a[i], a[i + 4], Constant<0x88>{}), quarters(a[i], a[i + 4], Constant<0xdd>{}));
  }
#pragma GCC unroll 2
  for (int i = 0; i < 2; ++i) c[i] = of(low(b[i], b[i + 2]), high(b[i], b[i + 2]));
  Vec const d = of(low(c[0], c[1]), high(c[0], c[1]));
  return quarters(d, d, Constant<0xd8>{});
}

// softmax_row without masks for `count` rows side by side, up to sixteen, which does not wait for the maximum of each:
// 7.5 cycles a vector of scores in place of 15. All have the same span; `max`, `sum` and `ratio` have sixteen places.
// Weights take the scores' place.
template <typename Atom, typename Score>
FLASHCORE_HD void softmax_rows(const Score& score, int count, float* scores, int stride, Span span, float* max,
                               float* sum, float* ratio) {
  Vec const nothing = splat(minus_infinity());
  Vec v[sixteen];
#pragma GCC unroll 1
  for (int i = 0; i < sixteen; ++i) {
    v[i] = nothing;
    for (int k = span.begin; i < count && k < span.end; k += panel_width) {
      float* const at = scores + i * stride + k;
      Vec x[panel_vectors];
#pragma GCC unroll 4
      for (int j = 0; j < panel_vectors; ++j) x[j] = transform(score, load(at + j * lanes));
      if constexpr (!Score::plain) {
#pragma GCC unroll 4
        for (int j = 0; j < panel_vectors; ++j) store(at + j * lanes, x[j]);
      }
      v[i] = larger(larger(larger(x[0], x[1]), larger(x[2], x[3])), v[i]);
    }
  }

  Vec const old_max = load(max);
  Vec const new_max = larger(across_each(v, [](Vec x, Vec y) { return larger(x, y); }), old_max);
  Vec const offset = where_less(nothing, new_max, new_max, splat(0.0f));
  float offsets[sixteen];
  store(offsets, offset);
#pragma GCC unroll 1
  for (int i = 0; i < sixteen; ++i) {
    v[i] = splat(0.0f);
    for (int k = span.begin; i < count && k < span.end; k += panel_width) {
      Vec weight[panel_vectors];
#pragma GCC unroll 4
      for (int j = 0; j < panel_vectors; ++j) {
        weight[j] = (load(scores + i * stride + k + j * lanes) - splat(offsets[i])) * splat(score.factor);
      }
      exp2_of(weight);
      v[i] = v[i] + sum_of(weight);
      Atom::store_weights(reinterpret_cast<typename Atom::Lane*>(scores + i * stride), k, weight);
    }
  }
  Vec const ratios = exp2_of((old_max - offset) * splat(score.factor));
  store(ratio, ratios);
  store(sum, load(sum) * ratios + across_each(v, [](Vec x, Vec y) { return x + y; }));
  store(max, new_max);
}
#endif

// The rows of a tile of queries: row r is query q_begin + r / heads of head `head + r % heads`, and with several key
// heads of the same heads of the groups that follow.
template <typename T, typename Score>
struct TileRows {
  const ForwardParams& params;
  const QueryTile& tile;
  Mask mask;
  Score score;
  int rows;  // of a key head

  TileRows(const ForwardParams& p, const QueryTile& t)
      : params(p),
        tile(t),
        mask(Mask::make(t.sequence.seqlen_q, t.sequence.seqlen_k, p.window_left, p.window_right)),
        score(Score::make(p.scale, p.softcap)),
        rows(t.queries * t.heads) {}

  // Mostly there is one head, and then no division.
  int query_of(int row) const { return tile.q_begin + (tile.heads == 1 ? row : row / tile.heads); }
  int head_of(int row, int key_head) const {
    return tile.head + key_head * params.group + (tile.heads == 1 ? 0 : row % tile.heads);
  }

  template <typename Pointer>
  int64_t offset_of(const Rows<Pointer>& array, int row, int key_head = 0) const {
    return tile.sequence.batch * array.batch_stride + (tile.sequence.first_q + query_of(row)) * array.row_stride +
           head_of(row, key_head) * array.head_stride;
  }

  // Where key (or value) `key` of the tile's first key head, or of one after it, lies.
  const T* key_row(const Rows<const void*>& array, int key, int key_head = 0) const {
    Sequence const& s = tile.sequence;
    int64_t const block = s.pages ? s.pages[key / s.page_size] : s.batch;
    int64_t const row = s.pages ? key % s.page_size : s.first_k + key;
    return static_cast<const T*>(array.data) + block * array.batch_stride + row * array.row_stride +
           (tile.head_k + key_head) * array.head_stride;
  }

  // A row's output, divided by its sum, and its log-sum-exp.
  void write_row(const float* out, const SoftmaxRow& total, int row, int key_head = 0) const {
    narrow(out, total.inverse_sum(), params.head_dim,
           static_cast<T*>(params.o.data) + offset_of(params.o, row, key_head));
    if (params.lse) write_lse(total, row, key_head);
  }

  void write_lse(const SoftmaxRow& total, int row, int key_head = 0) const {
    int64_t const head = tile.sequence.batch * params.heads_q + head_of(row, key_head);
    params.lse[head * params.seqlen_q + tile.sequence.first_q + query_of(row)] = total.lse(score.factor);
  }
};

}  // namespace
}  // namespace flashcore::cpu

// SPDX-License-Identifier: Apache-2.0
// What the kernels of a tile of queries have in common: where its rows lie, and the softmax of a row of scores.
#pragma once

#include "attention/mask.h"
#include "attention/score.h"
#include "attention/softmax.h"
#include "cpu/element.h"
#include "cpu/isa.h"
#include "cpu/vec.h"

namespace flashcore::cpu {
namespace {

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

// The state of a row: SoftmaxRow's maximum and, lane by lane, its sum.
struct RowState {
  Vec sum = splat(0.0f);
  float max = minus_infinity();
};

// One row of scores becomes weights 2^(factor · (s − max)), those outside [first, end) zero, as `Atom` reads them, at
// `weights`, which may be where the scores are; `row` takes in the maximum and the sum (of the weights before they are
// rounded). Returns what the row's output so far must be multiplied by. The maximum is subtracted before the factor
// comes in, so that the largest score has a weight of exactly 1.
template <bool masked, typename Atom, typename Score>
FLASHCORE_HD float softmax_row(const Score& score, float* scores, typename Atom::Lane* weights, Span span, int first,
                               int end, RowState& row) {
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
  float const new_max = tile_max > row.max ? tile_max : row.max;
  float const offset = new_max == minus_infinity() ? 0.0f : new_max;
  float ratio = row.max == minus_infinity() ? 0.0f : 1.0f;  // nothing seen before, or nothing changed: most tiles
  if (new_max > row.max && ratio != 0.0f) ratio = lane_exp2((row.max - offset) * score.factor);

  Vec sum = splat(0.0f);
  for (int k = span.begin; k < span.end; k += panel_width) {
    Vec weight[panel_vectors];
#pragma GCC unroll 4
    for (int v = 0; v < panel_vectors; ++v) {
      weight[v] = (load(scores + k + v * lanes) - splat(offset)) * splat(score.factor);
    }
    exp2_of(weight);
#pragma GCC unroll 4
    for (int v = 0; v < panel_vectors; ++v) sum = sum + weight[v];
    Atom::store_weights(weights, k, weight);
  }
  row.max = new_max;
  row.sum = row.sum * splat(ratio) + sum;
  return ratio;
}

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

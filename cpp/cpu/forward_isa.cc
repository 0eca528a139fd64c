// SPDX-License-Identifier: Apache-2.0
// The forward kernel of one tile of queries, compiled once for each instruction set (FLASHCORE_CPU_NAMESPACE names it).
//
// Everything but the entry point has internal linkage, and nothing of the standard library is instantiated: the linker
// keeps one copy of a weak symbol, and a copy made of AVX-512 instructions must not be what an older processor runs.
#include "attention/mask.h"
#include "attention/score.h"
#include "attention/softmax.h"
#include "cpu/few_rows.h"
#include "cpu/isa.h"
#include "cpu/pack.h"

namespace flashcore::cpu {
namespace {

static_assert(tile_q % block_rows == 0 && strip_rows % block_rows == 0 && tile_k % panel_width == 0);
static_assert(largest_row == max_head_dim);

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

// One row of scores becomes weights 2^(factor · (s − max)), those outside [first, end) zero, in the place of the scores
// and as `Atom` reads them; `row` takes in the maximum and the sum (of the weights before they are rounded). Returns
// what the row's output so far must be multiplied by. The maximum is subtracted before the factor comes in, so that the
// largest score has a weight of exactly 1.
template <bool masked, typename Atom, typename Score>
FLASHCORE_HD float softmax_row(const Score& score, float* scores, Span span, int first, int end, RowState& row) {
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
  float const ratio = lane_exp2((row.max - offset) * score.factor);

  Vec sum = splat(0.0f);
  auto* const weights = reinterpret_cast<typename Atom::Lane*>(scores);
  for (int k = span.begin; k < span.end; k += panel_width) {
    Vec weight[panel_vectors];
#pragma GCC unroll 4
    for (int v = 0; v < panel_vectors; ++v) {
      weight[v] = (load(scores + k + v * lanes) - splat(offset)) * splat(score.factor);
    }
    exp2_of(weight);
#pragma GCC unroll 4
    for (int v = 0; v < panel_vectors; ++v) {
      Atom::store_weights(weights + (k + v * lanes) / Atom::depth, weight[v]);
      sum = sum + weight[v];
    }
  }
  row.max = new_max;
  row.sum = row.sum * splat(ratio) + sum;
  return ratio;
}

// The register blocks are as high as the rows that are there allow: 6, 3 or 1.
FLASHCORE_HD int block_height(int rows) { return rows > 3 ? 6 : rows > 1 ? 3 : 1; }

template <typename Atom>
void scores_of_block(int height, const typename Atom::Lane* queries, const typename Atom::Lane* keys, int depth,
                     float* scores) {
  if (height == 6) return score_block<Atom, 6>(queries, keys, depth, scores, tile_k);
  if (height == 3) return score_block<Atom, 3>(queries, keys, depth, scores, tile_k);
  return score_block<Atom, 1>(queries, keys, depth, scores, tile_k);
}

template <typename Atom, int vectors>
void output_of_block(int height, const typename Atom::Lane* weights, const typename Atom::Lane* values, int depth,
                     const float* ratio, float* out, int stride) {
  if (height == 6) return output_block<Atom, 6, vectors, tile_k>(weights, values, depth, ratio, out, stride);
  if (height == 3) return output_block<Atom, 3, vectors, tile_k>(weights, values, depth, ratio, out, stride);
  return output_block<Atom, 1, vectors, tile_k>(weights, values, depth, ratio, out, stride);
}

template <typename Atom>
void output_of_block(int vectors, int height, const typename Atom::Lane* weights, const typename Atom::Lane* values,
                     int depth, const float* ratio, float* out, int stride) {
  static_assert(panel_vectors == 2 || panel_vectors == 4);
  if (vectors == 1) return output_of_block<Atom, 1>(height, weights, values, depth, ratio, out, stride);
  if (vectors == 2) return output_of_block<Atom, 2>(height, weights, values, depth, ratio, out, stride);
  if constexpr (panel_vectors == 4) {
    if (vectors == 3) return output_of_block<Atom, 3>(height, weights, values, depth, ratio, out, stride);
    return output_of_block<Atom, 4>(height, weights, values, depth, ratio, out, stride);
  }
}

// One tile of queries. Row r of it is query q_begin + r / heads of head `head + r % heads`.
template <typename T, typename Atom, typename Score>
struct Forward {
  using Lane = typename Atom::Lane;

  const ForwardParams& params;
  const QueryTile& tile;
  Mask mask;
  Score score;
  int rows;
  int depth;       // lanes of the first product
  int out_stride;  // head_dim in whole vectors
  Lane* queries;   // [block][depth][block_rows]
  float* out;      // [row][out_stride]
  Lane* keys;      // [panel][depth][panel_width]
  Lane* values;    // [panel][key / Atom::depth][column]
  float* scores;   // [strip_rows][tile_k], and the weights in their place
  RowState state[tile_q];
  int packed_keys = 0;  // keys of the packed tile, in whole panels

  Forward(const ForwardParams& p, const QueryTile& t, float* scratch)
      : params(p),
        tile(t),
        mask(Mask::make(t.sequence.seqlen_q, t.sequence.seqlen_k, p.window_left, p.window_right)),
        score(Score::make(p.scale, p.softcap)),
        rows(t.queries * t.heads),
        depth(ceil_div(p.head_dim, Atom::depth)),
        out_stride(ceil_div(p.head_dim, lanes) * lanes) {
    queries = reinterpret_cast<Lane*>(scratch);
    out = scratch + tile_q * max_head_dim;
    keys = reinterpret_cast<Lane*>(out + tile_q * max_head_dim);
    values = keys + tile_k * max_head_dim;
    scores = reinterpret_cast<float*>(values + tile_k * max_head_dim);
  }

  int query_of(int row) const { return tile.q_begin + row / tile.heads; }

  template <typename Pointer>
  int64_t offset_of(const Rows<Pointer>& array, int row) const {
    return tile.sequence.batch * array.batch_stride + (tile.sequence.first_q + query_of(row)) * array.row_stride +
           (tile.head + row % tile.heads) * array.head_stride;
  }

  void run() {
    KeyRange const range = mask.key_range(tile.q_begin, tile.q_begin + tile.queries, tile_k);
    pack_queries();
    for (int i = 0; i < ceil_div(rows, block_rows) * block_rows * out_stride; ++i) out[i] = 0.0f;
    for (int t = range.begin; t < range.end; ++t) {
      int const first_key = t * tile_k;
      pack(first_key, min_of(tile_k, mask.seqlen_k - first_key));
      bool const whole = t >= range.full_begin && t < range.full_end;
      for (int row = 0; row < rows; row += strip_rows) {
        whole ? strip<false>(row, first_key) : strip<true>(row, first_key);
      }
    }
    write();
  }

  void pack_queries() {
    Lane room[largest_row];
    const T* const array = static_cast<const T*>(params.q.data);
    for (int row = 0; row < ceil_div(rows, block_rows) * block_rows; ++row) {
      Lane* const to = queries + (row / block_rows) * block_rows * depth + row % block_rows;
      if (row < rows) {
        const Lane* const from = Row<Atom>::lanes_of(array + offset_of(params.q, row), params.head_dim, room);
        for (int d = 0; d < depth; ++d) to[d * block_rows] = from[d];
      } else {
        for (int d = 0; d < depth; ++d) to[d * block_rows] = Lane{};
      }
    }
  }

  void pack(int first_key, int count) {
    int64_t const row = tile.sequence.first_k + first_key;
    auto const start = [&](const Rows<const void*>& array) {
      return static_cast<const T*>(array.data) + tile.sequence.batch * array.batch_stride + row * array.row_stride +
             tile.head_k * array.head_stride;
    };
    pack_keys<Atom>(start(params.k), params.k.row_stride, count, params.head_dim, keys);
    pack_values<Atom>(start(params.v), params.v.row_stride, count, params.head_dim, values);
    packed_keys = ceil_div(count, panel_width) * panel_width;
  }

  // The keys of the packed tile, which begins at first_key, that some of `height` rows see: whole panels of them.
  template <bool masked>
  Span span_of(int row, int height, int first_key) const {
    if constexpr (!masked) return {0, tile_k};
    int const begin = mask.first_key(query_of(row)) - first_key;
    int const end = mask.end_key(query_of(min_of(row + height, rows) - 1)) - first_key;
    if (end <= 0 || begin >= packed_keys || begin >= end) return {0, 0};
    return {max_of(begin, 0) / panel_width * panel_width,
            min_of(ceil_div(end, panel_width) * panel_width, packed_keys)};
  }

  // Rows [row, row + strip_rows) with the packed tile of keys, which begins at first_key. Panels of keys and of values
  // pass through the first-level cache once for the strip, whose scores stay there.
  template <bool masked>
  void strip(int row, int first_key) {
    constexpr int blocks = strip_rows / block_rows;
    Span span[blocks];
    int height[blocks];
    float ratio[strip_rows];
    int const count = min_of(ceil_div(rows - row, block_rows), blocks);
    for (int b = 0; b < count; ++b) {
      height[b] = block_height(rows - row - b * block_rows);
      span[b] = span_of<masked>(row + b * block_rows, height[b], first_key);
    }

    for (int k = 0; k < packed_keys; k += panel_width) {
      for (int b = 0; b < count; ++b) {
        if (k < span[b].begin || k >= span[b].end) continue;
        scores_of_block<Atom>(height[b], queries + (row + b * block_rows) * depth, keys + k * depth, depth,
                              scores + b * block_rows * tile_k + k);
      }
    }

    for (int b = 0; b < count; ++b) {
      for (int i = b * block_rows; i < b * block_rows + height[b]; ++i) {
        if (row + i >= rows || span[b].begin == span[b].end) {
          ratio[i] = 1.0f;  // a row that is not there, or a block that sees nothing here
          continue;
        }
        int const first = masked ? clamp_to(mask.first_key(query_of(row + i)) - first_key, 0, tile_k) : 0;
        int const end = masked ? clamp_to(mask.end_key(query_of(row + i)) - first_key, 0, tile_k) : tile_k;
        ratio[i] = softmax_row<masked, Atom>(score, scores + i * tile_k, span[b], first, end, state[row + i]);
      }
    }

    const Lane* panel = values;
    for (int c = 0; c < out_stride; c += panel_width) {
      int const width = min_of(panel_width, out_stride - c);
      for (int b = 0; b < count; ++b) {
        if (span[b].begin == span[b].end) continue;
        output_of_block<Atom>(
            width / lanes, height[b],
            reinterpret_cast<const Lane*>(scores + b * block_rows * tile_k) + span[b].begin / Atom::depth,
            panel + span[b].begin / Atom::depth * width, (span[b].end - span[b].begin) / Atom::depth,
            ratio + b * block_rows, out + (row + b * block_rows) * out_stride + c, out_stride);
      }
      panel += packed_keys / Atom::depth * width;
    }
  }

  void write() const {
    T* const array = static_cast<T*>(params.o.data);
    for (int row = 0; row < rows; ++row) {
      SoftmaxRow const total = {state[row].max, sum_across(state[row].sum)};
      narrow(out + row * out_stride, total.inverse_sum(), params.head_dim, array + offset_of(params.o, row));
      if (params.lse) {
        int64_t const head = tile.sequence.batch * params.heads_q + tile.head + row % tile.heads;
        params.lse[head * params.seqlen_q + tile.sequence.first_q + query_of(row)] = total.lse(score.factor);
      }
    }
  }
};

// One tile of few rows, numbered as Forward's, over the tiles of keys [key_tiles.begin, key_tiles.end).
template <typename T, typename Atom, typename Score>
struct ForwardFew {
  using Lane = typename Atom::Lane;
  static constexpr int blocks = few_rows / 4;

  const ForwardParams& params;
  const QueryTile& tile;
  Mask mask;
  Score score;
  int rows, depth;
  Lane* queries;  // [row][depth]
  float* out;     // [row][head_dim]
  float* scores;  // [tile_k][4], then the weights
  FewRows state[blocks];

  ForwardFew(const ForwardParams& p, const QueryTile& t, float* scratch)
      : params(p),
        tile(t),
        mask(Mask::make(t.sequence.seqlen_q, t.sequence.seqlen_k, p.window_left, p.window_right)),
        score(Score::make(p.scale, p.softcap)),
        rows(t.queries * t.heads),
        depth(p.head_dim / Atom::depth),
        queries(reinterpret_cast<Lane*>(scratch)),
        out(scratch + few_rows * max_head_dim),
        scores(out + few_rows * max_head_dim) {}

  static_assert(few_rows_head_dim % Dot<Atom, T>::step == 0);
  static bool takes(const ForwardParams& p, const QueryTile& t) {
    return t.queries * t.heads <= few_rows && p.head_dim % few_rows_head_dim == 0;
  }

  int query_of(int row) const { return tile.q_begin + row / tile.heads; }

  template <typename Pointer>
  int64_t offset_of(const Rows<Pointer>& array, int row) const {
    return tile.sequence.batch * array.batch_stride + (tile.sequence.first_q + query_of(row)) * array.row_stride +
           (tile.head + row % tile.heads) * array.head_stride;
  }

  void run() {
    Lane room[largest_row];
    for (int row = 0; row < few_rows; ++row) {
      const Lane* from = room;
      if (row < rows) {
        from =
            Row<Atom>::lanes_of(static_cast<const T*>(params.q.data) + offset_of(params.q, row), params.head_dim, room);
      }
      for (int d = 0; d < depth; ++d) queries[row * depth + d] = row < rows ? from[d] : Lane{};
    }
    for (int i = 0; i < few_rows * params.head_dim; ++i) out[i] = 0.0f;
    for (FewRows& s : state) s = {splat(minus_infinity()), splat(0.0f), {}};

    for (int t = tile.first_key_tile; t < tile.end_key_tile; ++t) {
      // The keys of the tile that some row sees.
      int const first_key = max_of(t * tile_k, mask.first_key(tile.q_begin));
      int const end_key = min_of((t + 1) * tile_k, mask.end_key(tile.q_begin + tile.queries - 1));
      for (int b = 0; b * 4 < rows && first_key < end_key; ++b) block(b, first_key, end_key - first_key);
    }
    tile.partial ? write_partial() : write();
  }

  template <typename Pointer>
  const T* start_of(const Pointer& array, int key) const {
    return static_cast<const T*>(array.data) + tile.sequence.batch * array.batch_stride +
           (tile.sequence.first_k + key) * array.row_stride + tile.head_k * array.head_stride;
  }

  // Four rows with the keys [first_key, first_key + count).
  void block(int b, int first_key, int count) {
    few_scores<Atom>(queries + 4 * b * depth, depth, params.head_dim, start_of(params.k, first_key),
                     params.k.row_stride, count, start_of(params.v, first_key), params.v.row_stride, scores);

    float index[lanes], first[lanes], end[lanes];
    for (int i = 0; i < lanes; ++i) {
      int const query = query_of(min_of(4 * b + i % 4, rows - 1));
      index[i] = static_cast<float>(i / 4);
      first[i] = static_cast<float>(clamp_to(mask.first_key(query) - first_key, 0, count));
      end[i] = static_cast<float>(clamp_to(mask.end_key(query) - first_key, 0, count));
    }
    // The weights are computed four vectors at a time: the last are filled up with keys that no row sees.
    constexpr int step = 4 * group_keys;
    int const padded = ceil_div(count, step) * step;
    Vec const nothing = splat(minus_infinity());
    Vec largest = nothing, key = load(index);
    for (int k = 0; k < padded; k += group_keys, key = key + splat(static_cast<float>(group_keys))) {
      Vec s = k < count ? transform(score, load(scores + 4 * k)) : nothing;
      s = where_less(key, load(first), nothing, s);
      s = where_less(key, load(end), s, nothing);
      store(scores + 4 * k, s);
      largest = larger(s, largest);
    }

    FewRows& rows_state = state[b];
    Vec const new_max = larger(of_four_rows(largest, true), rows_state.max);
    Vec const offset = where_less(nothing, new_max, new_max, splat(0.0f));
    Vec const ratio = exp2_of((rows_state.max - offset) * splat(score.factor));
    Vec sum = splat(0.0f);
    for (int k = 0; k < padded; k += step) {
      Vec weight[4];
#pragma GCC unroll 4
      for (int v = 0; v < 4; ++v) {
        weight[v] = (load(scores + 4 * (k + v * group_keys)) - offset) * splat(score.factor);
      }
      exp2_of(weight);
#pragma GCC unroll 4
      for (int v = 0; v < 4; ++v) {
        store(scores + 4 * (k + v * group_keys), weight[v]);
        sum = sum + weight[v];
      }
    }
    rows_state.max = new_max;
    rows_state.sum = rows_state.sum * ratio + sum;
    store(rows_state.ratio, ratio);
    few_outputs(scores, rows_state.ratio, start_of(params.v, first_key), params.v.row_stride, count, params.head_dim,
                out + 4 * b * params.head_dim);
  }

  SoftmaxRow total_of(int row) const {
    Vec const sums = of_four_rows(state[row / 4].sum, false);
    return {lane(state[row / 4].max, row % 4), lane(sums, row % 4)};
  }

  void write() const {
    T* const array = static_cast<T*>(params.o.data);
    for (int row = 0; row < rows; ++row) {
      SoftmaxRow const total = total_of(row);
      narrow(out + row * params.head_dim, total.inverse_sum(), params.head_dim, array + offset_of(params.o, row));
      if (params.lse) {
        int64_t const head = tile.sequence.batch * params.heads_q + tile.head + row % tile.heads;
        params.lse[head * params.seqlen_q + tile.sequence.first_q + query_of(row)] = total.lse(score.factor);
      }
    }
  }

  void write_partial() const {
    for (int row = 0; row < rows; ++row) {
      SoftmaxRow const total = total_of(row);
      float* const to = tile.partial + row * (params.head_dim + 2);
      to[0] = total.max;
      to[1] = total.sum;
      for (int d = 0; d < params.head_dim; ++d) to[2 + d] = out[row * params.head_dim + d];
    }
  }

  // Merges the partial results of `tile.parts` tasks, in the order of their keys, into the first.
  static void merge(const ForwardParams& p, const QueryTile& t, float* scratch) {
    ForwardFew result(p, t, scratch);
    int const stride = p.head_dim + 2;
    for (int row = 0; row < result.rows; ++row) {
      float* const first = t.partial + row * stride;
      float largest = first[0];
      for (int i = 1; i < t.parts; ++i) {
        float const max = first[static_cast<int64_t>(i) * few_rows * stride];
        largest = max > largest ? max : largest;
      }
      float const offset = largest == minus_infinity() ? 0.0f : largest;
      float sum = 0.0f;
      float* const to = result.out + row * p.head_dim;
      for (int d = 0; d < p.head_dim; ++d) to[d] = 0.0f;
      for (int i = 0; i < t.parts; ++i) {
        const float* const part = first + static_cast<int64_t>(i) * few_rows * stride;
        float const weight = lane_exp2((part[0] - offset) * result.score.factor);
        sum += weight * part[1];
        for (int d = 0; d < p.head_dim; ++d) to[d] += weight * part[2 + d];
      }
      FewRows& state = result.state[row / 4];
      if (row % 4 == 0) state = {splat(minus_infinity()), splat(0.0f), {}};
      float lanes_max[lanes], lanes_sum[lanes];
      store(lanes_max, state.max);
      store(lanes_sum, state.sum);
      lanes_max[row % 4] = largest;
      lanes_sum[row % 4] = sum;
      state.max = load(lanes_max);
      state.sum = load(lanes_sum);
    }
    result.write();
  }
};

template <typename T, typename Atom, typename Score>
void forward_as(const ForwardParams& params, const QueryTile& tile, float* scratch) {
  using Few = ForwardFew<T, Atom, Score>;
  if (tile.parts > 0) {
    Few::merge(params, tile, scratch);
  } else if (Few::takes(params, tile)) {
    Few(params, tile, scratch).run();
  } else {
    Forward<T, Atom, Score>(params, tile, scratch).run();
  }
}

template <typename T, typename Atom>
void forward_of(const ForwardParams& params, const QueryTile& tile, float* scratch) {
  if (params.scale > 0.0f && params.softcap == 0.0f) {
    forward_as<T, Atom, PlainScore>(params, tile, scratch);
  } else {
    forward_as<T, Atom, CappedScore>(params, tile, scratch);
  }
}

}  // namespace

namespace FLASHCORE_CPU_NAMESPACE {

void forward_tile(const ForwardParams& params, const QueryTile& tile, Element element, float* scratch) {
  switch (element) {
    case Element::float32:
      return forward_of<float, FloatAtom>(params, tile, scratch);
    case Element::float16:
      return forward_of<Half, FloatAtom>(params, tile, scratch);
    case Element::bfloat16:
#if defined(__AVX512BF16__)
      return forward_of<BFloat, BFloatAtom>(params, tile, scratch);
#else
      return forward_of<BFloat, FloatAtom>(params, tile, scratch);
#endif
  }
}

}  // namespace FLASHCORE_CPU_NAMESPACE
}  // namespace flashcore::cpu

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
#include "cpu/tile_rows.h"
#if defined(__AMX_BF16__)
#include "cpu/few_rows_amx.h"
#include "cpu/forward_amx.h"
#endif

namespace flashcore::cpu {
namespace {

static_assert(tile_q % block_rows == 0 && strip_rows % block_rows == 0 && tile_k % panel_width == 0);
static_assert(largest_row == max_head_dim);

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

// One tile of queries.
template <typename T, typename Atom, typename Score>
struct Forward : TileRows<T, Score> {
  using Lane = typename Atom::Lane;
  using Base = TileRows<T, Score>;
  using Base::mask, Base::key_row, Base::offset_of, Base::params, Base::query_of, Base::rows, Base::score, Base::tile;

  int depth;                        // lanes of the first product
  int out_stride;                   // head_dim in whole vectors
  Lane* queries;                    // [block][depth][block_rows]
  float* out;                       // [row][out_stride]
  Lane* keys;                       // [panel][depth][panel_width]
  Lane* values;                     // [panel][key / Atom::depth][column]
  float* scores;                    // [strip_rows][tile_k], and the weights in their place
  T* gathered;                      // [tile_k][head_dim]: rows that lie in pages
  RowStates<tile_q + lanes> state;  // whole vectors may reach over the end
  int packed_keys = 0;              // keys of the packed tile, in whole panels

  Forward(const ForwardParams& p, const QueryTile& t, float* scratch)
      : Base(p, t), depth(ceil_div(p.head_dim, Atom::depth)), out_stride(ceil_div(p.head_dim, lanes) * lanes) {
    queries = reinterpret_cast<Lane*>(scratch);
    out = scratch + tile_q * max_head_dim;
    keys = reinterpret_cast<Lane*>(out + tile_q * max_head_dim);
    values = keys + tile_k * max_head_dim;
    scores = reinterpret_cast<float*>(values + tile_k * max_head_dim);
    gathered = reinterpret_cast<T*>(scores + strip_rows * tile_k);
    static_assert((2 * tile_q + 3 * tile_k) * max_head_dim + strip_rows * tile_k <= scratch_floats);
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
    auto const packed = [&](const Rows<const void*>& array, auto pack_rows) {
      if (!tile.sequence.pages) return pack_rows(key_row(array, first_key), array.row_stride);
      for (int k = 0; k < count; ++k) {
        memcpy(gathered + k * params.head_dim, key_row(array, first_key + k), params.head_dim * sizeof(T));
      }
      pack_rows(gathered, params.head_dim);
    };
    packed(params.k,
           [&](const T* from, int64_t stride) { pack_keys<Atom>(from, stride, count, params.head_dim, keys); });
    packed(params.v,
           [&](const T* from, int64_t stride) { pack_values<Atom>(from, stride, count, params.head_dim, values); });
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
    float ratio[strip_rows + lanes];
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

    softmax<masked>(row, first_key, count, height, span, ratio);

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

  // The scores of a strip become weights.
  template <bool masked>
  FLASHCORE_HD void softmax(int row, int first_key, int count, const int* height, const Span* span, float* ratio) {
#if defined(__AVX512F__) && defined(__GNUC__)
    if constexpr (!masked) {
      for (int i = 0; i < count * block_rows; i += sixteen) {
        int const here = min_of(sixteen, min_of(rows - row, count * block_rows) - i);
        softmax_rows<Atom>(score, here, scores + i * tile_k, tile_k, span[0], state.max + row + i, state.sum + row + i,
                           ratio + i);
      }
      return;
    }
#endif
    for (int b = 0; b < count; ++b) {
      for (int i = b * block_rows; i < b * block_rows + height[b]; ++i) {
        if (row + i >= rows || span[b].begin == span[b].end) {
          ratio[i] = 1.0f;  // a row that is not there, or a block that sees nothing here
          continue;
        }
        int const first = masked ? clamp_to(mask.first_key(query_of(row + i)) - first_key, 0, tile_k) : 0;
        int const end = masked ? clamp_to(mask.end_key(query_of(row + i)) - first_key, 0, tile_k) : tile_k;
        ratio[i] = softmax_row<masked, Atom>(score, scores + i * tile_k, reinterpret_cast<Lane*>(scores + i * tile_k),
                                             span[b], first, end, state.max[row + i], state.sum[row + i]);
      }
    }
  }

  void write() const {
    for (int row = 0; row < rows; ++row) {
      this->write_row(out + row * out_stride, {state.max[row], state.sum[row]}, row);
    }
  }
};

// Tiles of few rows, of several key heads, over the tiles of keys that the task is to take.
template <typename T, typename Atom, typename Score>
struct ForwardFew : TileRows<T, Score> {
  using Lane = typename Atom::Lane;
  using Base = TileRows<T, Score>;
  using Base::mask, Base::key_row, Base::offset_of, Base::params, Base::query_of, Base::rows, Base::score, Base::tile;
  static constexpr int blocks = few_rows / 4;
  // Keys of which all heads are worked on before the next keys. The heads of a key lie side by side; one head's are
  // 2 KiB apart, more than the processor foresees, so that the next keys are fetched while these are worked on. (8
  // sequences of 8,192 keys, 8 heads of 128, bfloat16, two threads: 42% of what reading alone takes when all heads were
  // first copied in the order of memory, 54% with the next keys fetched meanwhile, 70% used where they lie, on tile
  // registers too while each head was finished before the next; fetched into the first-level cache instead: 0.6 times
  // as fast. In stages of all heads, on_tiles(), one thread reads 14.1 GB/s where it read 11.5, of 15 without any work;
  // 64 keys are no faster.)
  static constexpr int step_keys = 32;
  static constexpr int weigh_keys = 4 * group_keys;  // of which weights are made side by side
  static constexpr int score_floats = most_key_heads * few_rows * max_of(step_keys, tile_k / most_key_heads);
  static_assert(few_rows_head_dim % Dot<Atom, T>::step == 0);

  int depth;
  Lane* queries;       // [key head][row][depth]
  float* out;          // [key head][row][head_dim]
  float* scores;       // [tile_k][4], then the weights; where products are on tile registers of all heads
  Lane* tile_queries;  // [key head][row / 4][depth][4], where products are on tile registers
  FewRows state[most_key_heads][blocks];
  Span seen_by_all{};  // keys of the sequence

  ForwardFew(const ForwardParams& p, const QueryTile& t, float* scratch)
      : Base(p, t),
        depth(p.head_dim / Atom::depth),
        queries(reinterpret_cast<Lane*>(scratch)),
        out(scratch + most_key_heads * few_rows * max_head_dim),
        scores(out + most_key_heads * few_rows * max_head_dim),
        tile_queries(reinterpret_cast<Lane*>(scores + score_floats)) {
    static_assert(3 * most_key_heads * few_rows * max_head_dim + score_floats <= scratch_floats);
  }

  // Whatever tiles a sequence with more queries is divided into, none of them is this one's, or its bits would depend
  // on that.
  static bool takes(const ForwardParams& p, const QueryTile& t) {
    return t.sequence.seqlen_q * t.heads <= few_rows && p.head_dim % few_rows_head_dim == 0;
  }

  Lane* queries_of(int key_head, int row) const { return queries + (key_head * few_rows + row) * depth; }
  Lane* tile_queries_of(int key_head, int b) const { return tile_queries + (key_head * blocks + b) * 4 * depth; }
  float* out_of(int key_head, int row) const { return out + (key_head * few_rows + row) * params.head_dim; }

#if defined(__AMX_BF16__)
  static constexpr bool has_tiles = Atom::depth == 2;  // bfloat16
#else
  static constexpr bool has_tiles = false;
#endif

  void run() {
#if defined(__AMX_BF16__)
    if constexpr (has_tiles) {
      TileRegisters const registers(few_shapes);
      return pass();
    }
#endif
    pass();
  }

  void pass() {
    Lane room[largest_row];
    for (int h = 0; h < tile.key_heads; ++h) {
      for (int row = 0; row < few_rows; ++row) {
        const Lane* from = room;
        if (row < rows) {
          from = Row<Atom>::lanes_of(static_cast<const T*>(params.q.data) + offset_of(params.q, row, h),
                                     params.head_dim, room);
        }
        for (int d = 0; d < depth; ++d) queries_of(h, row)[d] = row < rows ? from[d] : Lane{};
      }
      for (int b = 0; b < blocks; ++b) clear(h, b);
#if defined(__AMX_BF16__)
      if constexpr (has_tiles) {
        for (int b = 0; b < blocks; ++b) few_queries(queries_of(h, 4 * b), depth, tile_queries_of(h, b));
      }
#endif
    }

    // The keys that some row sees.
    int const begin = max_of(tile.first_key_tile * tile_k, mask.first_key(tile.q_begin));
    int const end = min_of(tile.end_key_tile * tile_k, mask.end_key(tile.q_begin + tile.queries - 1));
    seen_by_all = {mask.first_key(query_of(rows - 1)), mask.end_key(query_of(0))};
    bool const side_by_side = params.k.head_stride == params.head_dim && params.v.head_stride == params.head_dim;
    bool const fetches = tile.key_heads > 1 ? side_by_side : tile.sequence.pages != nullptr;
    for (int key = begin, count = keys_from(begin, end); key < end;) {
      int const next = key + count, following = keys_from(next, end);
      Ahead ahead{*this, next, fetches ? following : 0};
#if defined(__AMX_BF16__)
      if constexpr (has_tiles) on_tiles(key, count, ahead);
#endif
      for (int h = 0; h < tile.key_heads && !has_tiles; ++h) {
        for (int b = 0; b * 4 < rows; ++b) block(h, b, key, count, ahead);
      }
      key = next;
      count = following;
    }
#if defined(__AMX_BF16__)
    for (int h = 0; h < tile.key_heads && has_tiles; ++h) {
      for (int b = 0; b * 4 < rows; ++b) mend(h, b, begin, end);
    }
#endif
    tile.partial ? write_partial() : write();
  }

  void clear(int key_head, int b) {
    for (int i = 0; i < 4 * params.head_dim; ++i) out_of(key_head, 4 * b)[i] = 0.0f;
    state[key_head][b] = {splat(minus_infinity()), splat(0.0f), {}};
  }

  // How many keys from `key` on are worked on together: they lie in one page.
  int keys_from(int key, int end) const {
    int const most = tile.key_heads > 1 || tile.sequence.pages ? step_keys : tile_k;
    int const count = clamp_to(end - key, 0, most);
    return tile.sequence.pages ? min_of(count, tile.sequence.page_size - key % tile.sequence.page_size) : count;
  }

  // Fetches the keys [key, key + count) and their values into the second-level cache, some lines at each call.
  struct Ahead {
    // That the calls of a step come to, up to four rows of queries a key head.
    static constexpr int lines = has_tiles ? 16 : 2 * sizeof(T);
    const ForwardFew& few;
    int key, count;
    int row = 0;  // of keys, then of values
    const char* at = nullptr;
    const char* end = nullptr;

    void operator()() {
      for (int left = lines; left > 0;) {
        if (at >= end && !begin_row()) return;
        for (; left > 0 && at < end; --left, at += 64) fetch(at);
      }
    }

    bool begin_row() {
      if (row == 2 * count) return false;
      Rows<const void*> const& array = row < count ? few.params.k : few.params.v;
      at = reinterpret_cast<const char*>(few.key_row(array, key + (row < count ? row : row - count)));
      end = at + sizeof(T) * few.tile.key_heads * few.params.head_dim;
      ++row;
      return true;
    }
  };

  // Four rows with the keys [first_key, first_key + count).
  void block(int key_head, int b, int first_key, int count, auto& ahead) {
    few_scores<Atom>(queries_of(key_head, 4 * b), depth, params.head_dim, key_row(params.k, first_key, key_head),
                     params.k.row_stride, count, scores, ahead);
    weigh(key_head, b, first_key, count, scores);
    few_outputs(Atom{}, scores, state[key_head][b].ratio, key_row(params.v, first_key, key_head), params.v.row_stride,
                count, params.head_dim, out_of(key_head, 4 * b), ahead);
  }

  // Scores of four rows and keys become weights, filled up with zeros to a multiple of weigh_keys.
  FLASHCORE_HD void weigh(int key_head, int b, int first_key, int count, float* of_keys) {
    Vec const nothing = splat(minus_infinity());
    Vec largest = nothing;
    int const padded = ceil_div(count, weigh_keys) * weigh_keys;
    if (Score::plain && padded == count && seen_by_all.begin <= first_key && first_key + count <= seen_by_all.end) {
      for (int k = 0; k < count; k += group_keys) largest = larger(load(of_keys + 4 * k), largest);
    } else {
      float index[lanes], first[lanes], end[lanes];
      for (int i = 0; i < lanes; ++i) {
        int const query = query_of(min_of(4 * b + i % 4, rows - 1));
        index[i] = static_cast<float>(i / 4);
        first[i] = static_cast<float>(clamp_to(mask.first_key(query) - first_key, 0, count));
        end[i] = static_cast<float>(clamp_to(mask.end_key(query) - first_key, 0, count));
      }
      Vec key = load(index);
      for (int k = 0; k < padded; k += group_keys, key = key + splat(static_cast<float>(group_keys))) {
        Vec s = k < count ? transform(score, load(of_keys + 4 * k)) : nothing;
        s = where_less(key, load(first), nothing, s);
        s = where_less(key, load(end), s, nothing);
        store(of_keys + 4 * k, s);
        largest = larger(s, largest);
      }
    }

    FewRows& rows_state = state[key_head][b];
    Vec const new_max = larger(of_four_rows(largest, true), rows_state.max);
    Vec const offset = where_less(nothing, new_max, new_max, splat(0.0f));
    Vec const ratio = exp2_of((rows_state.max - offset) * splat(score.factor));
    Vec sum = splat(0.0f);
    for (int k = 0; k < padded; k += weigh_keys) {
      Vec weight[4];
#pragma GCC unroll 4
      for (int v = 0; v < 4; ++v) {
        weight[v] = (load(of_keys + 4 * (k + v * group_keys)) - offset) * splat(score.factor);
      }
      exp2_of(weight);
#pragma GCC unroll 4
      for (int v = 0; v < 4; ++v) {
        store(of_keys + 4 * (k + v * group_keys), weight[v]);
        sum = sum + weight[v];
      }
    }
    rows_state.max = new_max;
    rows_state.sum = rows_state.sum * ratio + sum;
    store(rows_state.ratio, ratio);
  }

#if defined(__AMX_BF16__)
  // All rows with the keys [first_key, first_key + count). Each stage waits for the one before, through memory: so each
  // is done for all heads before the next.
  void on_tiles(int first_key, int count, Ahead& ahead) {
    auto const for_each = [&](auto stage) {
      float* of_keys = scores;
      for (int h = 0; h < tile.key_heads; ++h) {
        for (int b = 0; b * 4 < rows; ++b, of_keys += 4 * ceil_div(count, weigh_keys) * weigh_keys) {
          stage(h, b, of_keys);
        }
      }
    };
    for_each([&](int h, int b, float* of_keys) {
      few_tile_scores(tile_queries_of(h, b), params.head_dim, key_row(params.k, first_key, h), params.k.row_stride,
                      count, of_keys, ahead);
    });
    for_each([&](int h, int b, float* of_keys) { weigh(h, b, first_key, count, of_keys); });
    for_each([&](int h, int b, const float* of_keys) {
      few_tile_outputs(of_keys, state[h][b].ratio, key_row(params.v, first_key, h), params.v.row_stride, count,
                       params.head_dim, out_of(h, 4 * b), ahead);
    });
  }

  // Tiles have made NaN of what is beside a value that is not finite. Rows that have one are computed once more, on
  // vectors; the others keep their bits.
  void mend(int key_head, int b, int begin, int end) {
    float* const here = out_of(key_head, 4 * b);
    few_tile_rows(here, params.head_dim);
    bool suspect[4] = {}, any = false;
    for (int i = 0; i < 4 * params.head_dim; ++i) {
      if (here[i] != here[i]) suspect[i / params.head_dim] = any = true;
    }
    if (!any) return;
    float kept[4 * largest_row];
    memcpy(kept, here, sizeof(float) * 4 * params.head_dim);
    FewRows const before = state[key_head][b];
    clear(key_head, b);
    struct {
      void operator()() const {}
    } nothing;
    for (int key = begin, count; key < end; key += count) {
      count = keys_from(key, end);
      block(key_head, b, key, count, nothing);
    }
    FewRows& after = state[key_head][b];
    for (int r = 0; r < 4; ++r) {
      if (suspect[r]) continue;
      memcpy(here + r * params.head_dim, kept + r * params.head_dim, sizeof(float) * params.head_dim);
      float row[lanes];
      for (int i = 0; i < lanes; ++i) row[i] = i % 4 == r ? 0.0f : 1.0f;
      after.max = where_less(load(row), splat(0.5f), before.max, after.max);
      after.sum = where_less(load(row), splat(0.5f), before.sum, after.sum);
    }
  }
#endif

  SoftmaxRow total_of(int key_head, int row) const {
    FewRows const& rows_state = state[key_head][row / 4];
    Vec const sums = of_four_rows(rows_state.sum, false);
    return {lane(rows_state.max, row % 4), lane(sums, row % 4)};
  }

  void write() const {
    for (int h = 0; h < tile.key_heads; ++h) {
      for (int row = 0; row < rows; ++row) this->write_row(out_of(h, row), total_of(h, row), row, h);
    }
  }

  float* partial_of(int key_head, int row) const {
    return tile.partial + (key_head * few_rows + row) * (params.head_dim + 2);
  }

  void write_partial() const {
    for (int h = 0; h < tile.key_heads; ++h) {
      for (int row = 0; row < rows; ++row) {
        SoftmaxRow const total = total_of(h, row);
        float* const to = partial_of(h, row);
        to[0] = total.max;
        to[1] = total.sum;
        for (int d = 0; d < params.head_dim; ++d) to[2 + d] = out_of(h, row)[d];
      }
    }
  }

  // Merges the partial results of `tile.parts` tasks, in the order of their keys, and writes what they make.
  void merge() {
    for (int h = 0; h < tile.key_heads; ++h) {
      for (int row = 0; row < rows; ++row) {
        const float* const first = partial_of(h, row);
        SoftmaxRow total;
        for (int i = 0; i < tile.parts; ++i) {
          float const max = first[i * tile.partial_floats];
          total.max = max > total.max ? max : total.max;
        }
        float const offset = total.max == minus_infinity() ? 0.0f : total.max;
        float* const to = out_of(h, row);
        for (int d = 0; d < params.head_dim; ++d) to[d] = 0.0f;
        for (int i = 0; i < tile.parts; ++i) {
          const float* const part = first + i * tile.partial_floats;
          float const weight = lane_exp2((part[0] - offset) * score.factor);
          total.sum += weight * part[1];
          for (int d = 0; d < params.head_dim; ++d) to[d] += weight * part[2 + d];
        }
        this->write_row(to, total, row, h);
      }
    }
  }
};

template <typename T, typename Atom, typename Score>
void forward_as(const ForwardParams& params, const QueryTile& tile, float* scratch) {
  using Few = ForwardFew<T, Atom, Score>;
  if (tile.parts > 0) {
    Few(params, tile, scratch).merge();
  } else if (Few::takes(params, tile)) {
    Few(params, tile, scratch).run();
  } else {
#if defined(__AMX_BF16__)
    if (ForwardTiles<T, Score>(params, tile, scratch).run()) return;
#endif
    QueryTile part = tile;
    for (int const end = tile.q_begin + tile.queries; part.q_begin < end; part.q_begin += tile_q) {
      part.queries = min_of(tile_q, end - part.q_begin);
      Forward<T, Atom, Score>(params, part, scratch).run();
    }
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

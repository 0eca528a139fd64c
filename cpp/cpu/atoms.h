// SPDX-License-Identifier: Apache-2.0
// The MMA atoms of the processor: outer products that keep a block of the result in registers. An atom's lane is 32
// bits of the inner dimension: one float, or two bfloat16 that the processor multiplies and adds at once.
#pragma once

#include "cpu/tile_rows.h"

#if defined(__AVX512BF16__)
#include <immintrin.h>
#endif

namespace flashcore::cpu {
namespace {

constexpr int block_rows = 6;  // rows of the largest register block; it is panel_width wide

struct FloatAtom {
  using Lane = float;
  using Wide = Vec;
  static constexpr int depth = 1;  // elements of the inner dimension in a lane

  FLASHCORE_HD static Wide load_wide(const Lane* p) { return load(p); }
  FLASHCORE_HD static Wide splat_wide(Lane x) { return splat(x); }
  FLASHCORE_HD static Vec multiply_add(Wide a, Wide b, Vec c) { return a * b + c; }
  // A panel of weights, from key k on, as the second product's left operand.
  FLASHCORE_HD static void store_weights(Lane* row, int k, const Vec (&weights)[panel_vectors]) {
#pragma GCC unroll 4
    for (int v = 0; v < panel_vectors; ++v) store(row + k + v * lanes, weights[v]);
  }
};

#if defined(__AVX512BF16__)
struct BFloatAtom {
  using Lane = uint32_t;
  using Wide = __m512i;
  static constexpr int depth = 2;

  FLASHCORE_HD static Wide load_wide(const Lane* p) { return _mm512_loadu_si512(p); }
  FLASHCORE_HD static Wide splat_wide(Lane x) { return _mm512_set1_epi32(static_cast<int>(x)); }
  FLASHCORE_HD static Vec multiply_add(Wide a, Wide b, Vec c) {
    return (Vec)_mm512_dpbf16_ps((__m512)c, (__m512bh)a, (__m512bh)b);
  }
  FLASHCORE_HD static void store_weights(Lane* row, int k, const Vec (&weights)[panel_vectors]) {
#pragma GCC unroll 2
    for (int v = 0; v < panel_vectors; v += 2) {
      _mm512_storeu_si512(row + (k + v * lanes) / depth,
                          (__m512i)_mm512_cvtne2ps_pbh((__m512)weights[v + 1], (__m512)weights[v]));
    }
  }
};
#endif

// acc[r][v] += Σ_k a[k · a_step + r · a_row] · b[k][v]: `rows` rows of a with a panel of b, `vectors` vectors wide.
template <typename Atom, int rows, int vectors, int a_step, int a_row>
FLASHCORE_HD void outer_products(const typename Atom::Lane* a, const typename Atom::Lane* b, int depth,
                                 Vec (&acc)[rows][vectors]) {
  for (int k = 0; k < depth; ++k) {
    typename Atom::Wide row_of_b[vectors];
#pragma GCC unroll 4
    for (int v = 0; v < vectors; ++v) row_of_b[v] = Atom::load_wide(b + v * lanes);
#pragma GCC unroll 6
    for (int r = 0; r < rows; ++r) {
      typename Atom::Wide const element = Atom::splat_wide(a[r * a_row]);
#pragma GCC unroll 4
      for (int v = 0; v < vectors; ++v) acc[r][v] = Atom::multiply_add(element, row_of_b[v], acc[r][v]);
    }
    a += a_step;
    b += vectors * lanes;
  }
}

// The longest sum that the first product keeps in one chain, since the rounding error of a chain grows with its length.
// PyTorch's products are the measure: at a head dimension of 256 they have 0.6 times the error of a single chain, and
// with few queries (then vectors are multiplied, with many partial sums) a third. Shorter chains cost a full block
// time.
FLASHCORE_HD int chain_of(int depth, int rows) { return rows < block_rows ? 16 : depth > 128 ? 64 : depth; }

// The first product: scores (rows x one panel) = queries (packed, block_rows to a step) · keys (a packed panel).
template <typename Atom, int rows>
void score_block(const typename Atom::Lane* queries, const typename Atom::Lane* keys, int depth, float* scores,
                 int stride) {
  int const chain = chain_of(depth, rows);
  for (int begin = 0; begin < depth; begin += chain) {
    Vec acc[rows][panel_vectors] = {};
    outer_products<Atom, rows, panel_vectors, block_rows, 1>(queries + begin * block_rows, keys + begin * panel_width,
                                                             min_of(chain, depth - begin), acc);
#pragma GCC unroll 6
    for (int r = 0; r < rows; ++r) {
#pragma GCC unroll 4
      for (int v = 0; v < panel_vectors; ++v) {
        float* const to = scores + r * stride + v * lanes;
        store(to, begin == 0 ? acc[r][v] : load(to) + acc[r][v]);
      }
    }
  }
}

// The second product: out (rows x `vectors`) = ratio · out + weights (row-major, `weight_stride` to a row) · values (a
// packed panel). Each tile's sum starts from zero, so that no chain is longer than a tile.
template <typename Atom, int rows, int vectors, int weight_stride>
void output_block(const typename Atom::Lane* weights, const typename Atom::Lane* values, int depth, const float* ratio,
                  float* out, int stride) {
  Vec acc[rows][vectors] = {};
  outer_products<Atom, rows, vectors, 1, weight_stride>(weights, values, depth, acc);
#pragma GCC unroll 6
  for (int r = 0; r < rows; ++r) {
#pragma GCC unroll 4
    for (int v = 0; v < vectors; ++v) {
      float* const to = out + r * stride + v * lanes;
      store(to, load(to) * splat(ratio[r]) + acc[r][v]);
    }
  }
}

}  // namespace
}  // namespace flashcore::cpu

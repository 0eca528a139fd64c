// SPDX-License-Identifier: Apache-2.0
// What a warp of the sm80 decode kernel does with its 16 keys of a tile, and the values of them: the products with all
// rows of queries, and the rows' online softmax. And how new keys and values get into the cache, on sm90, too.
#pragma once

#include "attention/quad.cuh"
#include "attention/softmax.h"
#include "sm80/decode_params.h"
#include "sm80/tensor_core.h"

namespace flashcore::sm80 {

// `Tile` is how keys and values lie in shared memory: tile.right(offset, d) is d slices of 16 columns to the right.
// Queries lie in a SharedTile. All lanes call every member.
template <class Element, int head_dim, int slices, class Tile>
struct DecodeRows {
  using Queries = SharedTile<head_dim>;
  // The queries' operands stay in registers where there are enough.
  static constexpr bool q_in_registers = head_dim * slices <= 128;

  uint32_t q[slices][q_in_registers ? head_dim / 16 : 1][4];
  float o[slices][head_dim / 8][4];
  SoftmaxRow state[slices][2];

  // Begins an item whose queries lie at `from_q`, this lane's place in the first slice.
  __device__ __forceinline__ void start(uint32_t from_q) {
    if constexpr (q_in_registers) {
#pragma unroll
      for (int m = 0; m < slices; ++m) {
#pragma unroll
        for (int d = 0; d < head_dim / 16; ++d) {
          load_matrices(q[m][d], Queries::right(from_q, d) + m * 16 * Queries::row_bytes);
        }
      }
    }
    clear();
  }

  // No keys yet.
  __device__ __forceinline__ void clear() {
#pragma unroll
    for (int m = 0; m < slices; ++m) {
#pragma unroll
      for (int n = 0; n < head_dim / 8; ++n) {
#pragma unroll
        for (int i = 0; i < 4; ++i) o[m][n][i] = 0.0f;
      }
      state[m][0] = state[m][1] = SoftmaxRow{};
    }
  }

  // S = Q Kᵀ; `from_k` is this lane's place in the warp's keys. Where registers allow, two sums side by side halve the
  // chain of products that wait for each other.
  __device__ __forceinline__ void scores(float (&s)[slices][2][4], uint32_t from_q, Tile const& tile, uint32_t from_k) {
    constexpr int chains = slices == 1 && head_dim <= 128 ? 2 : 1;
    float sums[chains][slices][2][4] = {};
#pragma unroll
    for (int d = 0; d < head_dim / 16; ++d) {
      int const at_d = q_in_registers ? d : 0;
      if constexpr (!q_in_registers) {
#pragma unroll
        for (int m = 0; m < slices; ++m) {
          load_matrices(q[m][0], Queries::right(from_q, d) + m * 16 * Queries::row_bytes);
        }
      }
      uint32_t k[4];
      load_matrices(k, tile.right(from_k, d));
#pragma unroll
      for (int m = 0; m < slices; ++m) {
        multiply<Element>(sums[d % chains][m][0], q[m][at_d], k[0], k[1]);
        multiply<Element>(sums[d % chains][m][1], q[m][at_d], k[2], k[3]);
      }
    }
#pragma unroll
    for (int m = 0; m < slices; ++m) {
#pragma unroll
      for (int i = 0; i < 8; ++i) {
        s[m][i / 4][i % 4] = sums[0][m][i / 4][i % 4];
        if constexpr (chains == 2) s[m][i / 4][i % 4] += sums[1][m][i / 4][i % 4];
      }
    }
  }

  __device__ __forceinline__ void transform(float (&s)[slices][2][4], CappedScore const& score) const {
    score.transform_all([&](auto transform) {
#pragma unroll
      for (int m = 0; m < slices; ++m) {
#pragma unroll
        for (int i = 0; i < 8; ++i) s[m][i / 4][i % 4] = transform(s[m][i / 4][i % 4]);
      }
    });
  }

  // Takes away what a query does not see: `first` is the warp's first key, `first_row` the first row of the tile, and
  // `here` says whether the keys exist. token_of(r) is the token of row r of the key head.
  template <class TokenOf>
  __device__ __forceinline__ void hide(float (&s)[slices][2][4], Mask const& mask, int first, int first_row,
                                       TokenOf token_of, bool here, int lane) const {
    first += lane % 4 * 2;
#pragma unroll
    for (int m = 0; m < slices; ++m) {
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        int const token = token_of(first_row + lane / 4 + m * 16 + half * 8);
        int const first_key = mask.first_key(token) - first;
        int const end_key = here ? mask.end_key(token) - first : first_key;
#pragma unroll
        for (int n = 0; n < 2; ++n) {
#pragma unroll
          for (int i = 0; i < 2; ++i) {
            if (n * 8 + i < first_key || n * 8 + i >= end_key) s[m][n][2 * half + i] = minus_infinity();
          }
        }
      }
    }
  }

  // The keys' weights, by the rows' new maxima; sums and outputs so far are multiplied where a maximum rose.
  __device__ __forceinline__ void softmax(float (&s)[slices][2][4], uint32_t (&weights)[slices][4], float factor) {
    bool rose = false;
    float ratio[slices][2];
#pragma unroll
    for (int m = 0; m < slices; ++m) {
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        SoftmaxRow& row = state[m][half];
        float const top =
            fmaxf(fmaxf(s[m][0][2 * half], s[m][0][2 * half + 1]), fmaxf(s[m][1][2 * half], s[m][1][2 * half + 1]));
        ratio[m][half] = row.raise(fmaxf(row.max, quad_max(top)), factor);
        rose |= ratio[m][half] != 1.0f;
        float const offset = SoftmaxRow::offset(row.max, factor);
#pragma unroll
        for (int n = 0; n < 2; ++n) {
          float const low = exp2_of(s[m][n][2 * half] * factor - offset);
          float const high = exp2_of(s[m][n][2 * half + 1] * factor - offset);
          row.sum += low + high;
          weights[m][2 * n + half] = Precision<Element>::pack(low, high);
        }
      }
    }
    if (__any_sync(0xffffffffu, rose)) {
#pragma unroll
      for (int m = 0; m < slices; ++m) {
#pragma unroll
        for (int n = 0; n < head_dim / 8; ++n) {
#pragma unroll
          for (int i = 0; i < 4; ++i) o[m][n][i] *= ratio[m][i / 2];
        }
      }
    }
  }

  // O += P V; `from_v` is this lane's place in the warp's values.
  __device__ __forceinline__ void output(uint32_t const (&weights)[slices][4], Tile const& tile, uint32_t from_v) {
#pragma unroll
    for (int d = 0; d < head_dim / 16; ++d) {
      uint32_t v[4];
      load_matrices_transposed(v, tile.right(from_v, d));
#pragma unroll
      for (int m = 0; m < slices; ++m) {
        multiply<Element>(o[m][2 * d], weights[m], v[0], v[1]);
        multiply<Element>(o[m][2 * d + 1], weights[m], v[2], v[3]);
      }
    }
  }
};

// Copies the new keys and values behind those in the cache, 16 bytes at a time, the whole grid together, `threads` of
// each block. Nothing in this grid uses what is written: attention takes new rows from where they come from. `Index`
// holds all chunks' numbers and twice the grid's threads more.
template <class Element, class Index = int64_t>
__device__ __forceinline__ void append(KvCacheParams const& p, int threads) {
  Index const chunks = p.head_dim / 8;
  Index const count = Index(p.batch) * p.new_tokens * p.heads_k * chunks;
#pragma unroll 1
  for (Index i = Index(blockIdx.x) * threads + threadIdx.x; i < count; i += Index(gridDim.x) * threads) {
    Index const row = i / chunks, token_row = row / p.heads_k;
    int const chunk = static_cast<int>(i - row * chunks), head = static_cast<int>(row - token_row * p.heads_k);
    int const b = static_cast<int>(token_row / p.new_tokens), token = static_cast<int>(token_row % p.new_tokens);
    CachePlace const place = cache_place(p, b, cached_keys(p, b) + token);
    if (place.block < 0) continue;
    auto const copy = [&](Rows<void const*> const& from, Rows<void*> const& to) {
      Element const* const source = static_cast<Element const*>(from.data) + b * from.batch_stride +
                                    token * from.row_stride + head * from.head_stride + chunk * 8;
      Element* const target = static_cast<Element*>(to.data) + place.block * to.batch_stride +
                              place.row * to.row_stride + head * to.head_stride + chunk * 8;
      *reinterpret_cast<uint4*>(target) = *reinterpret_cast<uint4 const*>(source);
    };
    copy(p.new_k, p.k_out);
    copy(p.new_v, p.v_out);
  }
}

}  // namespace flashcore::sm80

// SPDX-License-Identifier: Apache-2.0
// The softmax without maxima, for the kernels of small problems: a row's weights are relative to the largest of its
// first scores that it sees, whatever comes after them, and floating point carries the difference. The sums come with
// the output, from a column of ones, so that they are of the weights that the product gets. At the end a row whose sum
// lies outside of the range in which nothing can have been lost is computed once more, with the online softmax.
#pragma once

#include "sm90/forward_softmax.cuh"

namespace flashcore::sm90 {

// Problems of fewer rows of queries than this keep to the maxima: then the largest weight, which counts most, is
// exactly 1, as it is in what the results are compared with. Over many rows its rounding does not stand out.
constexpr int64_t few_rows = 1024;

template <class Element>
struct Reference {
  static constexpr bool bfloat = std::is_same_v<Element, __nv_bfloat16>;
  static constexpr int seen = 16;  // scores of a lane, of two rows: 32 keys
  // The reference's own weight is 2^-slack. bfloat16 has float32's exponents; float16's weights lose bits below 2^-14
  // and end at 2^16, beyond which the sum is infinite.
  static constexpr float slack = bfloat ? 24.0f : 3.0f;

  // Whether a row can be taken as it is: its weights lost nothing, and float32 has room for outputs times 2^40.
  static __device__ __forceinline__ bool holds(float sum) {
    constexpr float least = bfloat ? 0x1p-25f : 0x1p-4f;
    return sum >= least && sum <= 0x1p40f;
  }

  // Gives rows that have none, whose maxima are -inf, one from these scores.
  template <int n>
  static __device__ __forceinline__ void find(float const* s, SoftmaxRow (&state)[2]) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      float top[2] = {s[2 * half], s[2 * half + 1]};
#pragma unroll
      for (int i = 1; i < n / 4; ++i) {
        top[0] = fmaxf(top[0], s[4 * i + 2 * half]);
        top[1] = fmaxf(top[1], s[4 * i + 2 * half + 1]);
      }
      float const found = quad_max(fmaxf(top[0], top[1]));
      if (state[half].max == minus_infinity()) state[half].max = found;
    }
  }
};

// The column of ones is a panel of 16 rows, which every 16 values have beside them: operand()'s panel stride leads
// there, and is this much less, and the address more, for the next 16.
constexpr int ones_bytes = 16 * row_bytes;
constexpr uint64_t next_16_values = ones_bytes / 16 - (uint64_t{ones_bytes / 16} << 16);

template <class Element>
__device__ __forceinline__ void fill_ones(void* ones) {
  uint32_t const one = Precision<Element>::pack(1.0f, 1.0f);
  for (int i = threadIdx.x; i < ones_bytes / 4; i += blockDim.x) static_cast<uint32_t*>(ones)[i] = one;
  cutlass::arch::fence_view_async_shared();
}

// d += a b in a warp: 16 rows by 8 columns over 16, whose accumulators lie as wgmma's do.
template <class Element>
__device__ __forceinline__ void multiply_in_warp(float* d, uint32_t const* a, uint32_t b0, uint32_t b1) {
#define FLASHCORE_MMA(type)                                                           \
  asm volatile("mma.sync.aligned.m16n8k16.row.col.f32." type "." type                 \
               ".f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};" \
               : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])                       \
               : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1))
  if constexpr (Reference<Element>::bfloat) {
    FLASHCORE_MMA("bf16");
  } else {
    FLASHCORE_MMA("f16");
  }
#undef FLASHCORE_MMA
}

// A warp's 16 rows, head dimension 64, over the keys [begin, end) with the online softmax: queries from the panel at
// `queries` in shared memory, where the warp's rows begin with `warp_row`, keys and values from their arrays. `query`
// is this lane's two rows' for the mask.
template <class Element, class Score>
__device__ __forceinline__ void attend_exactly(Arguments<Score> const& a, int sequence, int head_k, Mask const& mask,
                                               int const (&query)[2], int begin, int end, uint32_t queries,
                                               int warp_row, float* o, SoftmaxRow (&state)[2]) {
  constexpr int head_dim = 64;
  int thread;  // read anew: it would stay in a register during all that comes before
  asm volatile("mov.u32 %0, %%tid.x;" : "=r"(thread));
  int const lane = thread % 32, t = lane % 4, g = lane / 4;
  auto const head = [&](Rows<const void*> const& rows) {
    return static_cast<uint16_t const*>(rows.data) + sequence * rows.batch_stride + head_k * rows.head_stride;
  };
  uint16_t const *const keys = head(a.p.k) + 2 * t, *const values = head(a.p.v) + g;
  state[0] = {}, state[1] = {};
#pragma unroll
  for (int i = 0; i < head_dim / 2; ++i) o[i] = 0.0f;
#pragma unroll 1
  for (int key = begin; key < end; key += 16) {
    // Behind the last row that one again: its scores are hidden, its weights 0.
    auto const row = [&](int i) { return int64_t{min_of(key + i, a.p.seqlen_k - 1)}; };
    float s[8] = {}, ratio[2], offset[2];
#pragma unroll
    for (int j = 0; j < 2; ++j) {
      uint16_t const* const from = keys + row(8 * j + g) * a.p.k.row_stride;
      auto const pair = [&](int column) { return *reinterpret_cast<uint32_t const*>(from + column); };
#pragma unroll
      for (int d = 0; d < head_dim; d += 16) {
        uint32_t q[4];
        read_operand<row_bytes>(q, queries, warp_row + lane % 16, d / 8 + lane / 16);
        multiply_in_warp<Element>(s + 4 * j, q, pair(d), pair(d + 8));
      }
    }
    hide(s, visible(mask, query, key));
    raise_maxima(s, state, ratio, offset, a.score);
    uint32_t w[4];
#pragma unroll
    for (int i = 0; i < 8; ++i) {
      s[i] = exp2_of(s[i] * a.score.factor - offset[i / 2 % 2]);
      state[i / 2 % 2].sum += s[i];
    }
#pragma unroll
    for (int i = 0; i < 4; ++i) w[i] = Precision<Element>::pack(s[2 * i], s[2 * i + 1]);
#pragma unroll
    for (int i = 0; i < head_dim / 2; ++i) o[i] *= ratio[i / 2 % 2];
    uint16_t const* const from[4] = {values + row(2 * t) * a.p.v.row_stride, values + row(2 * t + 1) * a.p.v.row_stride,
                                     values + row(2 * t + 8) * a.p.v.row_stride,
                                     values + row(2 * t + 9) * a.p.v.row_stride};
#pragma unroll
    for (int n = 0; n < head_dim / 8; ++n) {
      auto const pair = [&](int i) { return from[i][8 * n] | uint32_t{from[i + 1][8 * n]} << 16; };
      multiply_in_warp<Element>(o + 4 * n, w, pair(0), pair(2));
      if (n % 2 == 1) __syncwarp();  // or all are loaded at once, into registers that there are not
    }
  }
#pragma unroll
  for (int half = 0; half < 2; ++half) state[half].sum = quad_sum(state[half].sum);
}

}  // namespace flashcore::sm90

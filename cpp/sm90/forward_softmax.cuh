// SPDX-License-Identifier: Apache-2.0
// A tile's scores in a warpgroup's registers: masks, maxima, weights and their sums.
#pragma once

#include "attention/quad.cuh"
#include "attention/softmax.h"
#include "sm90/forward_block.cuh"

namespace flashcore::sm90 {

// A lane's place in the accumulators of its warpgroup's 64 rows: x[4 n + i] is column 8 n + column() + i % 2 of row
// `row` + i / 2 · 8.
struct Lane {
  int row;  // in the tile of queries
  __device__ static int column() { return threadIdx.x % 4 * 2; }
};

// What a lane's two rows see of a tile: columns [first, end) of the accumulator's first pair.
struct Visible {
  int first[2], end[2];
};

// Of a tile whose keys begin at `tile`.
__device__ __forceinline__ Visible visible(Mask const& mask, int const (&query)[2], int tile) {
  Visible keys;
  int const origin = tile + Lane::column();
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    keys.first[half] = mask.first_key(query[half]) - origin;
    keys.end[half] = mask.end_key(query[half]) - origin;
  }
  return keys;
}

// Of the i-th tile of a job.
template <class Config>
__device__ __forceinline__ Visible visible(Arguments<typename Config::Score> const& a, Job const& job, Lane lane,
                                           int i) {
  int const query[2] = {job.first + a.query(lane.row), job.first + a.query(lane.row + 8)};
  return visible(job.mask, query, job.range.tile(i) * Config::tile_k);
}

// Sets the scores that the mask hides to −inf.
template <int n>
__device__ __forceinline__ void hide(float (&s)[n], Visible const& keys) {
#pragma unroll
  for (int i = 0; i < n; ++i) {
    if (i / 4 * 8 + i % 2 >= keys.end[i / 2 % 2]) s[i] = minus_infinity();
  }
  if (keys.first[0] <= 0 && keys.first[1] <= 0) return;
#pragma unroll
  for (int i = 0; i < n; ++i) {
    if (i / 4 * 8 + i % 2 < keys.first[i / 2 % 2]) s[i] = minus_infinity();
  }
}

// Caps or scales a tile's scores where the score asks for that. Before the mask: it would turn −inf into something
// else.
template <class Score, int n>
__device__ __forceinline__ void transform(float (&s)[n], Score const& score) {
  if constexpr (!Score::plain) {
    score.transform_all([&](auto transform) {
#pragma unroll
      for (int i = 0; i < n; ++i) s[i] = transform(s[i]);
    });
  }
}

// Takes a tile's scores into the rows' maxima. `ratio` is what the rows' sums and outputs so far are to be multiplied
// by (the sums are), `offset` what to subtract in the exponents.
template <class Score, int n>
__device__ __forceinline__ void raise_maxima(float (&s)[n], SoftmaxRow (&state)[2], float (&ratio)[2],
                                             float (&offset)[2], Score const& score) {
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    float top[2] = {state[half].max, s[2 * half]};
#pragma unroll
    for (int i = 0; i < n / 4; ++i) {
      top[0] = fmaxf(top[0], s[4 * i + 2 * half]);
      top[1] = fmaxf(top[1], s[4 * i + 2 * half + 1]);
    }
    ratio[half] = state[half].raise(quad_max(fmaxf(top[0], top[1])), score.factor);
    offset[half] = SoftmaxRow::offset(state[half].max, score.factor);
  }
}

// The scores s[begin] to s[end − 1] become weights 2^(factor · s − offset), cut where Config says so, and are added up:
// in four sums of a row, or the additions would wait for each other.
template <class Config, int begin, int end, int n>
__device__ __forceinline__ void steady_exponentials(float (&s)[n], float (&sums)[2][4], float const (&offset)[2],
                                                    float factor) {
  float const lifted[2] = {Config::lift - offset[0], Config::lift - offset[1]};
#pragma unroll
  for (int i = begin; i < end; ++i) {
    int const half = i / 2 % 2;
    s[i] = exp2_of(fmaf(s[i], factor, lifted[half]));
    if constexpr (Config::adds_sums) {
      if constexpr (Config::cuts) s[i] = __uint_as_float(__float_as_uint(s[i]) & Config::kept);
      sums[half][i / 4 % 4] += s[i];
    }
  }
}

// Turns scores into weights 2^(factor · s − offset) and adds them to the rows' sums.
template <class Config, int n>
__device__ __forceinline__ void exponentials(float (&s)[n], SoftmaxRow (&state)[2], float const (&offset)[2],
                                             float factor) {
#pragma unroll
  for (int i = 0; i < n; ++i) {
    s[i] = exp2_of(s[i] * factor - offset[i / 2 % 2]);
    if constexpr (Config::adds_sums) state[i / 2 % 2].sum += s[i];
  }
}

// For the tile whose weights `s` include one of 2 or more: moves the references of the rows that have one to their
// largest weight. What a row gets depends on that row alone. `o` and the sums so far, and `added`, this tile's sums,
// are put right. False where a weight of a row that the job has is near infinity: its score has risen by more than 66,
// in the natural exponent, over all of the tiles before, and what can be known of the others is lost.
template <class Config, int n, int columns>
__device__ __forceinline__ bool move_references(Arguments<typename Config::Score> const& a, int queries, Lane lane,
                                                float (&s)[n], float (&o)[columns], SoftmaxRow (&state)[2],
                                                float (&added)[2], float (&offset)[2]) {
  constexpr float near_infinity = 7.9e28f;  // 2^96: what moves a reference to 2^−slack stays a normal number
  bool good = true;
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    float top = 0.0f;
#pragma unroll
    for (int j = 0; j < n / 4; ++j) top = fmaxf(top, fmaxf(s[4 * j + 2 * half], s[4 * j + 2 * half + 1]));
    top = quad_max(top);
    if (top >= near_infinity && a.query(lane.row + 8 * half) < queries) good = false;
    float const by = top >= 2.0f ? log2_of(top) + Config::slack : 0.0f;  // how far the reference moves, in bits
    float const ratio = exp2_of(-by);
#pragma unroll
    for (int j = 0; j < n / 4; ++j) {
      s[4 * j + 2 * half] *= ratio;
      s[4 * j + 2 * half + 1] *= ratio;
    }
    added[half] *= ratio;
    state[half].sum *= ratio;
    offset[half] += by;
#pragma unroll
    for (int j = 0; j < columns / 4; ++j) {
      o[4 * j + 2 * half] *= ratio;
      o[4 * j + 2 * half + 1] *= ratio;
    }
  }
  return __all_sync(0xffffffffu, good);
}

}  // namespace flashcore::sm90

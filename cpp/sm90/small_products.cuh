// SPDX-License-Identifier: Apache-2.0
// The products of the kernel for small problems and the softmax between them: from a part's keys and values to its
// results of 64 rows.
#pragma once

#include "sm90/dependent_launch.h"
#include "sm90/small_block.cuh"

namespace flashcore::sm90 {

// Where a part's results of 64 rows stand: the output so far, not divided by the rows' sums, and their state.
template <class Config>
struct Partial {
  static constexpr int columns = Config::head_dim + (Config::steady ? 8 : 0);  // of the second product
  float o[columns / 2];
  SoftmaxRow state[2];
};

// Works off the part's chunks as they arrive. A warpgroup multiplies one chunk at a time: its first weights by their
// values while the others' exponentials run. Other warpgroups fill the gaps.
template <class Config>
__device__ __forceinline__ void attend(SmallArguments<typename Config::Score> const& a,
                                       SmallMemory<Config> const& shared, Warpgroup<Config> warpgroup, Lane lane,
                                       Partial<Config>& partial) {
  using Element = typename Config::Element;
  constexpr int head_dim = Config::head_dim, steps = Config::steps, step = Config::step;
  constexpr int columns = Partial<Config>::columns;
  float (&o)[columns / 2] = partial.o;
  SoftmaxRow(&state)[2] = partial.state;
  float s[steps * step / 2], ratio[2], offset[2];
  auto const scores = [&](int i) -> float (&)[step / 2] {
    return reinterpret_cast<float (&)[step / 2]>(s[i * step / 2]);
  };
  uint32_t weights[steps * step / 4];
#pragma unroll
  for (int i = 0; i < columns / 2; ++i) o[i] = 0.0f;
  int const group = warpgroup.group(), part = warpgroup.part();
  Task const& task = shared.task();
  int const count = task.count(part) * steps, first_key = task.begin(part) * steps * step;
  if (count == 0) {
    if (a.alone) launch_dependents();
    return;
  }
  // The keys that all 64 rows see: from the last one's first to the first one's last.
  int const seen_begin = task.mask.first_key(shared.query(warpgroup.rows() * 64 + 63));
  int const seen_end = task.mask.end_key(shared.query(warpgroup.rows() * 64));
  uint64_t const queries = operand(address_of(shared.queries()) + warpgroup.rows() * 64 * row_bytes, 0);
  shared.full_queries().wait(0);
#pragma unroll 1
  for (int i = 0; i < count; i += steps) {
    // S = Q Kᵀ
    uint64_t const keys = operand(address_of(shared.keys(group, i)), 0);
#pragma unroll
    for (int j = 0; j < steps; ++j) {
      shared.full_keys(group, i + j).wait(0);
      hold(scores(j));
      cute::warpgroup_arrive();
#pragma unroll
      for (int d = 0; d < head_dim / 16; ++d) {
        multiply_keys<Element, step>(scores(j), queries + (d / 4 * Config::q_panel + d % 4 * 32) / 16,
                                     keys + (j * Config::kv_bytes + d / 4 * Config::kv_panel + d % 4 * 32) / 16, d > 0);
      }
      cute::warpgroup_commit_batch();
    }
    cute::warpgroup_wait<0>();
    hold(s);
    transform(s, a.score);
#pragma unroll
    for (int j = 0; j < steps; ++j) {
      int const key = first_key + (i + j) * step;
      if (key < seen_begin || key + step > seen_end) {
        int const query[2] = {shared.query(lane.row), shared.query(lane.row + 8)};
        hide(scores(j), visible(shared.task().mask, query, key));
      }
    }
    if constexpr (Config::steady) {
      using Reference = Reference<Element>;
      if (i == 0) Reference::template find<Reference::seen>(s, state);
      // Rows that see none of these, or of the chunks before.
      if (__any_sync(0xffffffffu, state[0].max == minus_infinity() || state[1].max == minus_infinity())) {
        Reference::template find<steps * step / 2>(s, state);
      }
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        offset[half] = SoftmaxRow::offset(state[half].max, a.score.factor) + Reference::slack;
      }
    } else {
      raise_maxima(s, state, ratio, offset, a.score);
      if (i > 0) {
#pragma unroll
        for (int k = 0; k < head_dim / 2; ++k) o[k] *= ratio[k / 2 % 2];
      }
    }
    // All that the block asked for is there, or about to be: the next kernel may bring its own lines into the cache.
    if (i == 0 && a.alone) launch_dependents();
    // O += P V
    uint32_t const values_at = address_of(shared.values(group, i));
    uint64_t const values =
        operand(values_at, Config::steady ? address_of(shared.ones()) - values_at : uint32_t{Config::kv_panel});
    constexpr uint64_t next = Config::steady ? next_16_values : 16 * row_bytes / 16;
#pragma unroll
    for (int j = 0; j < steps; ++j) {
      exponentials<Config>(scores(j), state, offset, a.score.factor);
      uint32_t* const w = weights + j * step / 4;
#pragma unroll
      for (int k = 0; k < step / 4; ++k) w[k] = Precision<Element>::pack(scores(j)[2 * k], scores(j)[2 * k + 1]);
      if (j == 0) {
        shared.full_values(group, i).wait(0);
        hold(o);
      }
      cute::warpgroup_arrive();
#pragma unroll
      for (int m = 0; m < step / 16; ++m) {
        uint64_t const at = Config::panels > 1 ? values + m * next : values + (j * step / 16 + m) * next;
        multiply_values<Element, columns>(o, w + 4 * m, at);
      }
      cute::warpgroup_commit_batch();
    }
    // Before the next scores: they take the registers of the weights.
    cute::warpgroup_wait<0>();
    hold(o);
  }
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    if constexpr (Config::steady) {
      // What a part has lost must show however little the merge leaves of it: its sum becomes NaN. A row that sees none
      // of the part's keys has no reference and nothing to lose.
      float const sum = o[head_dim / 2 + 2 * half];
      bool const whole = state[half].max == minus_infinity() || Reference<Element>::holds(sum);
      state[half].sum = whole ? sum : __int_as_float(0x7fffffff);
    } else {
      state[half].sum = quad_sum(state[half].sum);
    }
  }
}

}  // namespace flashcore::sm90

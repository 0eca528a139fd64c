// SPDX-License-Identifier: Apache-2.0
// The end of a tile in the kernel for small problems: its rows, divided by their sums, on the way to memory; and those
// that have to be computed once more.
#pragma once

#include "sm90/small_block.cuh"

namespace flashcore::sm90 {

// Divides the part's columns by the rows' sums and writes them. Lanes of a quad exchange what they hold (a transpose of
// 4 × 4 pairs), so that each writes 16 bytes, where a part has two pieces or more.
template <class Config>
__device__ __forceinline__ void write(SmallArguments<typename Config::Score> const& a,
                                      PlacedRow<Config> const (&row)[2], Warpgroup<Config> warpgroup,
                                      SoftmaxRow const (&state)[2], float const (&mine)[4 * Config::pieces]) {
  constexpr int pieces = Config::pieces;
  int const t = threadIdx.x % 4;
  int const first = (warpgroup.group() * Config::group_pieces + warpgroup.rank() * pieces) * 8;
  float const factor[2] = {state[0].inverse_sum(), state[1].inverse_sum()};
  if (!Config::steady && warpgroup.part() == 0 && t == 0) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      if (row[half].lse != nullptr && row[half].present) *row[half].lse = state[half].lse(a.score.factor);
    }
  }
  auto const pair = [&](int half, int piece) {
    float const* const x = &mine[4 * piece + 2 * half];
    return Precision<typename Config::Element>::pack(x[0] * factor[half], x[1] * factor[half]);
  };
  if constexpr (pieces == 1) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      if (!row[half].present || first >= a.p.head_dim) continue;
      *reinterpret_cast<uint32_t*>(row[half].out + first + t * 2) = pair(half, 0);
    }
  } else {
    // Four words at a time: of two pieces both rows', or of four pieces one row's.
#pragma unroll
    for (int group = 0; group < pieces / 2; ++group) {
      uint32_t x[4];
#pragma unroll
      for (int j = 0; j < 4; ++j) x[j] = pieces == 2 ? pair(j / 2, j % 2) : pair(group % 2, group / 2 * 4 + j);
      transpose_in_quad(x);
      int const half = pieces == 2 ? t / 2 : group % 2;
      int const column = first + (pieces == 2 ? t % 2 : group / 2 * 4 + t) * 8;
      bool const present = half == 0 ? row[0].present : row[1].present;
      auto* const out = half == 0 ? row[0].out : row[1].out;
      if (present && column < a.p.head_dim) *reinterpret_cast<uint4*>(out + column) = uint4{x[0], x[1], x[2], x[3]};
    }
  }
}

// Which of this lane's rows have a part for which their reference did not do, or a NaN of their own.
template <class Config>
struct Lost {
  bool row[2];
  __device__ __forceinline__ Lost(PlacedRow<Config> const (&rows)[2], SoftmaxRow const (&state)[2])
      : row{rows[0].present && isnan(state[0].sum), rows[1].present && isnan(state[1].sum)} {}
  __device__ __forceinline__ bool any_of_warp() const { return __any_sync(0xffffffffu, row[0] || row[1]); }
};

// Computes this warp's rows once more and writes the part's columns of those that are lost: another row's bits must not
// depend on them. (Nothing else of what is known stays in registers for it.)
template <class Config>
__device__ __forceinline__ void write_exactly(SmallArguments<typename Config::Score> const& a,
                                              SmallMemory<Config> const& shared, Warpgroup<Config> warpgroup,
                                              Lost<Config> lost) {
  int thread;
  asm volatile("mov.u32 %0, %%tid.x;" : "=r"(thread));
  int const first_row = thread / 128 / Config::key_groups * 64 + thread % 128 / 32 * 16;
  int const lane_row = first_row + thread % 32 / 4;
  Task const& task = shared.task();
  int const query[2] = {shared.query(lane_row), shared.query(lane_row + 8)};
  constexpr int chunk = Config::steps * Config::step;
  shared.full_queries().wait(0);  // a warpgroup without keys has not needed them so far
  SoftmaxRow state[2];
  float o[Config::head_dim / 2], mine[4 * Config::pieces];
  attend_exactly<typename Config::Element>(a, task.job.sequence, task.head_k, task.mask, query,
                                           task.range.begin * chunk, task.range.end * chunk,
                                           address_of(shared.queries()), first_row, o, state);
  int const own = warpgroup.group() * Config::group_pieces + warpgroup.rank() * Config::pieces;
#pragma unroll
  for (int i = 0; i < Config::head_dim / 2; ++i) {
    if (i / 4 / Config::pieces * Config::pieces == own) mine[i % (4 * Config::pieces)] = o[i];
  }
  PlacedRow<Config> row[2] = {{a, task.job, lane_row}, {a, task.job, lane_row + 8}};
  for (int half = 0; half < 2; ++half) row[half].present = row[half].present && lost.row[half];
  write<Config>(a, row, warpgroup, state, mine);
}

}  // namespace flashcore::sm90

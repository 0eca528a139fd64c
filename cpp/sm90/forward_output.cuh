// SPDX-License-Identifier: Apache-2.0
// The end of a job: its rows, divided by their sums, and their log-sum-exp on the way to memory.
#pragma once

#include "sm90/forward_softmax.cuh"

namespace flashcore::sm90 {

// Where a job's rows go: head (or group of packed heads) and sequence, the first row in the array of queries.
struct JobPlace {
  int sequence, head, first, queries;
};

__device__ __forceinline__ JobPlace place_of(Job const& job) {
  return {job.work.sequence, job.work.head, job.work.q_begin + job.first, job.queries};
}

// One of a job's rows in the output.
template <class Config>
struct OutputRow {
  bool present;
  typename Config::Element* out;
  float* lse;

  __device__ __forceinline__ OutputRow(Arguments<typename Config::Score> const& a, JobPlace const& job, int row) {
    ForwardParams const& p = a.p;
    int const query = a.pack == 1 ? row : row / a.pack;
    int const head = a.pack == 1 ? job.head : job.head * a.pack + (row - query * a.pack);
    int64_t const line = p.cu_seqlens_q ? int64_t{head} : int64_t{job.sequence} * p.heads_q + head;
    present = query < job.queries;
    lse = p.lse == nullptr ? nullptr : p.lse + line * p.seqlen_q + job.first + query;
    out = static_cast<typename Config::Element*>(p.o.data) + job.sequence * p.o.batch_stride + head * p.o.head_stride +
          (job.first + query) * p.o.row_stride;
  }
};

// The rows of a job without keys.
template <class Config>
__device__ __forceinline__ void store_nothing(Arguments<typename Config::Score> const& a, JobPlace const& job,
                                              Lane lane) {
  int const t = threadIdx.x % 4;
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    OutputRow<Config> const row(a, job, lane.row + half * 8);
    if (!row.present) continue;
    if (row.lse != nullptr && t == 0) *row.lse = minus_infinity();
    for (int column = t * 8; column < a.p.head_dim; column += 32) {
      *reinterpret_cast<uint4*>(row.out + column) = uint4{};
    }
  }
}

// The four lanes of a quad exchange what they hold: lane i gets the i-th words of all.
__device__ __forceinline__ void transpose_in_quad(uint32_t (&x)[4]) {
  int const t = threadIdx.x % 4;
#pragma unroll
  for (int step = 1; step <= 2; step *= 2) {
    bool const upper = t & step;
#pragma unroll
    for (int j = 0; j < 4; ++j) {
      if (j & step) continue;
      uint32_t const got = __shfl_xor_sync(0xffffffffu, upper ? x[j] : x[j + step], step);
      (upper ? x[j] : x[j + step]) = got;
    }
  }
}

// Writes row `half` of this lane's two, times `factor`, 16 bytes a lane.
template <class Config, int n>
__device__ __forceinline__ void write_row(OutputRow<Config> const& row, int half, int head_dim, float const (&o)[n],
                                          float factor) {
  int const t = threadIdx.x % 4;
#pragma unroll
  for (int g = 0; g < Config::head_dim / 32; ++g) {
    uint32_t x[4];
#pragma unroll
    for (int j = 0; j < 4; ++j) {
      float const* const pair = &o[4 * (4 * g + j) + 2 * half];
      x[j] = Precision<typename Config::Element>::pack(pair[0] * factor, pair[1] * factor);
    }
    transpose_in_quad(x);
    int const column = (4 * g + t) * 8;
    if (row.present && column < head_dim) {
      *reinterpret_cast<uint4*>(row.out + column) = uint4{x[0], x[1], x[2], x[3]};
    }
  }
}

// Divides a job's rows by their sums and writes them with their log-sum-exp.
template <class Config, int n>
__device__ __forceinline__ void store(Arguments<typename Config::Score> const& a, JobPlace const& job, Lane lane,
                                      float (&o)[n], SoftmaxRow (&state)[2]) {
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    SoftmaxRow& row_state = state[half];
    OutputRow<Config> const row(a, job, lane.row + half * 8);
    if constexpr (Config::adds_sums) {
      row_state.sum = quad_sum(row_state.sum);
      if (row.lse != nullptr && threadIdx.x % 4 == 0 && row.present)
        *row.lse = row_state.lse(a.score.factor) + Config::slack * ln_2;
    }
    if constexpr (Config::sums_by_product) row_state.sum = o[Config::head_dim / 2 + 2 * half];
    write_row<Config>(row, half, a.p.head_dim, o, row_state.inverse_sum());
  }
}

}  // namespace flashcore::sm90

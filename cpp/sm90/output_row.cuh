// SPDX-License-Identifier: Apache-2.0
// Where a tile's rows go, for the kernels whose blocks know it from their own numbers: sm90_small and sm90_stream.
#pragma once

#include "sm90/forward_block.cuh"

namespace flashcore::sm90 {

// Where a job's rows go: head (or group of packed heads) and sequence, the first row in the array of queries.
struct JobPlace {
  int sequence, head, first, queries;
};

// One of a job's rows in the output.
template <class Config>
struct PlacedRow {
  bool present;
  typename Config::Element* out;
  float* lse;

  __device__ __forceinline__ PlacedRow(Arguments<typename Config::Score> const& a, JobPlace const& job, int row) {
    ForwardParams const& p = a.p;
    int const query = a.pack == 1 ? row : row / a.pack;
    int const head = a.pack == 1 ? job.head : job.head * a.pack + (row - query * a.pack);
    int64_t const line = int64_t{job.sequence} * p.heads_q + head;
    present = query < job.queries;
    lse = p.lse == nullptr ? nullptr : p.lse + line * p.seqlen_q + job.first + query;
    out = static_cast<typename Config::Element*>(p.o.data) + job.sequence * p.o.batch_stride + head * p.o.head_stride +
          (job.first + query) * p.o.row_stride;
  }
};

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

}  // namespace flashcore::sm90

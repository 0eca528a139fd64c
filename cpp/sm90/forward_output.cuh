// SPDX-License-Identifier: Apache-2.0
// The end of a job: its rows, divided by their sums, and their log-sum-exp on the way to memory.
#pragma once

#include "sm90/forward_softmax.cuh"

namespace flashcore::sm90 {

// One of a job's rows in the output.
template <class Config>
struct OutputRow {
  using Element = typename Config::Element;
  bool present;
  int query, head;  // of the tile, of the packed ones
  Element* out;

  __device__ __forceinline__ OutputRow(Arguments<typename Config::Score> const& a, Job const& job, int row)
      : query(a.query(row)), head(row - query * a.pack) {
    present = query < job.queries;
    out = static_cast<Element*>(a.p.o.data) + job.out + query * a.p.o.row_stride + head * a.p.o.head_stride;
  }

  __device__ __forceinline__ float* lse(Arguments<typename Config::Score> const& a, Job const& job) const {
    int const sequence = a.p.cu_seqlens_q ? 0 : job.work.sequence;
    int64_t const line = int64_t{sequence} * a.p.heads_q + job.work.head * a.pack + head;
    return a.p.lse + line * a.p.seqlen_q + job.work.q_begin + job.first + query;
  }
};

// A quad's part of a row that saw no key.
template <class Row>
__device__ __forceinline__ void write_zeros(Row const& row, int head_dim) {
  for (int column = threadIdx.x % 4 * 8; column < head_dim; column += 32) {
    *reinterpret_cast<uint4*>(row.out + column) = uint4{};
  }
}

// The rows of a job without keys.
template <class Config>
__device__ __forceinline__ void store_nothing(Arguments<typename Config::Score> const& a, Job const& job, Lane lane) {
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    OutputRow<Config> const row(a, job, lane.row + half * 8);
    if (!row.present) continue;
    if (a.p.lse != nullptr && threadIdx.x % 4 == 0) *row.lse(a, job) = minus_infinity();
    write_zeros(row, a.p.head_dim);
  }
}

// The log-sum-exps of a lane's two rows, from their sums and what their weights are relative to (bits).
template <class Config>
__device__ __forceinline__ void store_lse(Arguments<typename Config::Score> const& a, Job const& job, Lane lane,
                                          float const (&sums)[2], float const (&reference)[2]) {
  if (a.p.lse == nullptr) return;
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    OutputRow<Config> const row(a, job, lane.row + half * 8);
    if (!row.present || threadIdx.x % 4 != 0) continue;
    *row.lse(a, job) = sums[half] == 0.0f ? minus_infinity() : (reference[half] + log2_of(sums[half])) * ln_2;
  }
}

// Writes row `half` of this lane's two, times `factor`. The lanes of a quad hold two columns of each eight; neighbours
// exchange a pair, and each writes four columns, eight bytes: a quad writes 32 at once. (Exchanges among all four for
// 16 bytes a lane took 3% of a call of 1,024 tokens more, none at all 5%.)
template <class Config, class Row, int n>
__device__ __forceinline__ void write_row(Row const& row, int half, int head_dim, float const (&o)[n], float factor) {
  int const t = threadIdx.x % 4;
  bool const odd = t & 1;
  int const first = t % 2 * 8 + t / 2 * 4;
  // One address, to which the stores add constants: by itself the compiler works out the array's beginning, the row and
  // the column for each of them anew, six instructions. Not everywhere: it then arranges the other loops differently,
  // which costs more than that saves at head dimensions 96 and 128 (measured.md).
  constexpr bool one_address = Config::head_dim == 256;
  auto* out = row.out;
  int const left = row.present ? head_dim - first : 0;
  if constexpr (one_address) {
    out += first;
    asm volatile("" : "+l"(out));
    __builtin_assume(__isGlobal(out));
  }
#pragma unroll
  for (int g = 0; g < Config::head_dim / 16; ++g) {
    uint32_t x[2];
#pragma unroll
    for (int j = 0; j < 2; ++j) {
      float const* const pair = &o[4 * (2 * g + j) + 2 * half];
      x[j] = Precision<typename Config::Element>::pack(pair[0] * factor, pair[1] * factor);
    }
    uint32_t const got = __shfl_xor_sync(0xffffffffu, odd ? x[0] : x[1], 1);
    (odd ? x[0] : x[1]) = got;
    uint2 const both{x[0], x[1]};
    if constexpr (one_address) {
      if (16 * g < left) *reinterpret_cast<uint2*>(out + 16 * g) = both;
    } else {
      int const column = 16 * g + first;
      if (row.present && column < head_dim) *reinterpret_cast<uint2*>(out + column) = both;
    }
  }
}

// 1 / x, to about a bit.
__device__ __forceinline__ float reciprocal(float x) {
  float y;
  asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

// Divides a job's rows by their sums and writes them with their log-sum-exp. `reference` is what the rows' weights are
// relative to, in bits. Nothing branches before the last row is on its way: the compiler can put other work between.
template <class Config, int n>
__device__ __forceinline__ void store(Arguments<typename Config::Score> const& a, Job const& job, Lane lane,
                                      float (&o)[n], SoftmaxRow const (&state)[2], float const (&reference)[2]) {
  float sums[2], factor[2];
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    sums[half] = Config::adds_sums ? quad_sum(state[half].sum) : 0.0f;
    float const sum = Config::sums_by_product ? o[Config::head_dim / 2 + 2 * half] : sums[half];
    factor[half] = sum == 0.0f ? 0.0f : reciprocal(sum);  // a row that saw no key becomes zero
  }
  // Head dimension 64 has no registers to keep the sums in.
  constexpr bool lse_first = Config::sums_by_product;
  if constexpr (Config::adds_sums && lse_first) store_lse<Config>(a, job, lane, sums, reference);
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    OutputRow<Config> const row(a, job, lane.row + half * 8);
    write_row<Config>(row, half, a.p.head_dim, o, factor[half]);
  }
  if constexpr (Config::adds_sums && !lse_first) store_lse<Config>(a, job, lane, sums, reference);
}

}  // namespace flashcore::sm90

// SPDX-License-Identifier: Apache-2.0
// The end of a part in the Hopper decode kernel: the warps' results become the block's, the blocks' the cluster's.
#pragma once

#include <type_traits>

#include "attention/combine.h"
#include "sm90/decode_block.cuh"

namespace flashcore::sm90 {

// A part's result, for a row of it: the output's, or what the kernel behind this one merges.
template <class Config>
__device__ __forceinline__ void write(DecodeArguments const& a, DecodePart const& part, int row, int column, float4 x,
                                      bool acts) {
  sm80::DecodeParams const& p = a.p;
  if (part.slot >= 0) {
    store(acts, p.part_out + (int64_t{part.slot} * p.part_rows + row) * p.head_dim + column, x);
  } else {
    using P = sm80::Precision<typename Config::Element>;
    int64_t const at = row_offset(p.o, part.sequence, row_place(a, part, row)) + column;
    store(acts, static_cast<typename Config::Element*>(p.o.data) + at, P::pack(x.x, x.y), P::pack(x.z, x.w));
  }
}
__device__ __forceinline__ void write_lse(DecodeArguments const& a, DecodePart const& part, int row, float lse,
                                          bool acts) {
  sm80::DecodeParams const& p = a.p;
  if (part.slot >= 0) {
    store(acts, p.part_lse + int64_t{part.slot} * p.part_rows + row, lse);
  } else if (p.lse != nullptr) {
    RowPlace const at = row_place(a, part, row);
    store(acts, p.lse + (int64_t{part.sequence} * p.heads_q + at.head) * p.seqlen_q + at.token, lse);
  }
}

// This block's columns of the item's rows, when all blocks of the cluster have sent theirs: a thread has four columns
// of a row, and takes the blocks' in their order.
template <class Config>
__device__ __forceinline__ void merge_cluster(DecodeArguments const& a, DecodeMemory<Config> const& shared, int rank,
                                              bool acts) {
  DecodePart const& part = shared.part();
  constexpr int most = HopperDecodeTile::most_cluster;
  int const blocks = 1 << a.log_cluster, columns = Config::head_dim >> a.log_cluster, rows = part.valid_rows;
  if (acts) shared.received_all()->wait(0);
#pragma unroll 1
  for (int i = threadIdx.x % Config::consumers; i < rows * columns / 4; i += Config::consumers) {
    int const row = static_cast<int>((static_cast<unsigned>(i) << (2 + a.log_cluster)) / unsigned{Config::head_dim});
    int const column = i * 4 - row * columns;
    float lse[most];
    float4 x[most];
    float top = minus_infinity();
#pragma unroll
    for (int block = 0; block < most; ++block) {
      lse[block] = minus_infinity(), x[block] = {0.0f, 0.0f, 0.0f, 0.0f};
      if (!acts || block >= blocks) continue;
      lse[block] = shared.received_lse(rows)[block * rows + row];
      x[block] = *reinterpret_cast<float4 const*>(shared.received() + (block * rows + row) * columns + column);
      top = lse[block] > top || lse[block] != lse[block] ? lse[block] : top;  // a NaN stays
    }
    float4 sum{0.0f, 0.0f, 0.0f, 0.0f};
    float total = 0.0f;
#pragma unroll
    for (int block = 0; block < most; ++block) {
      float const weight = part_weight(lse[block], top);
      total += weight;
      sum.x += weight * x[block].x, sum.y += weight * x[block].y;
      sum.z += weight * x[block].z, sum.w += weight * x[block].w;
    }
    float const inverse = total == 0.0f ? 0.0f : 1.0f / total;
    sum.x *= inverse, sum.y *= inverse, sum.z *= inverse, sum.w *= inverse;
    if (rank * columns + column < a.p.head_dim) write<Config>(a, part, row, rank * columns + column, sum, acts);
    if (rank == 0 && column == 0) write_lse(a, part, row, merged_lse(top, total), acts);
  }
}

// The end of a part. The producer's warp goes the same way before the consumers get there and does nothing on it
// (`acts` is false): it fetches the instructions, which would take longer than to execute them.
//
// In a cluster each block sends its result to the others: equal shares of the columns, and to all the log-sum-exp.
template <class Config>
__device__ __forceinline__ void finish(DecodeArguments const& a, DecodeMemory<Config> const& shared, Work<Config>& work,
                                       int warp, int lane, bool acts) {
  constexpr int head_dim = Config::head_dim, rows = Config::rows;
  constexpr int consumers = Config::consumers, merge_stride = Config::tile.merge_stride();
  DecodePart const& part = shared.part();
  auto const read = [acts](auto const* from) { return acts ? *from : std::remove_cvref_t<decltype(*from)>{}; };
  int const blocks = 1 << a.log_cluster, columns = head_dim >> a.log_cluster, rank = blockIdx.x & (blocks - 1);
  uint32_t const received_all = shared_address(shared.received_all());

  // The sums of the warps' keys become one, and the groups' results: each scales its own by its weight over the sum of
  // all.
  constexpr int rows_held = Work<Config>::rows_held, key_warps = Config::key_warps;
  int const group = warp / key_warps % Config::groups;
#pragma unroll
  for (int r = 0; r < rows_held; ++r) {
    float sum = work.sum[r];
#pragma unroll
    for (int step = 4; step < 32; step *= 2) sum += __shfl_xor_sync(0xffffffffu, sum, step);
    int const row = Work<Config>::row(r, lane);
    if (acts && lane < 4) shared.states(group)[warp % key_warps * rows + row] = sum;
  }
  if (acts) consumers_sync(consumers);  // the sums are there, and nobody reads the stages any more
  float lse[rows_held];
#pragma unroll
  for (int r = 0; r < rows_held; ++r) {
    int const row = Work<Config>::row(r, lane);
    float reference[Config::groups], sum[Config::groups], top = Work<Config>::no_reference, total = 0.0f;
#pragma unroll
    for (int g = 0; g < Config::groups; ++g) {
      sum[g] = 0.0f;
#pragma unroll
      for (int w = 0; w < key_warps; ++w) sum[g] += read(shared.states(g) + w * rows + row);
      reference[g] = sum[g] == 0.0f ? Work<Config>::no_reference : read(shared.references(g) + row);
      top = fmaxf(top, reference[g]);
    }
#pragma unroll
    for (int g = 0; g < Config::groups; ++g) total += exp2_of(reference[g] - top) * sum[g];
    lse[r] = total == 0.0f ? minus_infinity() : (top + log2_of(total)) * ln_2;
    float const weight = total == 0.0f ? 0.0f : exp2_of((group == 0 ? reference[0] : reference[1]) - top) / total;
    uint32_t const to =
        shared_address(shared.outputs() + (group * rows + row) * merge_stride + warp % key_warps * 16 + lane / 4);
#pragma unroll
    for (int m = 0; m < Config::panels; ++m) {
      int const x = r / 2 * 4 + r % 2;
      store_shared(acts, to + m * 256, work.o[m][x] * weight);
      store_shared(acts, to + m * 256 + 32, work.o[m][x + 2] * weight);
    }
    if (a.log_cluster == 0 && warp % Config::warps == 0 && lane < 4 && row < part.valid_rows) {
      write_lse(a, part, row, lse[r], acts);
    }
  }
  if (a.log_cluster > 0) {
    if (acts)
      cluster_wait_acquire();  // all blocks have read their stages, and may be sent to
                               // To each block by the lanes of another eighth of a warp.
#pragma unroll
    for (int r = 0; r < rows_held; ++r) {
      int const row = Work<Config>::row(r, lane), block = lane / 4;
      if (warp % Config::warps > 0 || block >= blocks || row >= part.valid_rows) continue;
      uint32_t const at = shared_address(shared.received_lse(part.valid_rows) + rank * part.valid_rows + row);
      send(acts, in_block(at, block), lse[r], in_block(received_all, block));
    }
  }
  if (acts) consumers_sync(consumers);  // the outputs are there
  constexpr int row_pieces = head_dim / 4;
#pragma unroll 1
  for (int i = threadIdx.x % consumers; i < part.valid_rows * row_pieces; i += consumers) {
    int const row = i / row_pieces, column = i % row_pieces * 4;
    float4 x{0.0f, 0.0f, 0.0f, 0.0f};
#pragma unroll
    for (int g = 0; g < Config::groups; ++g) {
      float4 const y =
          read(reinterpret_cast<float4 const*>(shared.outputs() + (g * rows + row) * merge_stride + column));
      x.x += y.x, x.y += y.y, x.z += y.z, x.w += y.w;
    }
    if (a.log_cluster > 0) {
      int const owner = static_cast<int>(static_cast<unsigned>(column << a.log_cluster) / unsigned{head_dim});
      float* const to = shared.received() + (rank * part.valid_rows + row) * columns + column - owner * columns;
      send(acts, in_block(shared_address(to), owner), x, in_block(received_all, owner));
    } else if (column < a.p.head_dim) {
      write<Config>(a, part, row, column, x, acts);
    }
  }
  if (a.log_cluster > 0) merge_cluster<Config>(a, shared, rank, acts);
}

}  // namespace flashcore::sm90

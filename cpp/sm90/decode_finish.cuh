// SPDX-License-Identifier: Apache-2.0
// The end of a part in the Hopper decode kernel: the warps' results become the block's, the blocks' the cluster's.
#pragma once

#include <type_traits>

#include "attention/combine.h"
#include "sm90/decode_consumers.cuh"

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

// This block's columns of the item's rows, when all shares have been sent: a thread has four columns of a row, and
// takes the shares' in their order, however many blocks computed them.
template <class Config>
__device__ __forceinline__ void merge_shares(DecodeArguments const& a, DecodeMemory<Config> const& shared,
                                             DecodePart const& part, int rank, bool acts) {
  constexpr int most = HopperDecodeTile::most_cluster;
  int const shares = 1 << a.log_shares, columns = Config::head_dim >> a.log_cluster, rows = part.valid_rows;
  float const* const all_lse = shared.received_lse((rows * columns) << a.log_shares);
  if (a.log_cluster == 0) {
    if (acts) consumers_sync(Config::consumers);
  } else if (acts) {
    shared.received_all()->wait(0);
  }
#pragma unroll 1
  for (int i = threadIdx.x % Config::consumers; i < rows * columns / 4; i += Config::consumers) {
    int const row = static_cast<int>((static_cast<unsigned>(i) << (2 + a.log_cluster)) / unsigned{Config::head_dim});
    int const column = i * 4 - row * columns;
    float lse[most];
    float4 x[most];
    float top = minus_infinity();
#pragma unroll
    for (int share = 0; share < most; ++share) {
      lse[share] = minus_infinity(), x[share] = {0.0f, 0.0f, 0.0f, 0.0f};
      if (!acts || share >= shares) continue;
      lse[share] = all_lse[share * rows + row];
      x[share] = *reinterpret_cast<float4 const*>(shared.received() + (share * rows + row) * columns + column);
      top = lse[share] > top || lse[share] != lse[share] ? lse[share] : top;  // a NaN stays
    }
    float4 sum{0.0f, 0.0f, 0.0f, 0.0f};
    float total = 0.0f;
#pragma unroll
    for (int share = 0; share < most; ++share) {
      float const weight = part_weight(lse[share], top);
      total += weight;
      sum.x += weight * x[share].x, sum.y += weight * x[share].y;
      sum.z += weight * x[share].z, sum.w += weight * x[share].w;
    }
    float const inverse = total == 0.0f ? 0.0f : 1.0f / total;
    sum.x *= inverse, sum.y *= inverse, sum.z *= inverse, sum.w *= inverse;
    if (rank * columns + column < a.p.head_dim) write<Config>(a, part, row, rank * columns + column, sum, acts);
    if (rank == 0 && column == 0) write_lse(a, part, row, merged_lse(top, total), acts);
  }
}

constexpr int merge_piece = 8;  // columns

// The end of the block's `part_number`-th part, and of the item's part behind its last share. The producer's warp goes
// the same way before the consumers get to the last one and does nothing on it (`acts` is false): it fetches the
// instructions, which would take longer than to execute them.
//
// In a cluster each block sends its result to the others: of the columns equal parts, and to all the log-sum-exp.
//
// Whether it was the last part: once the stages are the producer's again, what tells of the part may be another one's.
template <class Config>
__device__ __forceinline__ bool finish(DecodeArguments const& a, DecodeMemory<Config> const& shared, int part_number,
                                       Work<Config>& work, StagePlace& place, int warp, int lane, bool acts) {
  constexpr int head_dim = Config::head_dim, rows = Config::rows;
  constexpr int consumers = Config::consumers;
  DecodePart const& part = shared.part(part_number);
  float const factor = a.p.score.factor;
  auto const read = [acts](auto const* from) { return acts ? *from : std::remove_cvref_t<decltype(*from)>{}; };
  int const blocks = 1 << a.log_cluster, columns = head_dim >> a.log_cluster, rank = blockIdx.x & (blocks - 1);
  bool const last = !acts || part.last;
  int const number = part.share << a.log_cluster | rank;  // among the part's shares
  uint32_t const received_all = shared_address(shared.received_all());

  // The warps' results become one: each scales its own by its weight over the sum of all.
  int const key_warp = warp % Config::key_warps, first_row = warp / Config::key_warps % Config::slices * 16;
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    SoftmaxRow const& state = work.state[0][half];
    float const sum = quad_sum(state.sum);
    int const at = key_warp * rows + first_row + half * 8 + lane / 4;
    if (acts && lane % 4 == 0) shared.maxima()[at] = state.max, shared.sums()[at] = sum;
  }
  if (a.log_cluster > 0 && (part.share == 0 || !acts)) cluster_wait_acquire();  // all blocks run, and may be sent to
  // The warps' outputs lie where no tile is: behind the last one anywhere, else in the stages that the producer left
  // out.
  StagePlace gap = place;
  int stage = 0;
  if (!last) {
#pragma unroll 1
    for (int left = gap_stages<Config>(gap, shared.stages); left > 0; --left) {
      if (left == Config::slices) stage = gap.stage;
      shared.full_keys()[gap.stage].wait(gap.phase);
      shared.full_values()[gap.stage].wait(gap.phase);
      gap.advance(shared.stages);
    }
  }
  float* const outputs = reinterpret_cast<float*>(shared.keys(stage));
  if (acts) consumers_sync(consumers);  // the states are there, and nobody reads the stages any more
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    int const row = first_row + half * 8 + lane / 4;
    if (first_row + half * 8 >= part.valid_rows) continue;
    SoftmaxRow all;
#pragma unroll
    for (int w = 0; w < Config::key_warps; ++w) all.max = fmaxf(all.max, read(shared.maxima() + w * rows + row));
    float const top = all.max == minus_infinity() ? 0.0f : all.max;
#pragma unroll
    for (int w = 0; w < Config::key_warps; ++w) {
      all.sum +=
          exp2_of((read(shared.maxima() + w * rows + row) - top) * factor) * read(shared.sums() + w * rows + row);
    }
    float const weight = exp2_of((work.state[0][half].max - top) * factor) * all.inverse_sum();
    // Pieces of 8 columns are permuted by the row, so that lanes of different rows write to different banks.
    uint32_t const to =
        shared_address(outputs + (key_warp * rows + row) * head_dim + lane % 4 * 2 + row % 4 * merge_piece);
#pragma unroll
    for (int n = 0; n < head_dim / 8; ++n) {
      store_shared(acts, (to ^ (n % 4 * merge_piece * 4)) + n / 4 * merge_piece * 16, work.o[0][n][2 * half] * weight,
                   work.o[0][n][2 * half + 1] * weight);
    }
    if (key_warp == 0 && row < part.valid_rows) {
      float const lse = all.lse(factor);
      if (a.log_shares > 0) {
        float* const all_lse = shared.received_lse((part.valid_rows * columns) << a.log_shares);
        uint32_t const at = shared_address(all_lse + number * part.valid_rows + row);
#pragma unroll 1
        for (int block = lane % 4; block < blocks; block += 4) {
          if (blocks == 1) {
            store_shared(acts, at, lse);
          } else {
            send(acts, in_block(at, block), lse, in_block(received_all, block));
          }
        }
      } else if (lane % 4 == 0) {
        write_lse(a, part, row, lse, acts);
      }
    }
  }
  if (acts) consumers_sync(consumers);  // the outputs are there
  DecodePart const& next = shared.part(part_number + 1);
  bool const moves = !last && next.sequence != part.sequence;
  if (moves) ask_for_queries<Config>(a, shared, next);
  constexpr int row_pieces = head_dim / 4;
#pragma unroll 1
  for (int i = threadIdx.x % consumers; i < part.valid_rows * row_pieces; i += consumers) {
    int const row = i / row_pieces, column = i % row_pieces * 4;
    float4 sum{0.0f, 0.0f, 0.0f, 0.0f};
#pragma unroll
    for (int w = 0; w < Config::key_warps; ++w) {
      float4 const x = read(
          reinterpret_cast<float4 const*>(outputs + (w * rows + row) * head_dim + (column ^ row % 4 * merge_piece)));
      sum.x += x.x, sum.y += x.y, sum.z += x.z, sum.w += x.w;
    }
    if (a.log_shares > 0) {
      int const owner = static_cast<int>(static_cast<unsigned>(column << a.log_cluster) / unsigned{head_dim});
      float* const to = shared.received() + (number * part.valid_rows + row) * columns + column - owner * columns;
      if (blocks == 1) {
        store_shared(acts, shared_address(to), sum.x, sum.y);
        store_shared(acts, shared_address(to + 2), sum.z, sum.w);
      } else {
        send(acts, in_block(shared_address(to), owner), sum, in_block(received_all, owner));
      }
    } else if (column < a.p.head_dim) {
      write<Config>(a, part, row, column, sum, acts);
    }
  }
  if (!last) {  // the stages are the producer's again
    cutlass::arch::fence_view_async_shared();
    __syncwarp();
    while (place.stage != gap.stage || place.phase != gap.phase) {
      if (lane == 0) shared.empty()[place.stage].arrive();
      place.advance(shared.stages);
    }
    if (moves) {
      sm80::copy_wait_all();
      consumers_sync(consumers);  // the queries are here
    }
  } else if (a.log_shares > 0) {
    merge_shares<Config>(a, shared, part, rank, acts);
  }
  return last;
}

}  // namespace flashcore::sm90

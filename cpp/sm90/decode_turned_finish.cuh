// SPDX-License-Identifier: Apache-2.0
// The end of a part in sm90_decode_turned: the groups' results become the block's, the blocks' the cluster's.
//
// Producers go the same way before the consumers get there and do nothing on it (`acts` is false): they fetch the
// instructions, which would take longer than to execute them.
#pragma once

#include <type_traits>

#include "attention/combine.h"
#include "sm90/decode_turned_merge.cuh"

namespace flashcore::sm90 {

// Where a part's result goes, for a row of it: to the output, or to those that are merged.
template <class Config>
__device__ __forceinline__ void* result_place(TurnedArguments const& a, TurnedPart const& part, int row, int column) {
  sm80::DecodeParams const& p = a.p;
  if (part.slot >= 0) return p.part_out + (int64_t{part.slot} * p.part_rows + row) * p.head_dim + column;
  return static_cast<typename Config::Element*>(p.o.data) + row_offset(p.o, part.sequence, row_place(a, part, row)) +
         column;
}
// And its log-sum-exp; nowhere if nobody asks.
__device__ __forceinline__ float* lse_place(TurnedArguments const& a, TurnedPart const& part, int row) {
  sm80::DecodeParams const& p = a.p;
  if (part.slot >= 0) return p.part_lse + int64_t{part.slot} * p.part_rows + row;
  if (p.lse == nullptr) return nullptr;
  RowPlace const at = row_place(a, part, row);
  return p.lse + (int64_t{part.sequence} * p.heads_q + at.head) * p.seqlen_q + at.token;
}
template <class Config>
__device__ __forceinline__ void write(TurnedArguments const& a, TurnedPart const& part, void* to, float4 x, bool acts) {
  if (part.slot >= 0) {
    store(acts, static_cast<float*>(to), x);
  } else {
    using P = sm80::Precision<typename Config::Element>;
    store(acts, to, P::pack(x.x, x.y), P::pack(x.z, x.w));
  }
}
__device__ __forceinline__ void write_lse(TurnedArguments const& a, TurnedPart const& part, int row, float lse,
                                          bool acts) {
  if (float* const to = lse_place(a, part, row)) store(acts, to, lse);
}

// Four columns of the block's result for a row: into the cluster, each block of which merges an equal share of the
// columns, or to where a part's result goes.
template <class Config>
__device__ __forceinline__ void hand_over(TurnedArguments const& a, TurnedMemory<Config> const& shared,
                                          TurnedPart const& part, int row, int column, float4 x, bool acts) {
  if (a.log_cluster > 0) {
    constexpr int head_dim = Config::head_dim;
    int const columns = head_dim >> a.log_cluster, rank = blockIdx.x & ((1 << a.log_cluster) - 1);
    int const owner = static_cast<int>(static_cast<unsigned>(column << a.log_cluster) / unsigned{head_dim});
    float* const to = shared.received() + (rank * part.valid_rows + row) * columns + column - owner * columns;
    send(acts, in_block(shared_address(to), owner), x, in_block(shared_address(shared.received_all()), owner));
  } else {
    write<Config>(a, part, result_place<Config>(a, part, row, column), x, acts && column < a.p.head_dim);
  }
}
// And its log-sum-exp, to a block of the cluster.
template <class Config>
__device__ __forceinline__ void send_lse(TurnedArguments const& a, TurnedMemory<Config> const& shared, int row,
                                         float lse, int block, bool acts) {
  int const rows = shared.part(0, 0).valid_rows, rank = blockIdx.x & ((1 << a.log_cluster) - 1);
  uint32_t const to = shared_address(shared.received_lse(rows) + rank * rows + row);
  send(acts, in_block(to, block), lse, in_block(shared_address(shared.received_all()), block));
}

// This block's columns of the item's rows, when all blocks of the cluster have sent theirs. A thread has four columns
// of a row, of as many blocks as make all threads busy: these in their order, then with the lanes beside it, in a tree.
template <class Config>
__device__ __forceinline__ void merge_cluster(TurnedArguments const& a, TurnedMemory<Config> const& shared, bool acts) {
  constexpr int most_items = Config::rows * Config::head_dim / 4;  // one of each block
  constexpr int log_mine = most_items <= Config::consumers       ? 0
                           : most_items <= 2 * Config::consumers ? 1
                           : most_items <= 4 * Config::consumers ? 2
                                                                 : 3;
  constexpr int mine = 1 << log_mine;
  int const blocks = 1 << a.log_cluster, rank = blockIdx.x & (blocks - 1), rows = shared.part(0, 0).valid_rows;
  int const log_lanes = max_of(a.log_cluster - log_mine, 0), lanes = 1 << log_lanes;
  int const columns = Config::head_dim >> a.log_cluster, items = rows * columns / 4 << log_lanes;
#pragma unroll 1
  for (int first = threadIdx.x / 32 * 32 % Config::consumers, round = 0; first < items;
       first += Config::consumers, ++round) {
    int const i = first + threadIdx.x % 32, block = i & (lanes - 1);
    int const row =
        static_cast<int>((static_cast<unsigned>(i) << (2 + a.log_cluster - log_lanes)) / unsigned{Config::head_dim});
    int const column = (i >> log_lanes) * 4 - row * columns;
    bool const exists = acts && i < items;
    auto const to = result_place<Config>(a, shared.part(0, 0), row, rank * columns + column);
    float* const to_lse = lse_place(a, shared.part(0, 0), row);
    if (acts && round == 0) shared.received_all()->wait(0);

    float lse[mine], top = minus_infinity();
    float4 x[mine];
#pragma unroll
    for (int j = 0; j < mine; ++j) {
      lse[j] = minus_infinity(), x[j] = {0.0f, 0.0f, 0.0f, 0.0f};
      int const from = block + (j << log_lanes);
      if (exists && from < blocks) {
        lse[j] = shared.received_lse(rows)[from * rows + row];
        x[j] = *reinterpret_cast<float4 const*>(shared.received() + (from * rows + row) * columns + column);
      }
    }
    auto const take = [&](float y) { top = y > top || y != y ? y : top; };  // a NaN stays
    auto const of_other = [](float y, int step) { return __shfl_xor_sync(0xffffffffu, y, step); };
#pragma unroll
    for (int j = 0; j < mine; ++j) take(lse[j]);
#pragma unroll
    for (int log = 0; log < 3 - log_mine; ++log) {
      if (log < log_lanes) take(of_other(top, 1 << log));
    }
    float total = 0.0f;
    float4 sum{0.0f, 0.0f, 0.0f, 0.0f};
#pragma unroll
    for (int j = 0; j < mine; ++j) {
      float const weight = part_weight(lse[j], top);
      total += weight;
      sum.x += weight * x[j].x, sum.y += weight * x[j].y, sum.z += weight * x[j].z, sum.w += weight * x[j].w;
    }
#pragma unroll
    for (int log = 0; log < 3 - log_mine; ++log) {
      if (log >= log_lanes) continue;
      int const step = 1 << log;
      total += of_other(total, step);
      sum.x += of_other(sum.x, step), sum.y += of_other(sum.y, step);
      sum.z += of_other(sum.z, step), sum.w += of_other(sum.w, step);
    }
    float const inverse = total == 0.0f ? 0.0f : __fdividef(1.0f, total);
    sum.x *= inverse, sum.y *= inverse, sum.z *= inverse, sum.w *= inverse;
    bool const writes = exists && block == 0;
    write<Config>(a, shared.part(0, 0), to, sum, writes && rank * columns + column < a.p.head_dim);
    if (to_lse != nullptr) store(writes && rank == 0 && column == 0, to_lse, merged_lse(top, total));
  }
}

// The end of a part: the groups' results become the block's. Whether it was the last one: once the slots are the
// producers' again, what tells of the part may be another one's.
template <class Config>
__device__ __forceinline__ bool finish(TurnedArguments const& a, TurnedMemory<Config>& shared, int number,
                                       TurnedWork<Config>& work, TurnedPlace& place, int warp, int lane, bool acts) {
  constexpr int key_warps = Config::key_warps, groups = Config::groups, merge_stride = Config::tile.merge_stride();
  TurnedPart const& part = shared.part(warp / key_warps % groups, number);
  bool const last = !Config::tile.walks() || !acts || part.last;
  auto const read = [acts](auto const* from) { return acts ? *from : std::remove_cvref_t<decltype(*from)>{}; };
  if constexpr (Config::merges) {
    if (acts && threadIdx.x == 0) tell_item(shared.items(), part, last);
  }

  // Outputs, and sums of the warps' keys, as they are: each group's warps have read its slots and its weights.
  int const group = warp / key_warps % groups, key_warp = warp % key_warps;
  uint32_t const sums = shared_address(shared.states(group) + key_warp);
  // Behind the last part anywhere, else in the slot that the producer left out, with which the next part is known.
  if constexpr (Config::tile.walks()) {
    if (!last) shared.full(group)[place.stage.stage].wait(place.stage.phase);
    if (acts && key_warp == 0 && lane == 0) shared.output_slots()[group] = last ? 0 : place.stage.stage;
  }
  uint32_t const outputs =
      shared_address(shared.outputs(group, last ? 0 : place.stage.stage) + key_warp * 16 + lane / 4);
#pragma unroll
  for (int r = 0; r < TurnedWork<Config>::rows_held; ++r) {
    if (r / 2 * 8 >= part.valid_rows) continue;
    int const row = TurnedWork<Config>::row(r, lane), x = r / 2 * 4 + r % 2;
    float sum = work.rounded_sum(r), exact = work.sum[r];
#pragma unroll
    for (int step = 4; step < 32; step *= 2) {
      sum += __shfl_xor_sync(0xffffffffu, sum, step);
      if constexpr (!Config::one_sum) exact += __shfl_xor_sync(0xffffffffu, exact, step);
    }
    store_shared(acts && lane < 4, sums + row * key_warps * 4, sum);
    if constexpr (!Config::one_sum) store_shared(acts && lane < 4, sums + (Config::rows + row) * key_warps * 4, exact);
#pragma unroll
    for (int m = 0; m < Config::panels; ++m) {
      store_shared(acts, outputs + (row * merge_stride + m * 64) * 4, work.o[m][x]);
      store_shared(acts, outputs + (row * merge_stride + m * 64 + 8) * 4, work.o[m][x + 2]);
    }
  }
  if (acts) consumers_sync(Config::consumers);
  if constexpr (Config::tile.walks()) {
    if (!last) {
      ask_for_queries<Config>(a, shared, shared.part(group, number + 1));  // nobody reads this part's any more
      if (threadIdx.x < groups * Config::rows) {
        shared.references(0)[threadIdx.x + (1 - 2 * shared.place_of_references) * groups * Config::rows] = 0.0f;
      }
    }
  }
  if (acts && a.log_cluster > 0) cluster_wait_acquire();  // all blocks have read their slots, and may be sent to

  // A thread has four columns of a row, of both groups.
  constexpr int row_pieces = Config::head_dim / 4;
#pragma unroll 1
  for (int i = threadIdx.x % Config::consumers; i < part.valid_rows * row_pieces; i += Config::consumers) {
    int const row = i / row_pieces, piece = i % row_pieces;
    float reference[groups], sum[groups], exact[groups], top = TurnedWork<Config>::no_reference;
    float total = 0.0f, exact_total = 0.0f;
    float4 x[groups];
#pragma unroll
    for (int g = 0; g < groups; ++g) {
      static_assert(key_warps == 4);
      float4 const of_warps = read(reinterpret_cast<float4 const*>(shared.states(g) + row * key_warps));
      int const exact_row = Config::one_sum ? row : Config::rows + row;
      float4 const exact_of_warps = read(reinterpret_cast<float4 const*>(shared.states(g) + exact_row * key_warps));
      float const* const of_group = shared.outputs(g, Config::tile.walks() && acts ? shared.output_slots()[g] : 0);
      x[g] = read(reinterpret_cast<float4 const*>(of_group + row * merge_stride + piece * 4));
      sum[g] = (of_warps.x + of_warps.y) + (of_warps.z + of_warps.w);
      exact[g] = (exact_of_warps.x + exact_of_warps.y) + (exact_of_warps.z + exact_of_warps.w);
      reference[g] = sum[g] == 0.0f ? TurnedWork<Config>::no_reference : read(shared.references(g) + row);
      top = fmaxf(top, reference[g]);
    }
#pragma unroll
    for (int g = 0; g < groups; ++g) {
      reference[g] = exp2_of(reference[g] - top);  // the group's weight
      total += reference[g] * sum[g];
      exact_total += reference[g] * exact[g];
    }
    float const inverse = total == 0.0f ? 0.0f : __fdividef(1.0f, total);
    float4 all{0.0f, 0.0f, 0.0f, 0.0f};
#pragma unroll
    for (int g = 0; g < groups; ++g) {
      float const weight = reference[g] * inverse;
      all.x += weight * x[g].x, all.y += weight * x[g].y, all.z += weight * x[g].z, all.w += weight * x[g].w;
    }
    hand_over<Config>(a, shared, part, row, piece * 4, all, acts);
    float const lse = total == 0.0f ? minus_infinity() : (top + log2_of(exact_total)) * ln_2;
    if (a.log_cluster > 0) {
      if (piece < 1 << a.log_cluster) send_lse<Config>(a, shared, row, lse, piece, acts);
    } else if (piece == 0) {
      write_lse(a, part, row, lse, acts);
    }
  }
  if constexpr (Config::tile.walks()) {
    if (!last) {
      sm80::copy_wait_all();
      cutlass::arch::fence_view_async_shared();  // the products read the queries, and TMA writes to the slots again
      consumers_sync(Config::consumers);
      if (lane == 0) shared.empty(group)[place.stage.stage].arrive();
      place.stage.advance(shared.slots());
      shared.place_of_references ^= 1;
    }
  }
  if (a.log_cluster > 0) merge_cluster<Config>(a, shared, acts);
  if constexpr (Config::merges) {
    if (last) {
      TurnedPart item = part;
      item.slot = -1;
      merge_items<Config>(a, shared.items(), part.valid_rows, acts,
                          [&](int sequence, int row, int column, float4 x, float lse) {
                            item.sequence = sequence;
                            void* const to = result_place<Config>(a, item, row, column);
                            write<Config>(a, item, to, x, acts && column < a.p.head_dim);
                            if (column == 0) write_lse(a, item, row, lse, acts);
                          });
    }
  }
  return last;
}

}  // namespace flashcore::sm90

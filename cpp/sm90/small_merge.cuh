// SPDX-License-Identifier: Apache-2.0
// The merge of the kernel for small problems: the parts of a tile's keys become one result, a share of whose columns
// each of them keeps. First within the block, then in the cluster.
#pragma once

#include "sm90/cluster.h"
#include "sm90/small_products.cuh"

namespace flashcore::sm90 {

// Writes to the shared memory of any block of the cluster, and counts the bytes at `barrier` of the same block.
__device__ __forceinline__ void send(uint32_t address, uint32_t barrier, float4 x) {
  asm volatile(
      "st.async.shared::cluster.mbarrier::complete_tx::bytes.v4.f32 [%0], {%2, %3, %4, %5}, [%1];" ::"r"(address),
      "r"(barrier), "f"(x.x), "f"(x.y), "f"(x.z), "f"(x.w)
      : "memory");
}
// Waits for the first phase of a barrier and for what other blocks of the cluster sent to it.
__device__ __forceinline__ void wait_for_cluster(uint32_t barrier) {
  asm volatile(
      "{\n"
      ".reg .pred done;\n"
      "again: mbarrier.try_wait.parity.acquire.cluster.shared::cta.b64 done, [%0], 0;\n"
      "@!done bra again;\n"
      "}" ::"r"(barrier)
      : "memory");
}

// Piece i of accumulators: of each of a lane's two rows two neighbouring columns.
__device__ __forceinline__ float4 piece(float const* o, int i) {
  return {o[4 * i], o[4 * i + 1], o[4 * i + 2], o[4 * i + 3]};
}
__device__ __forceinline__ float4 rows_of(SoftmaxRow const (&state)[2]) {
  return {state[0].max, state[0].sum, state[1].max, state[1].sum};
}

// Adds what lies at `received` (`pieces` of a warpgroup and its rows' states) to `mine`.
template <int pieces>
__device__ __forceinline__ void merge(char const* received, float factor, SoftmaxRow (&state)[2],
                                      float (&mine)[4 * pieces]) {
  int const thread = threadIdx.x % 128;
  auto const* const sent = reinterpret_cast<float4 const*>(received);
  float4 const rows = sent[pieces * 128 + thread / 4];
  float4 x[pieces];
#pragma unroll
  for (int i = 0; i < pieces; ++i) x[i] = sent[i * 128 + thread];
  SoftmaxRow other[2] = {{rows.x, rows.y}, {rows.z, rows.w}};
  float ratio[2], its[2];
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    float const top = fmaxf(state[half].max, other[half].max);
    ratio[half] = state[half].raise(top, factor);
    its[half] = other[half].raise(top, factor);
    state[half].sum += other[half].sum;
  }
#pragma unroll
  for (int i = 0; i < pieces; ++i) {
    mine[4 * i] = mine[4 * i] * ratio[0] + x[i].x * its[0];
    mine[4 * i + 1] = mine[4 * i + 1] * ratio[0] + x[i].y * its[0];
    mine[4 * i + 2] = mine[4 * i + 2] * ratio[1] + x[i].z * its[1];
    mine[4 * i + 3] = mine[4 * i + 3] * ratio[1] + x[i].w * its[1];
  }
}

// Merges the parts of a warpgroup's rows, and leaves the columns that are its to write in `mine`.
template <class Config>
__device__ __forceinline__ void exchange(SmallMemory<Config> const& shared, Warpgroup<Config> warpgroup, float factor,
                                         Partial<Config>& partial, float (&mine)[4 * Config::pieces]) {
  constexpr int group_pieces = Config::group_pieces, pieces = Config::pieces, cluster = Config::cluster;
  int const thread = warpgroup.thread();
  float o[4 * group_pieces];
  // With the other warpgroup of the rows: each takes half of the columns.
  if constexpr (Config::key_groups == 2) {
    bool const upper = warpgroup.group() == 1;
    auto* const to = reinterpret_cast<float4*>(shared.from_neighbour(warpgroup.index ^ 1));
#pragma unroll
    for (int i = 0; i < group_pieces; ++i) {
      float4 const low = piece(partial.o, i), high = piece(partial.o, group_pieces + i);
      to[i * 128 + thread] = upper ? low : high;
      o[4 * i] = upper ? high.x : low.x;
      o[4 * i + 1] = upper ? high.y : low.y;
      o[4 * i + 2] = upper ? high.z : low.z;
      o[4 * i + 3] = upper ? high.w : low.w;
    }
    if (thread % 4 == 0) to[group_pieces * 128 + thread / 4] = rows_of(partial.state);
    cutlass::arch::NamedBarrier::sync(256, 1 + (Config::row_groups > 1 ? warpgroup.rows() : 0));
    merge<group_pieces>(shared.from_neighbour(warpgroup.index), factor, partial.state, o);
  } else {
#pragma unroll
    for (int i = 0; i < 4 * group_pieces; ++i) o[i] = partial.o[i];
  }
  // With the same warpgroup of the cluster's other blocks.
  int const rank = warpgroup.rank();
  if constexpr (cluster > 1) {
    Task const& task = shared.task();
    bool const has_keys = task.has_keys(rank);
    cluster_wait_acquire();  // all blocks have started: their shared memory may be written to
#pragma unroll
    for (int owner = 0; owner < cluster; ++owner) {
      if (owner == rank) {
#pragma unroll
        for (int i = 0; i < 4 * pieces; ++i) mine[i] = o[4 * pieces * owner + i];
      } else if (has_keys) {
        uint32_t const barrier = in_block(address_of(&shared.received(warpgroup.index)), owner);
        char* const place = shared.from_block(warpgroup.index, rank < owner ? rank : rank - 1);
        uint32_t const to = in_block(address_of(place), owner);
#pragma unroll
        for (int i = 0; i < pieces; ++i) {
          send(to + i * Config::piece_bytes + thread * 16, barrier, piece(o, pieces * owner + i));
        }
        if (thread % 4 == 0) send(to + pieces * Config::piece_bytes + thread * 4, barrier, rows_of(partial.state));
      }
    }
    wait_for_cluster(address_of(&shared.received(warpgroup.index)));
    int const senders = task.senders<Config::cluster>(rank);
#pragma unroll
    for (int i = 0; i < cluster - 1; ++i) {
      if (i < senders) merge<pieces>(shared.from_block(warpgroup.index, i), factor, partial.state, mine);
    }
  } else {
#pragma unroll
    for (int i = 0; i < 4 * pieces; ++i) mine[i] = o[i];
  }
}

}  // namespace flashcore::sm90

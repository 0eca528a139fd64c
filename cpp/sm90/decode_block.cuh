// SPDX-License-Identifier: Apache-2.0
// What a block of the Hopper decode kernel is made of: its arguments, its part of the work, its shared memory.
#pragma once

#include <cutlass/arch/barrier.h>

#include "attention/dependent.cuh"
#include "sm80/decode_rows.cuh"
#include "sm90/cluster.h"
#include "sm90/decode_parts.cuh"
#include "sm90/decode_tile.h"
#include "sm90/tensor_map.h"

namespace flashcore::sm90 {

using DecodeBarrier = cutlass::arch::ClusterTransactionBarrier;

template <class Element_, int head_dim_, int slices_>
struct DecodeConfig {
  using Element = Element_;
  static constexpr HopperDecodeTile tile{head_dim_, slices_};
  static constexpr int head_dim = head_dim_;
  static constexpr int slices = slices_;  // of 16 rows
  static constexpr int rows = tile.rows(), warps = tile.warps(), consumers = 32 * warps, threads = tile.threads();
  static constexpr int tile_k = DecodeParts::tile_k;
  static constexpr int key_warps = HopperDecodeTile::key_warps, warp_keys = HopperDecodeTile::warp_keys;
  static_assert(tile_k == key_warps * warp_keys && tile_k == 64 && head_dim % 32 == 0);

  static constexpr int panels = tile.panels();
  static constexpr int kv_bytes = tile.kv_bytes(), stage_bytes = tile.stage_bytes();
  static constexpr int blocks_a_unit = tile.blocks_a_unit();
};

struct DecodeArguments {
  CUtensorMap k, v;  // boxes of box_rows keys, 64 columns or all
  sm80::DecodeParams p;
  DecodeParts parts;
  Divisor group, row_tiles;  // of p
  int log_box;               // of box_rows: 64, or a page's where that is less
  int log_page;              // of p.page_size
  int column_boxes;          // that bring a key's columns
  Divisor even;              // parts of each item; 0: `parts` says how many, by the lengths
  int log_cluster;           // of the blocks that share a part and merge it
  int log_shares;            // of a part, which its blocks compute in turn, each share by itself
  int prefetched;            // tiles of a block that come to the L2 cache while the kernel ahead still runs
  bool late;                 // the kernel behind starts when all tiles have been asked for; else at once
};

// Keys or values in shared memory as TMA writes them with its 128-byte swizzle: box after box, of a box panels of 64
// columns, a row of a panel 128 bytes, whose 16-byte chunks are permuted by the row modulo 8. A warp's keys lie in one
// box.
struct BoxTile {
  int panel_bytes;

  __device__ __forceinline__ int offset(int row, int chunk) const {
    return chunk / 8 * panel_bytes + row * 128 + ((chunk ^ row) & 7) * 16;
  }
  // The offset that is `slices` slices of 16 columns to the right of `offset`, which lies in the first.
  __device__ __forceinline__ uint32_t right(uint32_t offset, int slices) const {
    return (offset ^ (32 * (slices % 4))) + slices / 4 * panel_bytes;
  }
};

// What a consumer warp has in registers: of a slice of 16 rows.
template <class Config>
using Work = sm80::DecodeRows<typename Config::Element, Config::head_dim, 1, BoxTile>;

// --- instructions ----------------------------------------------------------------------------------------------------

__device__ __forceinline__ void consumers_sync(int threads) {
  asm volatile("barrier.cta.sync.aligned 1, %0;" ::"r"(threads) : "memory");
}
// The producer's warp says that the part is known, and the barriers are set up; the consumers wait for that.
template <class Config>
__device__ __forceinline__ void tell_part() {
  asm volatile("barrier.cta.arrive.aligned 2, %0;" ::"n"(Config::threads) : "memory");
}
template <class Config>
__device__ __forceinline__ void wait_for_part() {
  asm volatile("barrier.cta.sync.aligned 2, %0;" ::"n"(Config::threads) : "memory");
}

// Stores that happen if `acts`. The address is found in any case (finish() says why), so the condition is the
// instruction's own.
__device__ __forceinline__ void store(bool acts, float* to, float x) {
  asm volatile("{\n.reg .pred p;\nsetp.ne.b32 p, %2, 0;\n@p st.global.f32 [%0], %1;\n}" ::"l"(to), "f"(x),
               "r"(int{acts})
               : "memory");
}
__device__ __forceinline__ void store(bool acts, void* to, uint32_t x, uint32_t y) {
  asm volatile("{\n.reg .pred p;\nsetp.ne.b32 p, %3, 0;\n@p st.global.v2.b32 [%0], {%1, %2};\n}" ::"l"(to), "r"(x),
               "r"(y), "r"(int{acts})
               : "memory");
}
__device__ __forceinline__ void store(bool acts, float* to, float4 x) {
  asm volatile("{\n.reg .pred p;\nsetp.ne.b32 p, %5, 0;\n@p st.global.v4.f32 [%0], {%1, %2, %3, %4};\n}" ::"l"(to),
               "f"(x.x), "f"(x.y), "f"(x.z), "f"(x.w), "r"(int{acts})
               : "memory");
}
__device__ __forceinline__ void store_shared(bool acts, uint32_t to, float x, float y) {
  asm volatile("{\n.reg .pred p;\nsetp.ne.b32 p, %3, 0;\n@p st.shared.v2.f32 [%0], {%1, %2};\n}" ::"r"(to), "f"(x),
               "f"(y), "r"(int{acts})
               : "memory");
}
__device__ __forceinline__ void store_shared(bool acts, uint32_t to, float x) {
  asm volatile("{\n.reg .pred p;\nsetp.ne.b32 p, %2, 0;\n@p st.shared.f32 [%0], %1;\n}" ::"r"(to), "f"(x),
               "r"(int{acts})
               : "memory");
}
// To the shared memory of a block of the cluster, whose barrier counts the bytes.
__device__ __forceinline__ void send(bool acts, uint32_t to, float x, uint32_t barrier) {
  asm volatile(
      "{\n.reg .pred p;\nsetp.ne.b32 p, %3, 0;\n"
      "@p st.async.shared::cluster.mbarrier::complete_tx::bytes.b32 [%0], %1, [%2];\n}" ::"r"(to),
      "r"(__float_as_uint(x)), "r"(barrier), "r"(int{acts})
      : "memory");
}
__device__ __forceinline__ void send(bool acts, uint32_t to, float4 x, uint32_t barrier) {
  asm volatile(
      "{\n.reg .pred p;\nsetp.ne.b32 p, %6, 0;\n"
      "@p st.async.shared::cluster.mbarrier::complete_tx::bytes.v4.b32 [%0], {%1, %2, %3, %4}, [%5];\n}" ::"r"(to),
      "r"(__float_as_uint(x.x)), "r"(__float_as_uint(x.y)), "r"(__float_as_uint(x.z)), "r"(__float_as_uint(x.w)),
      "r"(barrier), "r"(int{acts})
      : "memory");
}

// --- the block's part ------------------------------------------------------------------------------------------------

// The item that a block works on, and which of its tiles: first, first + step, ... before end. A block has one part
// after the other, of the sequences of its team's share or, where several shares of an item are merged, of its item.
struct DecodePart {
  int sequence, head;  // of the keys
  int first_row, valid_rows;
  int cached, keys;  // of the sequence in the cache, and with the new ones
  int first, end, step;
  int full_begin, full_end;  // tiles that all queries see whole
  int slot;                  // of the result; -1: the output itself
  int share;                 // of the item's, which the block computes one after the other
  bool ahead;                // the first tile was asked for before the lengths were known
  bool last;                 // of the block

  __device__ __forceinline__ int count() const { return first < end ? parts_of(end - first, step) : 0; }
};
static_assert(sizeof(DecodePart) <= 64);

// The shares that a block computes: of one slice of rows only, whose outputs fit a stage.
template <class Config>
__device__ __forceinline__ int shares_of(DecodeArguments const& a) {
  return Config::slices > 1 ? 1 : 1 << (a.log_shares - a.log_cluster);
}

// The line (attention/decode_parts.h) of sequence `sequence`, but for lengths.
template <class Config>
__device__ __forceinline__ DecodePart part_of_line(DecodeArguments const& a, int sequence, int line) {
  DecodePart part;
  part.sequence = sequence;
  part.head = a.row_tiles.quotient(line);
  part.first_row = (line - part.head * a.row_tiles.divisor) * Config::rows;
  part.valid_rows = min_of(Config::rows, a.p.rows - part.first_row);
  return part;
}

// Of the cluster's part, where every item has as many, what the lengths do not say.
template <class Config>
__device__ __forceinline__ DecodePart even_part(DecodeArguments const& a, int& index) {
  int const number = blockIdx.x >> a.log_cluster, item = a.even.quotient(number);
  index = number - item * a.even.divisor;
  int const sequence = a.parts.lines.quotient(item);
  return part_of_line<Config>(a, sequence, item - sequence * a.parts.lines.divisor);
}

// Where row `row` of a part's tile lies: the token, and the query head.
struct RowPlace {
  int token, head;
};
__device__ __forceinline__ RowPlace row_place(DecodeArguments const& a, DecodePart const& part, int row) {
  int const token = a.group.quotient(part.first_row + row);
  return {token, part.head * a.group.divisor + part.first_row + row - token * a.group.divisor};
}
// Its offset in an array of queries.
template <class Pointer>
__device__ __forceinline__ int64_t row_offset(Rows<Pointer> const& rows, int sequence, RowPlace const& place) {
  return sequence * rows.batch_stride + place.token * rows.row_stride + place.head * rows.head_stride;
}

// --- shared memory ---------------------------------------------------------------------------------------------------

template <class Config>
struct DecodeMemory {
  static constexpr HopperDecodeTile tile = Config::tile;
  static constexpr int most_stages = HopperDecodeTile::most_stages;
  char* base;
  int stages;

  __device__ __forceinline__ char* queries() const { return base; }
  // (key_warps, rows), and as many sums behind them
  __device__ __forceinline__ float* maxima() const { return reinterpret_cast<float*>(base + tile.q_bytes()); }
  __device__ __forceinline__ float* sums() const { return maxima() + Config::key_warps * Config::rows; }
  __device__ __forceinline__ DecodeBarrier* full_keys() const {
    return reinterpret_cast<DecodeBarrier*>(base + tile.q_bytes() + tile.state_bytes());
  }
  __device__ __forceinline__ DecodeBarrier* full_values() const { return full_keys() + most_stages; }
  __device__ __forceinline__ DecodeBarrier* empty() const { return full_keys() + 2 * most_stages; }
  __device__ __forceinline__ DecodeBarrier* received_all() const { return full_keys() + 3 * most_stages; }
  // The block's `number`-th part. The producer is ahead of the consumers by no more than a part for each stage.
  __device__ __forceinline__ DecodePart& part(int number) const {
    return *reinterpret_cast<DecodePart*>(reinterpret_cast<char*>(received_all() + 2) +
                                          number % HopperDecodeTile::kept_parts * 64);
  }
  // Where there are pages, a bit for each box of a stage whose page does not exist.
  __device__ __forceinline__ uint32_t* absent() const {
    return reinterpret_cast<uint32_t*>(reinterpret_cast<char*>(&part(0)) + HopperDecodeTile::kept_parts * 64);
  }

  __device__ __forceinline__ char* keys(int stage) const {
    return base + tile.head_bytes() + stage * Config::stage_bytes;
  }
  __device__ __forceinline__ char* values(int stage) const { return keys(stage) + Config::kv_bytes; }
  // Of all shares of a part: (shares, rows, columns of this block), (shares, rows)
  __device__ __forceinline__ float* received() const {
    constexpr int head_bytes = tile.head_bytes(), merge_bytes = tile.merge_bytes();
    return reinterpret_cast<float*>(base + head_bytes + max_of(stages * Config::stage_bytes, merge_bytes));
  }
  __device__ __forceinline__ float* received_lse(int floats) const { return received() + floats; }
};

// A place in the ring: stages are filled and emptied in turn, and the barriers' phase flips each time around.
struct StagePlace {
  int stage = 0;
  uint32_t phase = 0;
  __device__ __forceinline__ void advance(int stages) {
    if (++stage == stages) {
      stage = 0;
      phase ^= 1;
    }
  }
};

// Between parts the producer leaves out as many stages as all warps' outputs need, side by side: those from the present
// one on, or from the first one if these are too few.
template <class Config>
__device__ __forceinline__ int gap_stages(StagePlace const& place, int stages) {
  if constexpr (Config::slices == 1) return 1;
  return place.stage + Config::slices <= stages ? Config::slices : stages - place.stage + Config::slices;
}

__device__ __forceinline__ uint32_t shared_address(void const* x) {
  return static_cast<uint32_t>(__cvta_generic_to_shared(x));
}

}  // namespace flashcore::sm90

// SPDX-License-Identifier: Apache-2.0
// What a block of the Hopper decode kernel is made of: its arguments, its part of the work, its shared memory.
#pragma once

#include <cutlass/arch/barrier.h>

#include <type_traits>

#include "attention/dependent.cuh"
#include "sm80/decode_rows.cuh"
#include "sm90/cluster.h"
#include "sm90/decode_parts.cuh"
#include "sm90/decode_tile.h"
#include "sm90/tensor_core.h"
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
  // The logarithm of the largest weight, so that the element type holds it, and sums of it are far from infinite.
  static constexpr float slack = std::is_same_v<Element, __half> ? 14.0f : 40.0f;
  // And of the least of a group's first tile, by which references may begin as 0.
  static constexpr float least = std::is_same_v<Element, __half> ? -4.0f : -40.0f;
  static constexpr int kv_bytes = tile.kv_bytes(), stage_bytes = tile.stage_bytes();
  static constexpr int blocks_a_unit = tile.blocks_a_unit();
  static constexpr int groups = HopperDecodeTile::groups, group_threads = consumers / groups;
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
  int prefetched;            // tiles of a block that come to the L2 cache while the kernel ahead still runs
  bool late;                 // the kernel behind starts when all tiles have been asked for; else at once
};

// A tile of keys or values, or of the block's queries, lies in shared memory as tensor_core.h has it: panels of 64
// columns. Where a row's 16-byte chunk lies in a tile of `rows` rows:
template <int rows>
__device__ __forceinline__ int panel_offset(int row, int chunk) {
  return chunk / 8 * rows * row_bytes + row * row_bytes + ((chunk ^ row) & 7) * 16;
}

// What a consumer's lane has in registers. The products' rows are keys, then the output's columns: lane l of warp w has
// those that are l / 4 and l / 4 + 8 past the w-th 16 of each 64. Their columns are the rows of queries, of which it
// has row(i) for i < rows_held.
template <class Config>
struct Work {
  static constexpr int rows_held = Config::rows / 4;
  float o[Config::panels][Config::rows / 2];
  float sum[rows_held];  // of the weights of the lane's own keys

  static __device__ __forceinline__ int row(int i, int lane) { return i / 2 * 8 + lane % 4 * 2 + i % 2; }
  __device__ __forceinline__ void clear() {
#pragma unroll
    for (int m = 0; m < Config::panels; ++m) {
#pragma unroll
      for (int i = 0; i < Config::rows / 2; ++i) o[m][i] = 0.0f;
    }
#pragma unroll
    for (int i = 0; i < rows_held; ++i) sum[i] = 0.0f;
  }
  static constexpr float no_reference = -3.0e38f;  // any score is above it
};

// --- instructions ----------------------------------------------------------------------------------------------------

__device__ __forceinline__ void consumers_sync(int threads) {
  asm volatile("barrier.cta.sync.aligned 1, %0;" ::"r"(threads) : "memory");
}
// The consumers of a group; and whether `x` is true for any of them.
__device__ __forceinline__ void group_sync(int group, int threads) {
  if (group == 0) {
    asm volatile("barrier.cta.sync.aligned 3, %0;" ::"r"(threads) : "memory");
  } else {
    asm volatile("barrier.cta.sync.aligned 4, %0;" ::"r"(threads) : "memory");
  }
}
__device__ __forceinline__ bool group_any(int group, int threads, bool x) {
  int any;
  if (group == 0) {
    asm volatile(
        "{\n.reg .pred p, q;\nsetp.ne.b32 p, %1, 0;\nbarrier.cta.red.or.pred.aligned q, 3, %2, p;\n"
        "selp.b32 %0, 1, 0, q;\n}"
        : "=r"(any)
        : "r"(int{x}), "r"(threads)
        : "memory");
  } else {
    asm volatile(
        "{\n.reg .pred p, q;\nsetp.ne.b32 p, %1, 0;\nbarrier.cta.red.or.pred.aligned q, 4, %2, p;\n"
        "selp.b32 %0, 1, 0, q;\n}"
        : "=r"(any)
        : "r"(int{x}), "r"(threads)
        : "memory");
  }
  return any != 0;
}
template <class Config>
__device__ __forceinline__ void producers_sync() {
  asm volatile("barrier.cta.sync.aligned 5, %0;" ::"n"(32 * Config::groups) : "memory");
}
// The producers say that the part is known, and the barriers are set up; the consumers wait for that.
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

// The item that a block works on, and which of its tiles: first, first + step, ...
struct DecodePart {
  int sequence, head;  // of the keys
  int first_row, valid_rows;
  int cached, keys;  // of the sequence in the cache, and with the new ones
  int first, count, step;
  int full_begin, full_end;  // tiles that all queries see whole
  int slot;                  // of the result; -1: the output itself
  int ahead;                 // groups whose first tile was asked for before the lengths were known
};
static_assert(sizeof(DecodePart) <= 64);

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
  // Of a tile's keys, (rows, 64), of each group
  __device__ __forceinline__ char* weights(int group) const {
    return base + tile.q_bytes() + group * tile.weights_bytes();
  }
  // A group's maxima or sums, (key_warps, rows), in its weights' place.
  __device__ __forceinline__ float* states(int group) const { return reinterpret_cast<float*>(weights(group)); }
  // Of a group's slots, which hold its tiles' keys and values in turn.
  __device__ __forceinline__ DecodeBarrier* full(int group) const {
    return reinterpret_cast<DecodeBarrier*>(weights(Config::groups)) + group * most_stages;
  }
  __device__ __forceinline__ DecodeBarrier* empty(int group) const { return full(Config::groups + group); }
  // A group's products with its weights have ended.
  __device__ __forceinline__ DecodeBarrier& weights_read(int group) const { return full(2 * Config::groups)[group]; }
  __device__ __forceinline__ DecodeBarrier* received_all() const { return full(2 * Config::groups) + Config::groups; }
  __device__ __forceinline__ DecodePart& part() const { return *reinterpret_cast<DecodePart*>(received_all() + 2); }
  // Where there are pages, a bit for each box of a slot's keys whose page does not exist.
  __device__ __forceinline__ uint32_t* absent(int group) const {
    return reinterpret_cast<uint32_t*>(reinterpret_cast<char*>(&part()) + 64) + group * most_stages;
  }

  // A weight of a group's is 2 ^ (score * factor - reference of the row).
  __device__ __forceinline__ float* references(int group) const {
    return reinterpret_cast<float*>(absent(Config::groups)) + group * Config::rows;
  }

  // As many slots a group as there are stages, of keys and values, for all.
  __device__ __forceinline__ char* slot(int group, int i) const {
    static_assert(Config::groups == 2 && Config::stage_bytes == 2 * Config::kv_bytes);
    return base + tile.head_bytes() + (group * stages + i) * Config::kv_bytes;
  }
  // (groups, rows, merge_stride), when the stages have been read
  __device__ __forceinline__ float* outputs() const { return reinterpret_cast<float*>(slot(0, 0)); }
  // In a cluster, from all its blocks: (blocks, rows, columns of this block), (blocks, rows). In the stages' place,
  // too: a block sends when all have read theirs.
  __device__ __forceinline__ float* received() const {
    constexpr int merge_bytes = tile.merge_bytes();
    return reinterpret_cast<float*>(slot(0, 0) + merge_bytes);
  }
  __device__ __forceinline__ float* received_lse(int rows) const { return received() + rows * Config::head_dim; }
};

// A place in a group's ring: slots are filled and emptied in turn, and the barriers' phase flips each time around.
struct SlotPlace {
  int slot = 0;
  uint32_t phase = 0;
  __device__ __forceinline__ void advance(int slots) {
    if (++slot == slots) {
      slot = 0;
      phase ^= 1;
    }
  }
};

__device__ __forceinline__ uint32_t shared_address(void const* x) {
  return static_cast<uint32_t>(__cvta_generic_to_shared(x));
}

}  // namespace flashcore::sm90

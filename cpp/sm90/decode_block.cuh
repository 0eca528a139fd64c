// SPDX-License-Identifier: Apache-2.0
// What a block of either Hopper decode kernel has: its arguments, instructions, its part of the work. A kernel's
// `Config` names what else there is: its Memory (shared), its Work (registers of a consumer).
#pragma once

#include <cutlass/arch/barrier.h>

#include "attention/dependent.cuh"
#include "sm80/decode_rows.cuh"
#include "sm90/cluster.h"
#include "sm90/decode_parts.cuh"
#include "sm90/decode_tile.h"
#include "sm90/tensor_map.h"

namespace flashcore::sm90 {

// What TMA tells the L2 cache: nobody reads keys and values again.
constexpr uint64_t read_once = 0x12f0000000000000;

constexpr int log_tile_k = 6;
static_assert(DecodeParts::tile_k == 1 << log_tile_k);

using DecodeBarrier = cutlass::arch::ClusterTransactionBarrier;

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

// --- instructions ----------------------------------------------------------------------------------------------------

__device__ __forceinline__ void consumers_sync(int threads) {
  asm volatile("barrier.cta.sync.aligned 1, %0;" ::"r"(threads) : "memory");
}
// Each producer says that its barriers are set up, and the first one when the part is known, too; the consumers wait
// for that.
template <class Config>
__device__ __forceinline__ void tell_part() {
  asm volatile("barrier.cta.arrive.aligned 2, %0;" ::"n"(Config::threads) : "memory");
}
template <class Config>
__device__ __forceinline__ void wait_for_part() {
  asm volatile("barrier.cta.sync.aligned 2, %0;" ::"n"(Config::threads) : "memory");
}
// The other producers know the part by themselves. In shared memory they look at it when they have asked for all tiles.
template <class Config>
__device__ __forceinline__ void tell_producers() {
  asm volatile("barrier.cta.arrive.aligned 3, %0;" ::"n"(32 * Config::producers) : "memory");
}
template <class Config>
__device__ __forceinline__ void wait_as_producer() {
  asm volatile("barrier.cta.sync.aligned 3, %0;" ::"n"(32 * Config::producers) : "memory");
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
__device__ __forceinline__ void store_shared(bool acts, uint32_t to, float x, float y) {
  asm volatile("{\n.reg .pred p;\nsetp.ne.b32 p, %3, 0;\n@p st.shared.v2.f32 [%0], {%1, %2};\n}" ::"r"(to), "f"(x),
               "f"(y), "r"(int{acts})
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
struct alignas(16) DecodePart {
  int sequence, head;  // of the keys
  int first_row, valid_rows;
  int cached, keys;  // of the sequence in the cache, and with the new ones
  int first, count, step;
  int full_begin, full_end;  // tiles that all queries see whole
  int slot;                  // of the result; -1: the output itself
  int ahead;                 // producers that have asked for their first tile before the lengths were known
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

// A place in a ring: its places are filled and emptied in turn, and the barriers' phase flips each time around.
struct RingPlace {
  int number = 0;
  uint32_t phase = 0;
  __device__ __forceinline__ void advance(int places) {
    if (++number == places) {
      number = 0;
      phase ^= 1;
    }
  }
};

__device__ __forceinline__ uint32_t shared_address(void const* x) {
  return static_cast<uint32_t>(__cvta_generic_to_shared(x));
}

}  // namespace flashcore::sm90

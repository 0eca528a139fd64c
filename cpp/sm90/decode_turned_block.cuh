// SPDX-License-Identifier: Apache-2.0
// What a block of sm90_decode_turned is made of: its arguments, its part of the work, its shared memory, the rings that
// its producers fill, and what its consumers have in registers. (Instructions are those of sm90_decode.)
#pragma once

#include "sm90/decode_block.cuh"
#include "sm90/decode_turned_tile.h"
#include "sm90/tensor_core.h"

namespace flashcore::sm90 {

// The blocks' parts are known without the lengths: of each item as many, which take its tiles in turn.
struct TurnedArguments {
  CUtensorMap k, v;  // boxes of box_rows keys, 64 columns or all
  sm80::DecodeParams p;
  DecodeParts parts;
  Divisor group, row_tiles, even;  // of p; parts of each item
  int log_box;                     // of box_rows: 64, or a page's where that is less
  int log_page;                    // of p.page_size
  int column_boxes;                // that bring a key's columns
  int log_cluster;                 // of the blocks that share a part and merge it
  int prefetched;                  // tiles of a block that come to the L2 cache while the kernel ahead still runs
  bool walks;                      // blocks have one part after the other, which the lengths say
  unsigned long long* counts;      // then of results of a divided item's parts, (teams, lines); null: none are divided
  unsigned long long launch;       // its own number, in the bits above those that count (decode_turned_merge.cuh)
};

// The item that a block works on, and which of its tiles: first, first + step, ...
struct alignas(16) TurnedPart {
  int sequence, head;  // of the keys
  int first_row, valid_rows;
  int cached, keys;  // of the sequence in the cache, and with the new ones
  int first, count, step;
  int full_begin, full_end;  // tiles that all queries see whole
  int slot;                  // of the result; -1: the output itself
  int first_team, parts;     // where blocks walk: the item's first part's team, and how many parts there are
  int16_t ahead;             // groups whose first tile was asked for before the length was known
  int16_t last;              // whether it is the block's last
};
static_assert(sizeof(TurnedPart) <= 64);

// The key head and the rows of queries of a sequence's `line`-th item.
template <class Config>
__device__ __forceinline__ void set_rows(TurnedArguments const& a, int line, TurnedPart& part) {
  part.head = a.row_tiles.quotient(line);
  part.first_row = (line - part.head * a.row_tiles.divisor) * Config::rows;
  part.valid_rows = min_of(Config::rows, a.p.rows - part.first_row);
}

// What the lengths do not say: of a part, the item, its first tile unless a window leaves some out, and the step.
template <class Config>
__device__ __forceinline__ TurnedPart turned_part(TurnedArguments const& a) {
  int const number = blockIdx.x >> a.log_cluster, rank = blockIdx.x - (number << a.log_cluster);
  int const item = a.even.quotient(number), index = number - item * a.even.divisor;
  TurnedPart part{};
  part.sequence = a.parts.lines.quotient(item);
  int const line = item - part.sequence * a.parts.lines.divisor;
  set_rows<Config>(a, line, part);
  part.first = index << a.log_cluster | rank;
  part.step = a.even.divisor << a.log_cluster;
  part.slot = a.even.divisor == 1 ? -1 : number;
  return part;
}

// An item that the block has one of several parts of.
struct alignas(16) DividedItem {
  int sequence, first_team, parts;  // no parts: there is no such item
};

__device__ __forceinline__ RowPlace row_place(TurnedArguments const& a, TurnedPart const& part, int row) {
  int const token = a.group.quotient(part.first_row + row);
  return {token, part.head * a.group.divisor + part.first_row + row - token * a.group.divisor};
}

// --- barriers of warps -----------------------------------------------------------------------------------------------

// Each producer's tell_part() says that its mbarriers are set up, and that its first tile is the right one; the first
// one's that the part is known, too. The other producers know the part by themselves. In shared memory they look at it
// when they have asked for all tiles.
template <class Config>
__device__ __forceinline__ void tell_producers() {
  asm volatile("barrier.cta.arrive.aligned 3, %0;" ::"n"(32 * Config::groups) : "memory");
}
template <class Config>
__device__ __forceinline__ void wait_as_producer() {
  asm volatile("barrier.cta.sync.aligned 3, %0;" ::"n"(32 * Config::groups) : "memory");
}

// --- shared memory ---------------------------------------------------------------------------------------------------

// A tile of keys or values, or of the block's queries, lies in shared memory as tensor_core.h has it: panels of 64
// columns. Where a row's 16-byte chunk lies in a tile of `rows` rows:
template <int rows>
__device__ __forceinline__ int panel_offset(int row, int chunk) {
  return chunk / 8 * rows * row_bytes + row * row_bytes + ((chunk ^ row) & 7) * 16;
}

template <class Config>
struct TurnedMemory {
  static constexpr TurnedDecodeTile tile = Config::tile;
  static constexpr int groups = Config::groups, most_stages = TurnedDecodeTile::most_stages;
  char* base;
  int stages;
  int place_of_references = 0;

  __device__ __forceinline__ char* queries() const { return base; }
  // Of a tile's keys, (rows, 64), of each group
  __device__ __forceinline__ char* weights(int group) const {
    return base + tile.q_bytes() + group * tile.weights_bytes();
  }
  // A group's maxima, (key_warps, rows), or both of its sums, (2, rows, key_warps), in its weights' place.
  __device__ __forceinline__ float* states(int group) const { return reinterpret_cast<float*>(weights(group)); }
  // Of a group's slots, which hold its tiles' keys and values in turn.
  __device__ __forceinline__ DecodeBarrier* full(int group) const {
    return reinterpret_cast<DecodeBarrier*>(weights(groups)) + group * most_stages;
  }
  __device__ __forceinline__ DecodeBarrier* empty(int group) const { return full(groups + group); }
  // A group's products with its weights have ended.
  __device__ __forceinline__ DecodeBarrier& weights_read(int group) const { return full(2 * groups)[group]; }
  __device__ __forceinline__ DecodeBarrier* received_all() const { return full(2 * groups) + groups; }
  // The block's `number`-th part, as a group is told. Its producer is ahead of it by no more than a part for each slot.
  __device__ __forceinline__ TurnedPart& part(int group, int number) const {
    TurnedPart* const parts = reinterpret_cast<TurnedPart*>(received_all() + 2) + group * tile.kept_parts();
    return Config::tile.walks() ? parts[number % tile.kept_parts()]
                                : reinterpret_cast<TurnedPart*>(received_all() + 2)[0];
  }
  // The block's divided items: the first that it had, and the last.
  __device__ __forceinline__ DividedItem* items() const {
    return reinterpret_cast<DividedItem*>(reinterpret_cast<TurnedPart*>(received_all() + 2) +
                                          groups * tile.kept_parts());
  }
  // The slot that a group's output lies in, (groups).
  __device__ __forceinline__ int* output_slots() const { return reinterpret_cast<int*>(items() + 2); }
  // Where there are pages, a bit for each box of a slot's keys whose page does not exist.
  __device__ __forceinline__ uint32_t* absent(int group) const {
    return reinterpret_cast<uint32_t*>(output_slots() + 4) + group * most_stages;
  }
  // A weight of a group's is 2 ^ (score * factor - reference of the row). Parts have one of two places in turn.
  __device__ __forceinline__ float* references(int group) const {
    return reinterpret_cast<float*>(absent(groups)) + (place_of_references * groups + group) * Config::rows;
  }

  __device__ __forceinline__ int slots() const { return 2 * stages / groups; }
  __device__ __forceinline__ char* slot(int group, int i) const {
    return base + tile.head_bytes() + (group * slots() + i) * Config::kv_bytes;
  }
  // A group's output, (rows, merge_stride), when all its warps have read its slots
  __device__ __forceinline__ float* outputs(int group, int i = 0) const {
    return reinterpret_cast<float*>(slot(group, i));
  }
  // In a cluster, from all its blocks: (blocks, rows, columns of this block), (blocks, rows). In the slots' place, too:
  // a block sends when all have read theirs.
  __device__ __forceinline__ float* received() const {
    return outputs(groups - 1) + Config::rows * tile.merge_stride();
  }
  __device__ __forceinline__ float* received_lse(int rows) const { return received() + rows * Config::head_dim; }
};

// Whether this lane is the one of its warp that acts for all. ptxas knows that there is only one, and then asks TMA
// with a few instructions, not with a loop over lanes (130 clocks for each box).
__device__ __forceinline__ bool elected() {
  uint32_t x;
  asm volatile("{\n.reg .pred p;\nelect.sync _|p, 0xffffffff;\nselp.b32 %0, 1, 0, p;\n}" : "=r"(x));
  return x != 0;
}
// The compiler is to have a value here, and not to find it where it is needed.
__device__ __forceinline__ void have(int& x) { asm volatile("" : "+r"(x)); }
__device__ __forceinline__ void have(uint32_t& x) { asm volatile("" : "+r"(x)); }
__device__ __forceinline__ void have(uint64_t& x) { asm volatile("" : "+l"(x)); }

// Where a tile's boxes lie in the cache: box b from row `row` of block blocks[b] on. Bits of `absent`: the boxes of
// pages that do not exist, which come as zeros from behind the last page.
template <class Config>
struct TurnedBoxes {
  static constexpr int most = 4;  // of pages of 16 keys
  int row, head, blocks[most];
  uint32_t absent;
};

// The producer's side of a group's ring. One lane asks for the boxes of a tile's keys, then of its values, or for each
// panel of them: boxes of fewer keys than a tile has do not lie there with all columns. What is asked for is known
// before a place is free: 8 rows of 128 columns over 32,768 keys 45.2 / 44.8 us, in pages of 16 49.6 / 48.1.
template <class Config>
struct TurnedRing {
  static constexpr uint64_t read_once = 0x12f0000000000000;  // TMA tells the L2 cache that nobody reads it again

  TurnedArguments const& a;
  TurnedMemory<Config> const& shared;
  int group;
  StagePlace place{};

  __device__ __forceinline__ int boxes() const { return Config::tile_k >> a.log_box; }

  // Lane b knows the block of box b; -1: of a page that does not exist.
  __device__ __forceinline__ TurnedBoxes<Config> tile(int row, int head, int block) const {
    constexpr int most = TurnedBoxes<Config>::most;
    TurnedBoxes<Config> tile{row, head, {}, __ballot_sync(0xffffffffu, block < 0) & ((1u << boxes()) - 1)};
    int const at = block < 0 ? max_of(a.p.pages, 1) : block;
#pragma unroll
    for (int b = 0; b < most; ++b) tile.blocks[b] = __shfl_sync(0xffffffffu, at, b);
    return tile;
  }

  // The first tile, whose places are free: what can be done before the kernel ahead has ended, and the rest.
  __device__ __forceinline__ void expect_first(TurnedBoxes<Config> const& tile) {
    if (elected()) {
      expect(Place(*this, 0, true), tile, true);
      expect(Place(*this, 1, false), tile, false);
    }
    __syncwarp();
  }
  __device__ __forceinline__ void load_first(TurnedBoxes<Config> const& tile, bool acts) {
    if (acts && elected()) {
      if (boxes() * a.column_boxes == 1) {  // by the loop 45.6 us, so 44.9
        ask_box(Place(*this, 0, true), 0, 0, tile.row, tile.head, tile.blocks[0]);
        ask_box(Place(*this, 1, false), 0, 0, tile.row, tile.head, tile.blocks[0]);
      } else {
#pragma unroll 1
        for (int i = 0; i < 2; ++i) ask(Place(*this, i, i == 0), tile);
      }
    }
    __syncwarp();
    if (acts) place.advance(shared.slots()), place.advance(shared.slots());
  }
  // It was the wrong one: waits until it is here, and makes its places free as they were.
  __device__ __forceinline__ void forget_first() {
    shared.full(group)[0].wait(0);
    shared.full(group)[1].wait(0);
    __syncwarp();
    if (elected()) {
      for (int i = 0; i < 2; ++i) {
        DecodeBarrier* const full = shared.full(group) + i;
        DecodeBarrier::invalidate(reinterpret_cast<DecodeBarrier::ValueType const*>(full));
        full->init(1);
      }
    }
    cutlass::arch::fence_barrier_init();
    __syncwarp();
    place = {};
  }
  __device__ __forceinline__ void load(TurnedBoxes<Config> tile) {
    have(tile.row), have(tile.head);
#pragma unroll
    for (int b = 0; b < TurnedBoxes<Config>::most; ++b) have(tile.blocks[b]);
#pragma unroll 1
    for (int i = 0; i < 2; ++i) {
      Place const at(*this, place.stage, i == 0);
      shared.empty(group)[place.stage].wait(place.phase ^ 1);
      if (elected()) {
        expect(at, tile, i == 0);
        ask(at, tile);
      }
      __syncwarp();
      place.advance(shared.slots());
    }
  }

 private:
  // Of a tile's keys or values in shared memory.
  struct Place {
    uint64_t map;
    uint32_t full, absent, to;
    __device__ __forceinline__ Place(TurnedRing const& ring, int slot, bool keys)
        : map(reinterpret_cast<uint64_t>(keys ? &ring.a.k : &ring.a.v)),
          full(shared_address(ring.shared.full(ring.group) + slot)),
          absent(shared_address(ring.shared.absent(ring.group) + slot)),
          to(shared_address(ring.shared.slot(ring.group, slot))) {
      have(map), have(full), have(absent), have(to);
    }
  };
  __device__ __forceinline__ void expect(Place const& at, TurnedBoxes<Config> const& tile, bool keys) const {
    if (keys && a.p.page_table != nullptr)
      asm volatile("st.shared.b32 [%0], %1;" ::"r"(at.absent), "r"(tile.absent) : "memory");
    asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(at.full), "r"(Config::kv_bytes)
                 : "memory");
  }
  __device__ __forceinline__ void ask(Place const& at, TurnedBoxes<Config> const& tile) const {
    static_assert(Config::panels <= 2);
#pragma unroll
    for (int b = 0; b < TurnedBoxes<Config>::most; ++b) {
      if (b >= boxes()) break;
      int const offset = (b << a.log_box) * row_bytes;
      ask_box(at, offset, 0, tile.row, tile.head, tile.blocks[b]);
      if (Config::panels > 1 && a.column_boxes > 1) {
        ask_box(at, offset + Config::tile_k * row_bytes, panel_columns, tile.row, tile.head, tile.blocks[b]);
      }
    }
  }
  static __device__ __forceinline__ void ask_box(Place const& at, int offset, int column, int row, int head,
                                                 int block) {
    asm volatile(
        "cp.async.bulk.tensor.5d.shared::cluster.global.mbarrier::complete_tx::bytes.L2::cache_hint [%0], "
        "[%1, {%3, %4, %5, %6, %7}], [%2], %8;" ::"r"(at.to + offset),
        "l"(at.map), "r"(at.full), "r"(column), "r"(row), "r"(0), "r"(head), "r"(block), "l"(read_once)
        : "memory");
  }
};

// What a consumer's lane has in registers. The products' rows are keys, then the output's columns: lane l of warp w has
// those that are l / 4 and l / 4 + 8 past the w-th 16 of each 64. Their columns are the rows of queries, of which it
// has row(i) for i < rows_held.
template <class Config>
struct TurnedWork {
  static constexpr int rows_held = Config::rows / 4;
  float o[Config::panels][Config::rows / 2];
  // Of the weights of the lane's own keys, before they are rounded: for the log-sum-exp. The output is divided by the
  // sum of what the product gets, or a row with one large weight would be off by that one's rounding: what that sum is
  // more, of two rows, in bfloat16. It is 2^-9 of the sum at most, and in float32 takes registers that 32 rows do not
  // have.
  float sum[rows_held];
  uint32_t gap[rows_held / 2];

  static __device__ __forceinline__ float2 of_pair(uint32_t x) {
    return {__uint_as_float(x << 16), __uint_as_float(x & 0xffff0000)};
  }
  __device__ __forceinline__ float rounded_sum(int i) const {
    if constexpr (Config::one_sum) return sum[i];
    float2 const more = of_pair(gap[i / 2]);
    return sum[i] + (i % 2 == 0 ? more.x : more.y);
  }
  __device__ __forceinline__ void add_gap(int pair, uint32_t x) {
    float2 const more = of_pair(gap[pair]), also = of_pair(x);
    gap[pair] = Precision<__nv_bfloat16>::pack(more.x + also.x, more.y + also.y);
  }
  __device__ __forceinline__ void scale_gap(int pair, float x, float y) {
    float2 const more = of_pair(gap[pair]);
    gap[pair] = Precision<__nv_bfloat16>::pack(more.x * x, more.y * y);
  }

  static __device__ __forceinline__ int row(int i, int lane) { return i / 2 * 8 + lane % 4 * 2 + i % 2; }
  __device__ __forceinline__ void clear() {
#pragma unroll
    for (int m = 0; m < Config::panels; ++m) {
#pragma unroll
      for (int i = 0; i < Config::rows / 2; ++i) o[m][i] = 0.0f;
    }
#pragma unroll
    for (int i = 0; i < rows_held; ++i) sum[i] = 0.0f, gap[i / 2] = 0;
  }
  static constexpr float no_reference = -3.0e38f;  // any score is above it
};

// `merges`: blocks that stay merge the parts that they have divided an item into (decode_turned_merge.cuh). Another
// instance, for its instructions cost the others 1 to 2% (a single sequence of 4,096 keys 7.73 / 7.84 us).
template <class Element_, int head_dim_, int rows_, bool merges_>
struct TurnedConfig {
  using Element = Element_;
  static constexpr TurnedDecodeTile tile{head_dim_, rows_};
  static constexpr int head_dim = head_dim_;
  static constexpr int rows = tile.rows(), warps = tile.warps(), consumers = 32 * warps, threads = tile.threads();
  static constexpr int groups = TurnedDecodeTile::groups, group_threads = consumers / groups;
  static constexpr int tile_k = DecodeParts::tile_k;
  static constexpr int key_warps = TurnedDecodeTile::key_warps, warp_keys = TurnedDecodeTile::warp_keys;
  static_assert(tile_k == key_warps * warp_keys && tile_k == 64 && head_dim % 64 == 0);

  static constexpr int panels = tile.panels(), kv_bytes = tile.kv_bytes();
  static constexpr int blocks_a_unit = tile.blocks_a_unit();
  static constexpr bool merges = merges_;
  static_assert(!merges || tile.may_merge());
  // The logarithm of the largest weight, so that the element type holds it, and sums of it are far from infinite.
  static constexpr float slack = std::is_same_v<Element, __half> ? 14.0f : 40.0f;
  // 32 rows of 128 columns have registers for one sum only: that of the rounded weights or, for the log-sum-exp, the
  // exact one. References are then always a row's largest score so far, whose weight, 1, is not rounded (32,768 keys
  // 69 us; by references that rarely move 48).
  static constexpr bool one_sum = rows_ == 32 && head_dim_ == 128;
  // And of the least of a group's first tile, by which references may begin as 0.
  static constexpr float least = std::is_same_v<Element, __half> ? -4.0f : -40.0f;

  using Merging = TurnedConfig<Element, head_dim_, rows_, true>;
  using Memory = TurnedMemory<TurnedConfig>;
  using Ring = TurnedRing<TurnedConfig>;
  using Work = TurnedWork<TurnedConfig>;
};

}  // namespace flashcore::sm90

// SPDX-License-Identifier: Apache-2.0
// What a block of sm90_decode has of its own: its shared memory, the ring of stages that its producer fills, and what
// its consumers have in registers.
#pragma once

#include <cute/arch/copy_sm90_tma.hpp>

#include "sm90/decode_block.cuh"

namespace flashcore::sm90 {

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

template <class Config>
struct DecodeMemory {
  static constexpr HopperDecodeTile tile = Config::tile;
  static constexpr int most_stages = HopperTile::most_stages;
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
  __device__ __forceinline__ DecodePart& part() const { return *reinterpret_cast<DecodePart*>(received_all() + 2); }
  // Where there are pages, a bit for each box of a stage whose page does not exist.
  __device__ __forceinline__ uint32_t* absent() const {
    return reinterpret_cast<uint32_t*>(reinterpret_cast<char*>(&part()) + 64);
  }

  __device__ __forceinline__ char* keys(int stage) const {
    return base + tile.head_bytes() + stage * Config::stage_bytes;
  }
  __device__ __forceinline__ char* values(int stage) const { return keys(stage) + Config::kv_bytes; }
  // (key_warps, rows, merge_stride), when the stages have been read
  __device__ __forceinline__ float* outputs() const { return reinterpret_cast<float*>(keys(0)); }
  // In a cluster, from all its blocks: (blocks, rows, columns of this block), (blocks, rows)
  __device__ __forceinline__ float* received() const {
    constexpr int head_bytes = tile.head_bytes(), merge_bytes = tile.merge_bytes();
    return reinterpret_cast<float*>(base + head_bytes + max_of(stages * Config::stage_bytes, merge_bytes));
  }
  __device__ __forceinline__ float* received_lse(int rows) const { return received() + rows * Config::head_dim; }
};

// The producer's side of the ring. A lane asks for a box of a tile, keys and values.
template <class Config>
struct DecodeRing {
  DecodeArguments const& a;
  DecodeMemory<Config> const& shared;
  int lane, log_boxes, boxes;  // of a tile
  RingPlace place;

  __device__ __forceinline__ DecodeRing(DecodeArguments const& a, DecodeMemory<Config> const& shared, int /*group*/,
                                        int lane)
      : a(a), shared(shared), lane(lane), log_boxes(log_tile_k - a.log_box), boxes(1 << log_boxes) {}

  // The box of a tile that this lane asks for, if there are so many.
  __device__ __forceinline__ int box() const { return lane; }

  // A contiguous first tile, whose place is free: what can be done before the kernel ahead has ended, and the rest.
  __device__ __forceinline__ void expect_first() {}
  __device__ __forceinline__ void load_first(int row, int head, int block, bool acts) { load(row, head, block, acts); }
  // A tile of which this lane's box begins at row `row` of block `block` of the cache; -1: of a page that does not
  // exist, whose box comes as zeros from behind the last page.
  __device__ __forceinline__ void load(int row, int head, int block, bool acts) {
    if (acts) shared.empty()[place.number].wait(place.phase ^ 1);
    uint32_t const absent = __ballot_sync(0xffffffffu, lane < boxes && block < 0);
    DecodeBarrier &full_keys = shared.full_keys()[place.number], &full_values = shared.full_values()[place.number];
    if (acts && lane == 0) {
      if (a.p.page_table != nullptr) shared.absent()[place.number] = absent;
      full_keys.arrive_and_expect_tx(Config::kv_bytes);
      full_values.arrive_and_expect_tx(Config::kv_bytes);
    }
    __syncwarp();
    if (acts && lane < boxes) {
      int const at = block < 0 ? max_of(a.p.pages, 1) : block;
#pragma unroll 1
      for (int i = 0; i < 2; ++i) {
        char* to =
            (i == 0 ? shared.keys(place.number) : shared.values(place.number)) + lane * (Config::kv_bytes >> log_boxes);
#pragma unroll 1
        for (int panel = 0; panel < a.column_boxes; ++panel) {
          cute::SM90_TMA_LOAD_5D::copy(i == 0 ? &a.k : &a.v,
                                       reinterpret_cast<uint64_t*>(i == 0 ? &full_keys : &full_values), read_once, to,
                                       panel * 64, row, 0, head, at);
          to += 128 << a.log_box;
        }
      }
    }
    __syncwarp();
    if (acts) place.advance(shared.stages);
  }
};

template <class Element_, int head_dim_, int rows_>
struct DecodeConfig {
  using Element = Element_;
  static constexpr HopperDecodeTile tile{head_dim_, rows_};
  static constexpr int head_dim = head_dim_;
  static constexpr int slices = tile.slices();  // of 16 rows
  static constexpr int rows = tile.rows(), warps = tile.warps(), consumers = 32 * warps, threads = tile.threads();
  static constexpr int producers = 1;
  static constexpr int tile_k = DecodeParts::tile_k;
  static constexpr int key_warps = HopperTile::key_warps, warp_keys = HopperTile::warp_keys;
  static_assert(tile_k == key_warps * warp_keys && tile_k == 64 && head_dim % 32 == 0);

  static constexpr int panels = tile.panels();
  static constexpr int kv_bytes = tile.kv_bytes(), stage_bytes = tile.stage_bytes();
  static constexpr int blocks_a_unit = tile.blocks_a_unit();
  // Whether a box of so many keys may lie in shared memory with all columns.
  static constexpr bool holds_whole_boxes(int /*box_rows*/) { return true; }

  using Memory = DecodeMemory<DecodeConfig>;
  using Ring = DecodeRing<DecodeConfig>;
  // What a consumer warp has in registers: of a slice of 16 rows.
  using Work = sm80::DecodeRows<Element, head_dim, 1, BoxTile>;
};

}  // namespace flashcore::sm90

// SPDX-License-Identifier: Apache-2.0
// The decode kernel for compute capability 9.0: a few queries a sequence over a long cache, which is bound by reading
// the cache. A block has a part of the keys of one sequence and key head. Its producer warp keeps a ring of tiles of
// keys and values full through TMA, and four consumer warps multiply what has come. README.md beside this file tells
// how the keys are divided and who merges.
//
// Every instruction is fetched once a block, and at the end of a short part nothing hides that: loops that run once or
// twice are not unrolled, and divisions are of 32 bits.
#pragma once

#include <cutlass/arch/barrier.h>
#include <bit>
#include <cute/arch/copy_sm90_tma.hpp>
#include <type_traits>

#include "attention/combine.h"
#include "core/cuda_check.h"
#include "core/once_per_device.h"
#include "flashcore/plan.h"
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
  static constexpr int rows = 16 * slices, warps = HopperDecodeTile::warps, consumers = 32 * warps;
  static constexpr int threads = consumers + 32;
  static constexpr int tile_k = DecodeParts::tile_k, warp_keys = HopperDecodeTile::warp_keys;
  static_assert(tile_k == warps * warp_keys && tile_k == 64 && head_dim % 32 == 0);

  static constexpr int panels = tile.panels(), panel_bytes = tile_k * 128;
  static constexpr int kv_bytes = tile.kv_bytes(), stage_bytes = tile.stage_bytes();
  static constexpr int blocks_a_unit = tile.blocks_a_unit();
};

struct DecodeArguments {
  CUtensorMap k, v;  // boxes of 64 columns × box_rows keys, or of all columns where box_panels is 1
  sm80::DecodeParams p;
  DecodeParts parts;
  Divisor group, row_tiles;  // of p
  int log_box;               // of box_rows: 64, or a page's where that is less
  int log_page;              // of p.page_size
  int box_panels;            // boxes that bring a key's columns
  Divisor even;              // parts of each item; 0: `parts` says how many, by the lengths
  int log_cluster;           // of the blocks that share a part and merge it
};

// Keys or values in shared memory as TMA writes them with its 128-byte swizzle: panels of 64 columns, a row of a panel
// 128 bytes, whose 16-byte chunks are permuted by the row modulo 8.
struct PanelTile {
  static __device__ __forceinline__ uint32_t offset(int row, int chunk) {
    return chunk / 8 * (64 * 128) + row * 128 + ((chunk ^ row) & 7) * 16;
  }
  // The offset that is `slices` slices of 16 columns to the right of `offset`, which lies in the first.
  static __device__ __forceinline__ uint32_t right(uint32_t offset, int slices) {
    return (offset ^ (32 * (slices % 4))) + slices / 4 * (64 * 128);
  }
};

// What a consumer warp has in registers.
template <class Config>
using Work = sm80::DecodeRows<typename Config::Element, Config::head_dim, Config::slices, PanelTile>;

// --- instructions ----------------------------------------------------------------------------------------------------

__device__ __forceinline__ void consumers_sync(int threads) {
  asm volatile("barrier.cta.sync.aligned 1, %0;" ::"r"(threads) : "memory");
}
// All warps of the block, in two branches: not __syncthreads(), which wants them in one place.
template <class Config>
__device__ __forceinline__ void part_is_known() {
  asm volatile("barrier.cta.sync.aligned 2, %0;" ::"n"(Config::threads) : "memory");
}
// Writes to another block's shared memory, whose barrier counts the bytes.
__device__ __forceinline__ void send(uint32_t address, float x, uint32_t barrier) {
  asm volatile("st.async.shared::cluster.mbarrier::complete_tx::bytes.b32 [%0], %1, [%2];" ::"r"(address),
               "r"(__float_as_uint(x)), "r"(barrier)
               : "memory");
}
__device__ __forceinline__ void send(uint32_t address, float x, float y, uint32_t barrier) {
  asm volatile("st.async.shared::cluster.mbarrier::complete_tx::bytes.v2.b32 [%0], {%1, %2}, [%3];" ::"r"(address),
               "r"(__float_as_uint(x)), "r"(__float_as_uint(y)), "r"(barrier)
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
  bool ahead;                // the first tile was asked for before the lengths were known
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
  // (warps, rows), and as many sums behind them
  __device__ __forceinline__ float* maxima() const { return reinterpret_cast<float*>(base + tile.q_bytes()); }
  __device__ __forceinline__ float* sums() const { return maxima() + Config::warps * Config::rows; }
  __device__ __forceinline__ DecodeBarrier* full_keys() const {
    return reinterpret_cast<DecodeBarrier*>(base + tile.q_bytes() + tile.state_bytes());
  }
  __device__ __forceinline__ DecodeBarrier* full_values() const { return full_keys() + most_stages; }
  __device__ __forceinline__ DecodeBarrier* empty() const { return full_keys() + 2 * most_stages; }
  __device__ __forceinline__ DecodeBarrier* received_all() const { return full_keys() + 3 * most_stages; }
  __device__ __forceinline__ DecodePart& part() const { return *reinterpret_cast<DecodePart*>(received_all() + 2); }
  // A bit for each box of a stage whose page does not exist.
  __device__ __forceinline__ uint32_t* absent() const {
    return reinterpret_cast<uint32_t*>(reinterpret_cast<char*>(&part()) + 64);
  }

  __device__ __forceinline__ char* keys(int stage) const {
    return base + tile.head_bytes() + stage * Config::stage_bytes;
  }
  __device__ __forceinline__ char* values(int stage) const { return keys(stage) + Config::kv_bytes; }
  // (warps, rows, merge_stride), when the stages have been read
  __device__ __forceinline__ float* outputs() const { return reinterpret_cast<float*>(keys(0)); }
  // In a cluster, from the `sources` warps of all its blocks: (rows, sources, columns of this block), (rows, sources)
  __device__ __forceinline__ float* received() const {
    constexpr int head_bytes = tile.head_bytes(), merge_bytes = tile.merge_bytes();
    return reinterpret_cast<float*>(base + head_bytes + max_of(stages * Config::stage_bytes, merge_bytes));
  }
  __device__ __forceinline__ float* received_lse(int rows) const {
    return received() + rows * Config::warps * Config::head_dim;
  }
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

__device__ __forceinline__ uint32_t shared_address(void const* x) {
  return static_cast<uint32_t>(__cvta_generic_to_shared(x));
}

// --- the producer ----------------------------------------------------------------------------------------------------

// What TMA tells the L2 cache: nobody reads keys and values again.
constexpr uint64_t read_once = 0x12f0000000000000;

// One warp: finds out what the block's part is, leaves it to the consumers, and asks for its tiles as the stages empty,
// each box by a lane.
template <class Config>
__device__ __forceinline__ void produce(DecodeArguments const& a, DecodeMemory<Config> const& shared, int lane) {
  sm80::DecodeParams const& p = a.p;
  StagePlace place;
  constexpr int log_tile = 6;
  static_assert(Config::tile_k == 1 << log_tile);
  int const box_rows = 1 << a.log_box, log_boxes = log_tile - a.log_box, boxes = 1 << log_boxes;
  // A box that is not there comes as zeros from behind the last page.
  int const nowhere = max_of(p.pages, 1);
  auto const load = [&](int row, int head, int block) {
    shared.empty()[place.stage].wait(place.phase ^ 1);
    uint32_t const absent = __ballot_sync(0xffffffffu, lane < boxes && block < 0);
    DecodeBarrier &full_keys = shared.full_keys()[place.stage], &full_values = shared.full_values()[place.stage];
    if (lane == 0) {
      shared.absent()[place.stage] = absent;
      full_keys.arrive_and_expect_tx(Config::kv_bytes);
      full_values.arrive_and_expect_tx(Config::kv_bytes);
    }
    __syncwarp();
    if (lane < boxes) {
      int const at = block < 0 ? nowhere : block;
#pragma unroll 1
      for (int i = 0; i < 2; ++i) {
        char* to = (i == 0 ? shared.keys(place.stage) : shared.values(place.stage)) + lane * box_rows * 128;
#pragma unroll 1
        for (int panel = 0; panel < a.box_panels; ++panel) {
          cute::SM90_TMA_LOAD_5D::copy(i == 0 ? &a.k : &a.v,
                                       reinterpret_cast<uint64_t*>(i == 0 ? &full_keys : &full_values), read_once, to,
                                       panel * 64, row, 0, head, at);
          to += Config::panel_bytes;
        }
      }
    }
    __syncwarp();
    place.advance(shared.stages);
  };

  // The pages of 32 boxes of the part, one a lane, where they begin before key `end`.
  auto const pages_from = [&](DecodePart const& part, int box, int end) {
    box += lane;
    int const i = box >> log_boxes;
    int const key = (part.first + i * part.step) * Config::tile_k + (box - (i << log_boxes)) * box_rows;
    if (key >= end) return -1;
    int const page = p.page_table[part.sequence * p.page_table_stride + (key >> a.log_page)];
    return page >= 0 && page < p.pages ? page : -1;
  };
  int next_pages = -1;

  DecodePart part;
  KeyRange range;
  bool ahead = false;
  // The blocks of all of an item's parts take its tiles in turn: what is read at the same time lies side by side.
  int const number = blockIdx.x >> a.log_cluster, rank = blockIdx.x - (number << a.log_cluster);
  int parts, way;
  if (a.even.divisor > 0) {
    int index;
    part = even_part<Config>(a, index);
    parts = a.even.divisor;
    way = index << a.log_cluster | rank;
    // The length is asked for first: behind the keys it would wait for them.
    int length;
    asm volatile("ld.global.b32 %0, [%1];" : "=r"(length) : "l"(p.cache_seqlens + part.sequence));
    // The block knows its first tile without the length, unless a window says where it is: asked for ahead, it comes
    // while the length does.
    ahead = p.window_left >= unlimited && way * Config::tile_k < p.seqlen_k;
    part.first = way;
    part.step = parts << a.log_cluster;
    int block = part.sequence, row = way * Config::tile_k;
    if (p.page_table != nullptr && ahead) {
      next_pages = pages_from(part, 0, p.seqlen_k);
      block = __shfl_sync(0xffffffffu, next_pages, lane);
      row = (row + (lane < boxes ? lane : 0) * box_rows) & (p.page_size - 1);
    }
    if (ahead) load(row, part.head, block);
    part.cached = clamp_to(length, 0, p.seqlen_k - p.new_tokens);
    range = a.parts.range(p, part.cached + p.new_tokens);
  } else {
    FoundSequence const found = find_sequence(p, a.parts, number, -1, lane);
    int const in_sequence = number - found.before;
    int const index = a.parts.lines.quotient(in_sequence), line = in_sequence - index * a.parts.lines.divisor;
    part = part_of_line<Config>(a, found.sequence, line);
    part.cached = found.cached;
    range = found.range;
    parts = found.parts;
    way = index << a.log_cluster | rank;
  }
  part.step = parts << a.log_cluster;
  part.first = range.begin + way;
  part.count = range.count() <= way ? 0 : parts_of(range.count() - way, part.step);
  part.slot = parts == 1 ? -1 : number;
  part.ahead = ahead;
  part.keys = part.cached + p.new_tokens;
  part.full_begin = range.full_begin;
  part.full_end = range.full_end;
  if (lane == 0) {
    shared.part() = part;
    if (a.log_cluster > 0 && part.sequence >= 0) {  // what the cluster's warps will send
      shared.received_all()->arrive_and_expect_tx(4 * part.valid_rows * Config::warps *
                                                  (Config::head_dim + (1 << a.log_cluster)));
    }
  }
  part_is_known<Config>();
  if (part.sequence < 0) return;

  if (p.page_table == nullptr) {
#pragma unroll 1
    for (int i = ahead; i < part.count; ++i) {
      load((part.first + i * part.step) * Config::tile_k, part.head, part.sequence);
    }
    return;
  }
  // The pages of 32 boxes at a time, one a lane, and those of the next 32 meanwhile.
  int pages = -1;
  if (!ahead) next_pages = pages_from(part, 0, part.keys);
#pragma unroll 1
  for (int i = 0, box = 0; i < part.count; ++i, box += boxes) {
    if (box % 32 == 0) {
      pages = next_pages;
      next_pages = pages_from(part, box + 32, part.keys);
    }
    if (i == 0 && ahead) continue;
    int const block = __shfl_sync(0xffffffffu, pages, (box + lane) % 32);
    int const row = (part.first + i * part.step) * Config::tile_k + (lane < boxes ? lane : 0) * box_rows;
    load(row & (p.page_size - 1), part.head, block);
  }
}

// --- the consumers ---------------------------------------------------------------------------------------------------

// Puts rows that TMA has not brought in place of what it has: of the warp's 16, rows begin to end are new tokens, row r
// being token first_token + r, and the rest, of values, is cleared.
template <class Config>
__device__ __forceinline__ void patch(sm80::DecodeParams const& p, Rows<void const*> const& appended, bool clears,
                                      char* rows, DecodePart const& part, int begin, int end, int first_token,
                                      int lane) {
  using Element = typename Config::Element;
  constexpr int chunks = Config::head_dim / 8;
#pragma unroll 1
  for (int i = begin * chunks + lane; i < (clears ? Config::warp_keys : end) * chunks; i += 32) {
    int const row = i / chunks, chunk = i % chunks;
    uint4 x{0, 0, 0, 0};
    if (row < end && chunk * 8 < p.head_dim) {
      x = __ldg(reinterpret_cast<uint4 const*>(
          static_cast<Element const*>(appended.data) + part.sequence * appended.batch_stride +
          (first_token + row) * appended.row_stride + part.head * appended.head_stride + chunk * 8));
    }
    *reinterpret_cast<uint4*>(rows + PanelTile::offset(row, chunk)) = x;
  }
}

// Each warp sends its rows' results to the cluster's blocks: equal shares of the columns, and to all the log-sum-exp.
template <class Config>
__device__ __forceinline__ void send_rows(DecodeArguments const& a, DecodeMemory<Config> const& shared,
                                          Work<Config>& work, int warp, int lane, bool acts) {
  DecodePart const& part = shared.part();
  constexpr unsigned slices_n = Config::head_dim / 8;
  int const blocks = 1 << a.log_cluster, sources = blocks * Config::warps, columns = Config::head_dim >> a.log_cluster;
  int const source = (blockIdx.x & (blocks - 1)) * Config::warps + warp;
  uint32_t const all = shared_address(shared.received_all());
  cluster_wait_acquire();  // all blocks run
#pragma unroll
  for (int m = 0; m < Config::slices; ++m) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      if (m * 16 + half * 8 >= part.valid_rows) continue;
      SoftmaxRow& state = work.state[m][half];
      state.sum = sm80::sum_of_quad(state.sum);
      int const row = m * 16 + half * 8 + lane / 4;
      if (row >= part.valid_rows) continue;
      float const inverse = state.inverse_sum(), lse = state.lse(a.p.score.factor);
      uint32_t const lse_to = shared_address(shared.received_lse(part.valid_rows) + row * sources + source);
#pragma unroll 1
      for (int block = lane % 4; block < blocks; block += 4) {
        if (acts) send(in_block(lse_to, block), lse, in_block(all, block));
      }
      uint32_t const to = shared_address(shared.received() + (row * sources + source) * columns + lane % 4 * 2);
#pragma unroll
      for (int n = 0; n < static_cast<int>(slices_n); ++n) {
        int const owner = static_cast<int>(static_cast<unsigned>(n * blocks) / slices_n);
        float const low = work.o[m][n][2 * half] * inverse, high = work.o[m][n][2 * half + 1] * inverse;
        uint32_t const at = in_block(to + (n * 8 - owner * columns) * 4, owner), barrier = in_block(all, owner);
        if (acts) send(at, low, high, barrier);
      }
    }
  }
}

// This block's columns of the item's rows, when all warps of the cluster have sent theirs: a warp merges a row, the
// results in their order.
template <class Config>
__device__ __forceinline__ void merge_cluster(DecodeArguments const& a, DecodeMemory<Config> const& shared, int warp,
                                              int lane, bool acts) {
  using Element = typename Config::Element;
  sm80::DecodeParams const& p = a.p;
  DecodePart const& part = shared.part();
  int const blocks = 1 << a.log_cluster, sources = blocks * Config::warps, columns = Config::head_dim >> a.log_cluster;
  int const rank = blockIdx.x & (blocks - 1);
  static_assert(HopperDecodeTile::most_cluster * Config::warps <= 32);
  if (acts) shared.received_all()->wait(0);
#pragma unroll 1
  for (int row = warp; row < part.valid_rows; row += Config::warps) {
    // Lane l has the weight of source l.
    float const lse =
        acts && lane < sources ? shared.received_lse(part.valid_rows)[row * sources + lane] : minus_infinity();
    float top = lse;
#pragma unroll
    for (int step = 16; step > 0; step /= 2) {
      float const other = __shfl_xor_sync(0xffffffffu, top, step);
      top = other > top || other != other ? other : top;  // a NaN stays
    }
    float const weight = part_weight(lse, top);
    float total = weight;
#pragma unroll
    for (int step = 16; step > 0; step /= 2) total += __shfl_xor_sync(0xffffffffu, total, step);
    float const inverse = total == 0.0f ? 0.0f : 1.0f / total;
    RowPlace const at = row_place(a, part, row);
    Element* const out = static_cast<Element*>(p.o.data) + row_offset(p.o, part.sequence, at) + rank * columns;
    // And four columns of every eighth source, which eight lanes add up.
#pragma unroll 1
    for (int begin = 0; begin < columns; begin += 16) {
      int const column = begin + lane % 4 * 4;
      float4 sum{0.0f, 0.0f, 0.0f, 0.0f};
#pragma unroll
      for (int j = 0; j < 4; ++j) {
        int const source = j * 8 + lane / 4;
        float const w = __shfl_sync(0xffffffffu, weight, source);
        if (acts && source < sources && column < columns) {
          float4 const x =
              *reinterpret_cast<float4 const*>(shared.received() + (row * sources + source) * columns + column);
          sum.x += w * x.x, sum.y += w * x.y, sum.z += w * x.z, sum.w += w * x.w;
        }
      }
#pragma unroll
      for (int step = 4; step < 32; step *= 2) {
        sum.x += __shfl_xor_sync(0xffffffffu, sum.x, step);
        sum.y += __shfl_xor_sync(0xffffffffu, sum.y, step);
        sum.z += __shfl_xor_sync(0xffffffffu, sum.z, step);
        sum.w += __shfl_xor_sync(0xffffffffu, sum.w, step);
      }
      sum.x *= inverse, sum.y *= inverse, sum.z *= inverse, sum.w *= inverse;
      if (lane < 4 && column < columns && rank * columns + column < p.head_dim) {
        if (part.slot >= 0) {
          float* const to =
              p.part_out + (int64_t{part.slot} * p.part_rows + row) * p.head_dim + rank * columns + column;
          if (acts) *reinterpret_cast<float4*>(to) = sum;
        } else {
          using P = sm80::Precision<Element>;
          if (acts) *reinterpret_cast<uint2*>(out + column) = {P::pack(sum.x, sum.y), P::pack(sum.z, sum.w)};
        }
      }
    }
    if (acts && rank == 0 && lane == 0) {
      if (part.slot >= 0) {
        p.part_lse[int64_t{part.slot} * p.part_rows + row] = merged_lse(top, total);
      } else if (p.lse != nullptr) {
        p.lse[(int64_t{part.sequence} * p.heads_q + at.head) * p.seqlen_q + at.token] = merged_lse(top, total);
      }
    }
  }
}

template <class Config>
__device__ __forceinline__ void consume(DecodeArguments const& a, DecodeMemory<Config> const& shared,
                                        Work<Config>& work, int warp, int lane) {
  using Element = typename Config::Element;
  using Queries = sm80::SharedTile<Config::head_dim>;
  constexpr int head_dim = Config::head_dim, slices = Config::slices, rows = Config::rows, tile_k = Config::tile_k;
  constexpr int chunks = head_dim / 8, consumers = Config::consumers;
  sm80::DecodeParams const& p = a.p;
  DecodePart const& part = shared.part();

  // The queries are asked for before the keys, too, where the lengths do not say whose.
  bool const known = a.even.divisor > 0;
  DecodePart place_of_q;
  int index;
  if (known) {
    place_of_q = even_part<Config>(a, index);
  } else {
    part_is_known<Config>();
    place_of_q = part;
    if (part.sequence < 0) {
      if (p.new_tokens > 0) sm80::append<Element, uint32_t>(p, consumers);
      return;
    }
  }
  uint32_t const shared_q = shared_address(shared.queries());
#pragma unroll 1
  for (int i = threadIdx.x; i < rows * chunks; i += consumers) {
    int const row = i / chunks, chunk = i % chunks;
    Element const* const source = static_cast<Element const*>(p.q.data) +
                                  row_offset(p.q, place_of_q.sequence, row_place(a, place_of_q, row)) + chunk * 8;
    sm80::copy_async(shared_q + Queries::offset(row, chunk), source,
                     row < place_of_q.valid_rows && chunk * 8 < p.head_dim);
  }
  sm80::copy_commit();
  if (known) part_is_known<Config>();
  if (p.new_tokens > 0) sm80::append<Element, uint32_t>(p, consumers);
  sm80::copy_wait_all();
  consumers_sync(consumers);  // the queries are here

  // This lane's rows of the operands, as in the forward kernel.
  uint32_t const from_q = shared_q + Queries::offset(lane % 16, lane / 16);
  int const tile_key = warp * Config::warp_keys;  // of a tile, this warp's first
  uint32_t const lane_k = tile_key * 128 + PanelTile::offset(lane % 8 + lane / 16 * 8, lane / 8 % 2);
  uint32_t const lane_v = tile_key * 128 + PanelTile::offset(lane % 16, lane / 16);
  work.start(from_q);
  StagePlace place;
  int const count = part.count;
#pragma unroll 1
  for (int i = 0; i < count; ++i) {
    int const tile = part.first + i * part.step, first = tile * tile_k + tile_key;
    char* const stage_keys = shared.keys(place.stage);
    shared.full_keys()[place.stage].wait(place.phase);
    bool const here = (shared.absent()[place.stage] >> (tile_key >> a.log_box) & 1) == 0;
    bool const patched = here && first + Config::warp_keys > part.cached;
    auto const patch_with = [&](Rows<void const*> const& appended, bool clears, char* tile) {
      patch<Config>(p, appended, clears, tile + tile_key * 128, part,
                    clamp_to(part.cached - first, 0, Config::warp_keys),
                    clamp_to(part.keys - first, 0, Config::warp_keys), first - part.cached, lane);
    };
    if (patched && p.new_tokens > 0) {
      patch_with(p.new_k, false, stage_keys);
      __syncwarp();
    }

    float s[slices][2][4];
    uint32_t weights[slices][4];
    work.scores(s, from_q, shared_address(stage_keys) + lane_k);
    if (!p.plain_score) work.transform(s, p.score);
    if (!here || tile < part.full_begin || tile >= part.full_end) {  // keys that not all queries see
      work.hide(
          s, cache_mask(p, part.keys), first, part.first_row, [&](int row) { return a.group.quotient(row); }, here,
          lane);
    }
    work.softmax(s, weights, p.score.factor);

    shared.full_values()[place.stage].wait(place.phase);
    if (patched) {
      patch_with(p.new_v, true, shared.values(place.stage));
      cutlass::arch::fence_view_async_shared();  // before TMA writes there again
      __syncwarp();
    }
    work.output(weights, shared_address(stage_keys) + Config::kv_bytes + lane_v);
    __syncwarp();  // all lanes are done with the stage
    if (lane == 0) shared.empty()[place.stage].arrive();
    place.advance(shared.stages);
  }
  if (count <= 0 && part.ahead) {  // a tile was asked for in vain: it is to arrive before its place is used
    shared.full_keys()[0].wait(0);
    shared.full_values()[0].wait(0);
  }
}

// The end of a part. The producer's warp goes the same way before the consumers get there and does nothing on it
// (`acts` is false): it fetches the instructions, which would take longer than to execute them.
template <class Config>
__device__ __forceinline__ void finish(DecodeArguments const& a, DecodeMemory<Config> const& shared, Work<Config>& work,
                                       int warp, int lane, bool acts) {
  using Element = typename Config::Element;
  constexpr int head_dim = Config::head_dim, slices = Config::slices, rows = Config::rows;
  constexpr int consumers = Config::consumers, merge_stride = Config::tile.merge_stride();
  sm80::DecodeParams const& p = a.p;
  DecodePart const& part = shared.part();
  auto const read = [acts](auto const* from) { return acts ? *from : std::remove_cvref_t<decltype(*from)>{}; };
  if (a.log_cluster > 0) {
    send_rows<Config>(a, shared, work, warp, lane, acts);
    merge_cluster<Config>(a, shared, warp % Config::warps, lane, acts);
    return;
  }

  // The warps' results become one: each scales its own by its weight over the sum of all.
  float* const maxima = shared.maxima() + warp * rows + lane / 4;
#pragma unroll
  for (int m = 0; m < slices; ++m) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      float const sum = sm80::sum_of_quad(work.state[m][half].sum);
      if (acts && lane % 4 == 0) {
        maxima[m * 16 + half * 8] = work.state[m][half].max;
        maxima[m * 16 + half * 8 + Config::warps * rows] = sum;
      }
    }
  }
  if (acts) consumers_sync(consumers);  // the states are there, and nobody reads the stages any more
#pragma unroll
  for (int m = 0; m < slices; ++m) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      int const row = m * 16 + half * 8 + lane / 4;
      if (m * 16 + half * 8 >= part.valid_rows) continue;
      SoftmaxRow all;
#pragma unroll
      for (int w = 0; w < Config::warps; ++w) all.max = fmaxf(all.max, read(shared.maxima() + w * rows + row));
      float const top = all.max == minus_infinity() ? 0.0f : all.max;
#pragma unroll
      for (int w = 0; w < Config::warps; ++w) {
        all.sum += exp2_of((read(shared.maxima() + w * rows + row) - top) * p.score.factor) *
                   read(shared.sums() + w * rows + row);
      }
      float const weight = exp2_of((work.state[m][half].max - top) * p.score.factor) * all.inverse_sum();
      float* const to = shared.outputs() + (warp * rows + row) * merge_stride + lane % 4 * 2;
#pragma unroll
      for (int n = 0; n < head_dim / 8; ++n) {
        float2 const pair{work.o[m][n][2 * half] * weight, work.o[m][n][2 * half + 1] * weight};
        if (acts) *reinterpret_cast<float2*>(to + n * 8) = pair;
      }
      if (warp % Config::warps == 0 && row < part.valid_rows) {
        float const lse = all.lse(p.score.factor);
        if (lane % 4 == 0 && part.slot >= 0) {
          if (acts) p.part_lse[int64_t{part.slot} * p.part_rows + row] = lse;
        } else if (lane % 4 == 0 && p.lse != nullptr) {
          RowPlace const at = row_place(a, part, row);
          if (acts) p.lse[(int64_t{part.sequence} * p.heads_q + at.head) * p.seqlen_q + at.token] = lse;
        }
      }
    }
  }
  if (acts) consumers_sync(consumers);  // the outputs are there
  constexpr int row_pieces = head_dim / 4;
#pragma unroll 1
  for (int i = threadIdx.x % consumers; i < part.valid_rows * row_pieces; i += consumers) {
    int const row = i / row_pieces, piece = i % row_pieces;
    if (piece * 4 >= p.head_dim) continue;
    float4 sum{0.0f, 0.0f, 0.0f, 0.0f};
#pragma unroll
    for (int w = 0; w < Config::warps; ++w) {
      float4 const x =
          read(reinterpret_cast<float4 const*>(shared.outputs() + (w * rows + row) * merge_stride + piece * 4));
      sum.x += x.x, sum.y += x.y, sum.z += x.z, sum.w += x.w;
    }
    if (part.slot >= 0) {
      float* const out = p.part_out + (int64_t{part.slot} * p.part_rows + row) * p.head_dim + piece * 4;
      if (acts) *reinterpret_cast<float4*>(out) = sum;
    } else {
      Element* const out =
          static_cast<Element*>(p.o.data) + row_offset(p.o, part.sequence, row_place(a, part, row)) + piece * 4;
      using P = sm80::Precision<Element>;
      if (acts) *reinterpret_cast<uint2*>(out) = {P::pack(sum.x, sum.y), P::pack(sum.z, sum.w)};
    }
  }
}

// --- the kernel ------------------------------------------------------------------------------------------------------

template <class Config>
__global__ void __launch_bounds__(Config::threads, Config::blocks_a_unit)
    decode_kernel(__grid_constant__ DecodeArguments const a) {
  extern __shared__ __align__(1024) char memory[];
  DecodeMemory<Config> const shared{memory, a.p.stages};
  int const warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  if (warp == Config::warps) {
    if (lane == 0) {
      asm volatile("prefetch.tensormap [%0];" ::"l"(&a.k) : "memory");
      asm volatile("prefetch.tensormap [%0];" ::"l"(&a.v) : "memory");
    }
    if (lane < a.p.stages) {
      shared.full_keys()[lane].init(1);
      shared.full_values()[lane].init(1);
      shared.empty()[lane].init(Config::warps);
    }
    if (lane == 0 && a.log_cluster > 0) shared.received_all()->init(1);
    cutlass::arch::fence_barrier_init();
    __syncwarp();
  }
  if (a.log_cluster > 0) cluster_arrive_relaxed();
  sm80::wait_for_primary();
  sm80::let_dependents_launch();

  Work<Config> work;
  if (warp == Config::warps) {
    work.clear();
    produce<Config>(a, shared, lane);
  } else {
    consume<Config>(a, shared, work, warp, lane);
  }
  if (shared.part().sequence < 0) {
    if (a.log_cluster > 0) cluster_wait_acquire();
    return;
  }
  finish<Config>(a, shared, work, warp, lane, warp != Config::warps);
}

template <class Config>
void run_decode(DecodeParams const& p, Plan const& plan, cudaStream_t stream) {
  constexpr DType dtype = std::is_same_v<typename Config::Element, __half> ? float16 : bfloat16;
  bool const paged = p.page_table != nullptr;
  int const box_rows = paged ? min_of(Config::tile_k, p.page_size) : Config::tile_k;
  // One box brings all columns where they are whole panels, and a tile's keys lie in one page.
  bool const whole = p.head_dim == 64 * Config::panels && box_rows == Config::tile_k;
  auto const cache = [&](Rows<void const*> const& rows) {
    return tensor_map(
        {rows.data,
         dtype,
         whole ? 64 : p.head_dim,
         {paged ? p.page_size : p.seqlen_k, whole ? Config::panels : 1, p.heads_k, paged ? p.pages : p.batch},
         {rows.row_stride, 64, rows.head_stride, rows.batch_stride},
         {box_rows, whole ? Config::panels : 1}});
  };
  auto const log2_of_power = [](int x) { return std::countr_zero(static_cast<unsigned>(x)); };
  DecodeArguments const arguments{cache(p.k),
                                  cache(p.v),
                                  p,
                                  p.parts,
                                  Divisor::of(p.group),
                                  Divisor::of(p.row_tiles),
                                  log2_of_power(box_rows),
                                  paged ? log2_of_power(p.page_size) : 0,
                                  whole ? 1 : Config::panels,
                                  p.even > 0 ? Divisor::of(p.even) : Divisor{0},
                                  log2_of_power(plan.cluster)};

  auto const kernel = decode_kernel<Config>;
  static OncePerDevice once;
  once([&] {
    constexpr int most_shared_memory = 227 << 10;  // of a block on compute capability 9.0
    char const* const preparing = "preparing the sm90 decode kernel";
    cuda_check(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, most_shared_memory),
               preparing);
    cuda_check(
        cudaFuncSetAttribute(kernel, cudaFuncAttributePreferredSharedMemoryCarveout, cudaSharedmemCarveoutMaxShared),
        preparing);
  });
  cudaLaunchConfig_t config{};
  config.gridDim = dim3(static_cast<unsigned>(plan.blocks));
  config.blockDim = dim3(Config::threads);
  config.dynamicSmemBytes = static_cast<size_t>(plan.shared_memory);
  config.stream = stream;
  cudaLaunchAttribute attributes[2]{};
  attributes[0].id = cudaLaunchAttributeProgrammaticStreamSerialization;
  attributes[0].val.programmaticStreamSerializationAllowed = 1;
  attributes[1].id = cudaLaunchAttributeClusterDimension;
  attributes[1].val.clusterDim = {static_cast<unsigned>(plan.cluster), 1, 1};
  config.attrs = attributes;
  config.numAttrs = plan.cluster > 1 ? 2 : 1;
  cuda_check(cudaLaunchKernelEx(&config, kernel, arguments), "launching the sm90 decode kernel");
}

}  // namespace flashcore::sm90

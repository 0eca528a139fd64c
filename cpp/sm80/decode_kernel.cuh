// SPDX-License-Identifier: Apache-2.0
// The decode kernel: a few queries a sequence over a long cache, which is bound by reading the cache. Its blocks take
// equal shares of all keys (attention/decode_schedule.h); the rows of a tile are the tokens of all query heads of a key
// head, so that every key is read once.
//
// The four warps of a block divide every tile of 64 keys: each loads 16 keys and their values into a ring of its own
// with cp.async, multiplies them with all rows, and has a softmax state and an output of its own. So a warp waits for
// nobody while it walks over the keys; the four results are merged at the end of an item. Parts of items go to the
// workspace in float32 and are merged by merge_kernel (decode_merge.cu).
#pragma once

#include <type_traits>

#include "attention/combine.h"
#include "attention/dependent.cuh"
#include "core/cuda_check.h"
#include "core/once_per_device.h"
#include "flashcore/plan.h"
#include "sm80/decode_rows.cuh"

namespace flashcore::sm80 {

template <class Element_, int head_dim_, int slices_>
struct DecodeConfig {
  using Element = Element_;
  using Tile = SharedTile<head_dim_>;
  static constexpr int head_dim = head_dim_;
  static constexpr int slices = slices_;  // of 16 rows
  static constexpr int rows = 16 * slices, warps = DecodeTile::warps, threads = 32 * warps;
  static constexpr int tile_k = DecodeSchedule::tile_k, warp_keys = DecodeTile::warp_keys;
  static_assert(tile_k == warps * warp_keys && warp_keys == 16);

  static constexpr int q_bytes = DecodeTile{head_dim, slices}.q_bytes();
  static constexpr int merge_stride = DecodeTile{head_dim, slices}.merge_stride();
  // A warp's keys of one tile, and behind them their values, are a stage of its ring.
  static constexpr int keys_bytes = warp_keys * Tile::row_bytes, stage_bytes = 2 * keys_bytes;
  static_assert(warps * stage_bytes == DecodeTile{head_dim, slices}.stage_bytes());
};

// At most `n` groups of this thread's copies are still on their way.
__device__ __forceinline__ void copy_wait(int n) {
  switch (n) {
#define FLASHCORE_WAIT(n)                                        \
  case n:                                                        \
    asm volatile("cp.async.wait_group %0;" ::"n"(n) : "memory"); \
    break;
    FLASHCORE_WAIT(8)
    FLASHCORE_WAIT(7)
    FLASHCORE_WAIT(6)
    FLASHCORE_WAIT(5)
    FLASHCORE_WAIT(4)
    FLASHCORE_WAIT(3)
    FLASHCORE_WAIT(2)
    FLASHCORE_WAIT(1)
#undef FLASHCORE_WAIT
    default:
      copy_wait_all();
  }
}

// A warp's loads of its 16 keys of a tile, and their values, into a stage of its ring.
template <class Config>
struct CacheLoad {
  using Element = typename Config::Element;
  using Tile = typename Config::Tile;
  static constexpr int rows_a_pass = 32 / Tile::group;
  static constexpr int passes = Config::warp_keys / rows_a_pass;
  static constexpr int groups = Config::head_dim / 8 / Tile::group;

  int row, chunk;  // of this lane in the first pass
  int b, head;
  int cached, keys;  // rows in the cache, and with the new ones

  __device__ CacheLoad(int lane, int b, int head, int cached, int keys)
      : row(lane / Tile::group), chunk(lane % Tile::group), b(b), head(head), cached(cached), keys(keys) {}

  // This lane's place in row `row` of the block `block` of an array.
  __device__ Element const* place(Rows<void const*> const& array, int64_t block, int64_t row) const {
    return static_cast<Element const*>(array.data) + block * array.batch_stride + row * array.row_stride +
           head * array.head_stride + chunk * 8;
  }

  // `first` is the first key; it lies in row `block_row` of block `block` of the cache. Rows past the end are cleared,
  // all of them where the block does not exist (-1).
  __device__ __forceinline__ void load(DecodeParams const& p, uint32_t to, int first, int block, int block_row) const {
    if (block >= 0 && first + Config::warp_keys <= cached) {
      load_rows<false>(p, p.k, p.new_k, to, first, block, block_row);
      load_rows<false>(p, p.v, p.new_v, to + Config::keys_bytes, first, block, block_row);
    } else {
      load_rows<true>(p, p.k, p.new_k, to, first, block, block_row);
      load_rows<true>(p, p.v, p.new_v, to + Config::keys_bytes, first, block, block_row);
    }
  }

 private:
  template <bool edge>
  __device__ __forceinline__ void load_rows(DecodeParams const& p, Rows<void const*> const& array,
                                            Rows<void const*> const& appended, uint32_t to, int first, int block,
                                            int block_row) const {
    Element const* source = place(array, edge ? max_of(block, 0) : block, block_row + row);
#pragma unroll
    for (int pass = 0; pass < passes; ++pass) {
      int const key = first + row + pass * rows_a_pass;
      bool wanted = true;
      Element const* from = source;
      if constexpr (edge) {
        wanted = block >= 0 && key < keys;
        if (wanted && key >= cached) from = place(appended, b, key - cached);
      }
      uint32_t const target = to + Tile::offset(row + pass * rows_a_pass, chunk);
#pragma unroll
      for (int g = 0; g < groups; ++g) {
        copy_async(target + g * Tile::group * 16, from + g * Tile::group * 8,
                   wanted && (chunk + g * Tile::group) * 8 < p.head_dim);
      }
      source += rows_a_pass * array.row_stride;
    }
  }
};

template <class Config>
__global__ void __launch_bounds__(Config::threads) decode_kernel(__grid_constant__ DecodeParams const p) {
  using Element = typename Config::Element;
  using Tile = typename Config::Tile;
  constexpr int head_dim = Config::head_dim, slices = Config::slices, rows = Config::rows, tile_k = Config::tile_k;
  constexpr int chunks = head_dim / 8;
  launch_dependents();

  int const warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  DecodeSchedule const& schedule = p.schedule;
  LineScan const scan(p, lane);
  int64_t const total = scan.total(p), active = schedule.active(total);
  int64_t at = 0, end = 0;
  if (blockIdx.x < active) {
    at = DecodeSchedule::start(total, active, blockIdx.x);
    end = DecodeSchedule::start(total, active, blockIdx.x + 1);
  }
  if (at == end) {
    append<Element>(p, Config::threads);
    return;
  }

  // Shared memory: queries, then every warp's ring, whose place the merge of an item takes.
  extern __shared__ __align__(128) char shared[];
  __shared__ float warp_max[Config::warps][rows], warp_sum[Config::warps][rows];
  uint32_t const shared_q = static_cast<uint32_t>(__cvta_generic_to_shared(shared));
  uint32_t const ring = shared_q + Config::q_bytes + warp * p.stages * Config::stage_bytes;
  float* const outputs = reinterpret_cast<float*>(shared + Config::q_bytes);
  // This lane's rows of the operands, as in the forward kernel.
  uint32_t const from_q = shared_q + Tile::offset(lane % 16, lane / 16);
  uint32_t const lane_k = Tile::offset(lane % 8 + lane / 16 * 8, lane / 8 % 2);
  uint32_t const lane_v = Config::keys_bytes + Tile::offset(lane % 16, lane / 16);

  LineScan::Found const found = scan.find(p, at / schedule.lines);
  auto walk = DecodeSchedule::Walk::make(schedule, p, at, end, found.sequence, found.before);
  bool appended = p.new_tokens == 0;

#pragma unroll 1
  while (true) {
    DecodeSchedule::Part const part = walk.part(schedule, blockIdx.x);
    int const sequence = walk.sequence, head = walk.line / p.row_tiles;
    int const first_row = (walk.line - head * p.row_tiles) * rows;
    int const valid_rows = min_of(rows, p.rows - first_row);
    int const cached = cached_keys(p, sequence), keys = cached + p.new_tokens;
    Mask const mask = cache_mask(p, keys);
    KeyRange const range = mask.key_range(0, p.seqlen_q, tile_k);

    __syncthreads();  // all warps are done with the item before
    for (int i = threadIdx.x; i < rows * chunks; i += Config::threads) {
      int const row = i / chunks, chunk = i % chunks;
      int const token = (first_row + row) / p.group, in_group = first_row + row - token * p.group;
      Element const* const source = static_cast<Element const*>(p.q.data) + sequence * p.q.batch_stride +
                                    token * p.q.row_stride + (head * p.group + in_group) * p.q.head_stride + chunk * 8;
      copy_async(shared_q + Tile::offset(row, chunk), source, row < valid_rows && chunk * 8 < p.head_dim);
    }
    copy_commit();

    CacheLoad<Config> const loader(lane, sequence, head, cached, keys);
    int lane_page = -1;     // of the warp's keys in the tile `lane` tiles on from the last multiple of 32
    uint32_t in_cache = 0;  // a bit for each stage: its keys' page exists
    auto const load = [&](int tile, int stage) {
      int const first = tile * tile_k + warp * Config::warp_keys;
      int block = sequence, block_row = first;
      if (p.page_table != nullptr) {  // a warp's keys lie in one page
        int const index = (tile - part.begin) % 32;
        if (index == 0) {
          int const key = first + lane * tile_k;
          lane_page = tile + lane < part.end && key < keys ? cache_place(p, sequence, key).block : -1;
        }
        block = __shfl_sync(0xffffffffu, lane_page, index);
        block_row = first & (p.page_size - 1);
      }
      in_cache = block >= 0 ? in_cache | 1u << stage : in_cache & ~(1u << stage);
      loader.load(p, ring + stage * Config::stage_bytes, first, block, block_row);
    };
    for (int stage = 0; stage < p.stages; ++stage) {
      if (part.begin + stage < part.end) load(part.begin + stage, stage);
      copy_commit();  // an empty group where there is no such tile: groups are counted
    }
    if (!appended) {
      append<Element>(p, Config::threads);
      appended = true;
    }

    copy_wait(p.stages);
    __syncthreads();  // the queries are here
    DecodeRows<Element, head_dim, slices, Tile> work;
    work.start(from_q);
    int stage = 0;
#pragma unroll 1
    for (int tile = part.begin; tile < part.end; ++tile) {
      copy_wait(p.stages - 1);
      __syncwarp();  // the tile is here
      uint32_t const from_k = ring + stage * Config::stage_bytes + lane_k;
      uint32_t const from_v = ring + stage * Config::stage_bytes + lane_v;

      float s[slices][2][4];
      uint32_t weights[slices][4];
      work.scores(s, from_q, {}, from_k);
      if (!p.plain_score) work.transform(s, p.score);
      bool const here = in_cache >> stage & 1;
      if (!here || tile < range.full_begin || tile >= range.full_end) {  // keys that not all queries see
        work.hide(
            s, mask, tile * tile_k + warp * Config::warp_keys, first_row, [&](int row) { return row / p.group; }, here,
            lane);
      }
      work.softmax(s, weights, p.score.factor);
      work.output(weights, {}, from_v);

      __syncwarp();  // all lanes are done with the stage
      if (tile + p.stages < part.end) load(tile + p.stages, stage);
      copy_commit();
      stage = stage + 1 == p.stages ? 0 : stage + 1;
    }

    // The warps' results become one: each scales its own by its weight over the sum of all.
#pragma unroll
    for (int m = 0; m < slices; ++m) {
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        float const sum = quad_sum(work.state[m][half].sum);
        int const row = lane / 4 + m * 16 + half * 8;
        if (lane % 4 == 0) {
          warp_max[warp][row] = work.state[m][half].max;
          warp_sum[warp][row] = sum;
        }
      }
    }
    __syncthreads();  // the states are there, and nobody reads the rings any more
#pragma unroll
    for (int m = 0; m < slices; ++m) {
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        int const row = lane / 4 + m * 16 + half * 8;
        SoftmaxRow all;
#pragma unroll
        for (int w = 0; w < Config::warps; ++w) all.max = fmaxf(all.max, warp_max[w][row]);
        float const top = all.max == minus_infinity() ? 0.0f : all.max;
#pragma unroll
        for (int w = 0; w < Config::warps; ++w) {
          all.sum += exp2_of((warp_max[w][row] - top) * p.score.factor) * warp_sum[w][row];
        }
        float const weight = exp2_of((work.state[m][half].max - top) * p.score.factor) * all.inverse_sum();
#pragma unroll
        for (int n = 0; n < head_dim / 8; ++n) {
          float2 const pair{work.o[m][n][2 * half] * weight, work.o[m][n][2 * half + 1] * weight};
          *reinterpret_cast<float2*>(outputs + (warp * 16 + lane / 4 + half * 8) * Config::merge_stride + n * 8 +
                                     lane % 4 * 2) = pair;
        }
        if (warp == 0 && lane % 4 == 0 && row < valid_rows) {
          float const lse = all.lse(p.score.factor);
          if (part.slot >= 0) {
            p.part_lse[part.slot * p.part_rows + row] = lse;
          } else if (p.lse != nullptr) {
            int const token = (first_row + row) / p.group, in_group = first_row + row - token * p.group;
            p.lse[(int64_t{sequence} * p.heads_q + head * p.group + in_group) * p.seqlen_q + token] = lse;
          }
        }
      }
      __syncthreads();  // the slice's outputs are there
      for (int i = threadIdx.x; i < 16 * chunks; i += Config::threads) {
        int const in_slice = i / chunks, chunk = i % chunks, row = m * 16 + in_slice;
        if (row >= valid_rows || chunk * 8 >= p.head_dim) continue;
        float sum[8] = {};
#pragma unroll
        for (int w = 0; w < Config::warps; ++w) {
          float const* const from = outputs + (w * 16 + in_slice) * Config::merge_stride + chunk * 8;
          float4 const low = *reinterpret_cast<float4 const*>(from), high = *reinterpret_cast<float4 const*>(from + 4);
          sum[0] += low.x, sum[1] += low.y, sum[2] += low.z, sum[3] += low.w;
          sum[4] += high.x, sum[5] += high.y, sum[6] += high.z, sum[7] += high.w;
        }
        if (part.slot >= 0) {
          float* const to = p.part_out + (part.slot * p.part_rows + row) * p.head_dim + chunk * 8;
          *reinterpret_cast<float4*>(to) = {sum[0], sum[1], sum[2], sum[3]};
          *reinterpret_cast<float4*>(to + 4) = {sum[4], sum[5], sum[6], sum[7]};
        } else {
          int const token = (first_row + row) / p.group, in_group = first_row + row - token * p.group;
          Element* const to = static_cast<Element*>(p.o.data) + sequence * p.o.batch_stride + token * p.o.row_stride +
                              (head * p.group + in_group) * p.o.head_stride + chunk * 8;
          using P = Precision<Element>;
          *reinterpret_cast<uint4*>(to) = {P::pack(sum[0], sum[1]), P::pack(sum[2], sum[3]), P::pack(sum[4], sum[5]),
                                           P::pack(sum[6], sum[7])};
        }
      }
      if (m + 1 < slices) __syncthreads();
    }

    if (!walk.next(schedule, p, part)) return;
  }
}

template <class Config>
void run_decode(DecodeParams const& params, Plan const& plan, cudaStream_t stream) {
  auto const kernel = decode_kernel<Config>;
  static OncePerDevice prepare;
  prepare([&] {
    char const* const preparing = "preparing the decode kernel";
    // As much as a block can have here, whatever this plan takes of it.
    int device = 0, most = 0;
    cudaFuncAttributes own{};
    cuda_check(cudaGetDevice(&device), preparing);
    cuda_check(cudaDeviceGetAttribute(&most, cudaDevAttrMaxSharedMemoryPerBlockOptin, device), preparing);
    cuda_check(cudaFuncGetAttributes(&own, kernel), preparing);
    cuda_check(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize,
                                    most - static_cast<int>(own.sharedSizeBytes)),
               preparing);
    // Two blocks of a multiprocessor take all of its shared memory.
    cuda_check(
        cudaFuncSetAttribute(kernel, cudaFuncAttributePreferredSharedMemoryCarveout, cudaSharedmemCarveoutMaxShared),
        preparing);
  });
  kernel<<<static_cast<unsigned>(plan.blocks), Config::threads, plan.shared_memory, stream>>>(params);
  cuda_check(cudaGetLastError(), "launching the decode kernel");
}

}  // namespace flashcore::sm80

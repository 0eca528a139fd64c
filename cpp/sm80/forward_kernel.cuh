// SPDX-License-Identifier: Apache-2.0
// The forward kernel for compute capability 8.0 and later: one block computes one tile of queries of one head, walking
// over the tiles of keys from the last visible to the first, FlashAttention-2's order of work (Dao, arXiv:2307.08691).
//
// Per tile of keys: S = Q Kᵀ on the tensor cores, the online softmax on S in registers, O += P V with P packed from the
// registers that held S. Keys and values come through cp.async into shared memory while the other product runs.
#pragma once

#include "attention/mask.h"
#include "attention/quad.cuh"
#include "attention/scheduler.h"
#include "attention/score.h"
#include "attention/softmax.h"
#include "core/cuda_check.h"
#include "core/forward_params.h"
#include "core/once_per_device.h"
#include "flashcore/plan.h"
#include "sm80/tensor_core.h"

namespace flashcore::sm80 {

// What the kernel is compiled for. Each of `warps` warps owns tile_q / warps rows of queries. With one stage a tile of
// keys loads while the values' product runs and the other way round; with two both load one tile ahead.
template <class Element_, int head_dim_, int tile_q_, int tile_k_, int warps_, int stages_, bool plain_score_>
struct ForwardConfig {
  using Element = Element_;
  using Score = std::conditional_t<plain_score_, PlainScore, CappedScore>;
  using Tile = SharedTile<head_dim_>;
  static constexpr int head_dim = head_dim_, tile_q = tile_q_, tile_k = tile_k_, warps = warps_, stages = stages_;
  static constexpr int threads = 32 * warps;
  static constexpr int slices = tile_q / (16 * warps);  // of 16 rows a warp
  static_assert(tile_q % (16 * warps) == 0 && tile_k % 16 == 0 && head_dim % 32 == 0 && (stages == 1 || stages == 2));

  static constexpr int q_bytes = tile_q * Tile::row_bytes, kv_bytes = tile_k * Tile::row_bytes;
  static constexpr int shared_memory = q_bytes + 2 * stages * kv_bytes;

  // Up to head dimension 64 there are registers left for the queries' operands, which then are read from shared memory
  // once.
  static constexpr bool q_in_registers = head_dim <= 64 && tile_k <= 64;
};

// The part of a tile's loading that one thread does: one chunk of 16 bytes in every group of chunks of every
// rows_a_pass-th row. Its chunks keep their place in the permutation, so that all its addresses are one base plus
// constants.
template <class Config>
struct TileCopy {
  using Tile = typename Config::Tile;
  static constexpr int rows_a_pass = Config::threads / Tile::group;
  static constexpr int groups = Config::head_dim / 8 / Tile::group;
  static_assert(rows_a_pass % 8 == 0 && Config::tile_q % rows_a_pass == 0 && Config::tile_k % rows_a_pass == 0);

  int row, chunk;
  uint32_t offset;

  __device__ explicit TileCopy(int thread)
      : row(thread / Tile::group), chunk(thread % Tile::group), offset(Tile::offset(row, chunk)) {}

  // Loads `rows` rows; with `bounded` those from `end` on are cleared. So are the columns past `head_dim`. `source` is
  // this thread's place in the first row.
  template <int rows, bool bounded>
  __device__ __forceinline__ void load(uint32_t shared, typename Config::Element const* source, int64_t stride, int end,
                                       int head_dim) const {
#pragma unroll
    for (int pass = 0; pass < rows / rows_a_pass; ++pass) {
      bool const inside = !bounded || row + pass * rows_a_pass < end;
#pragma unroll
      for (int g = 0; g < groups; ++g) {
        copy_async(shared + offset + pass * rows_a_pass * Tile::row_bytes + g * Tile::group * 16,
                   source + g * Tile::group * 8, inside && (chunk + g * Tile::group) * 8 < head_dim);
      }
      source += rows_a_pass * stride;
    }
  }
};

// The same value, but nothing derived from it is hoisted out of a loop: the kernel is short of registers, and an
// address recomputed in each iteration is cheaper than one spilled to local memory (which both compilers' passes would
// choose).
template <class T>
__device__ __forceinline__ T opaque(T x) {
  if constexpr (sizeof(T) == 8)
    asm volatile("" : "+l"(x));
  else
    asm volatile("" : "+r"(x));
  return x;
}

// blockIdx.x and threadIdx.x, read anew at every call: what is derived from them need not stay in registers over a
// loop.
__device__ __forceinline__ uint32_t block_index() {
  uint32_t index;
  asm volatile("mov.u32 %0, %%ctaid.x;" : "=r"(index));
  return index;
}
__device__ __forceinline__ int thread_index() {
  int index;
  asm volatile("mov.u32 %0, %%tid.x;" : "=r"(index));
  return index;
}

// The rows and operands of one lane. Its warp's first row in the tile of queries is `row`; it reads queries as left
// operand (two matrices down, two to the right), keys as right operand (two to the right, two down) and values as
// transposed right operand (two down, two to the right), at these offsets in their tiles.
template <class Config>
struct Lane {
  int lane, row;

  __device__ explicit Lane(int thread) : lane(thread % 32), row(thread / 32 * 16 * Config::slices) {}
  __device__ uint32_t q() const { return Config::Tile::offset(row + lane % 16, lane / 16); }
  __device__ uint32_t k() const { return Config::Tile::offset(lane % 8 + lane / 16 * 8, lane / 8 % 2); }
  __device__ uint32_t v() const { return Config::Tile::offset(lane % 16, lane / 16); }
  // First row and column of its accumulators.
  __device__ int accumulator_row() const { return row + lane / 4; }
  __device__ int accumulator_column() const { return lane % 4 * 2; }
};

template <class Config>
__global__ void __launch_bounds__(Config::threads)
    forward_kernel(__grid_constant__ ForwardParams const p, __grid_constant__ TileScheduler<false> const scheduler,
                   __grid_constant__ typename Config::Score const score) {
  using Element = typename Config::Element;
  using Tile = typename Config::Tile;
  constexpr int tile_q = Config::tile_q, tile_k = Config::tile_k, head_dim = Config::head_dim;
  constexpr int stages = Config::stages, slices = Config::slices;

  Work work;
  if (!scheduler.work(p, block_index(), work)) return;

  int q_first = work.tile * tile_q;
  int q_rows = min_of(tile_q, work.seqlen_q - q_first);
  auto const mask = Mask::make(work.seqlen_q, work.seqlen_k, p.window_left, p.window_right);
  KeyRange const range = mask.key_range(q_first, q_first + q_rows, tile_k);

  // What only tiles on an edge need waits in shared memory, not in registers.
  __shared__ struct {
    Mask mask;
    int q_first;
  } edge;
  if (threadIdx.x == 0) edge = {mask, q_first};

  // Global memory: where this thread starts to load the next tile of keys and of values.
  TileCopy<Config> const copy(threadIdx.x);
  auto const place = [&](auto const& array, int head, int row) {
    return static_cast<Element const*>(array.data) + work.sequence * array.batch_stride + head * array.head_stride +
           row * array.row_stride;
  };
  int const head_k = work.head / p.group;
  int const last_row = work.k_begin + (range.end - 1) * tile_k + copy.row;
  Element const* keys = place(p.k, head_k, last_row) + copy.chunk * 8;
  Element const* values = place(p.v, head_k, last_row) + copy.chunk * 8;

  // Shared memory: queries, then keys and values of each stage.
  extern __shared__ __align__(128) char shared[];
  uint32_t const shared_q = static_cast<uint32_t>(__cvta_generic_to_shared(shared));
  uint32_t const shared_kv = shared_q + Config::q_bytes;
  int const last_keys = work.seqlen_k - (range.end - 1) * tile_k;
  auto const load_next = [&](Element const*& from, int64_t row_stride, uint32_t to, auto bounded) {
    int64_t const stride = opaque(row_stride);
    TileCopy<Config> const copy(thread_index());
    copy.template load<tile_k, decltype(bounded)::value>(to, from, stride, last_keys, p.head_dim);
    from -= tile_k * stride;
  };
  auto const load_keys = [&](int stage, auto bounded) {
    load_next(keys, p.k.row_stride, shared_kv + 2 * stage * Config::kv_bytes, bounded);
  };
  auto const load_values = [&](int stage, auto bounded) {
    load_next(values, p.v.row_stride, shared_kv + (2 * stage + 1) * Config::kv_bytes, bounded);
  };

  float o[slices][head_dim / 8][4] = {};
  SoftmaxRow state[slices][2];
  uint32_t q[slices][Config::q_in_registers ? head_dim / 16 : 1][4];

  if (range.begin < range.end) {
    // Only the last tile of keys can be ragged, and it is the first to be loaded.
    copy.template load<tile_q, true>(shared_q,
                                     place(p.q, work.head, work.q_begin + q_first + copy.row) + copy.chunk * 8,
                                     p.q.row_stride, q_rows, p.head_dim);
    load_keys(0, std::true_type{});
    if constexpr (stages == 1) copy_commit();
    load_values(0, std::true_type{});
    copy_commit();
  }

#pragma unroll 1
  for (int tile = range.end - 1; tile >= range.begin; --tile) {
    bool const first = tile == range.end - 1, more = tile > range.begin;
    int const stage = stages == 1 ? 0 : (range.end - 1 - tile) & 1;
    uint32_t const shared_k = shared_kv + 2 * stage * Config::kv_bytes;
    Lane<Config> const lane(thread_index());
    uint32_t const from_q = shared_q + lane.q(), from_k = shared_k + lane.k(),
                   from_v = shared_k + Config::kv_bytes + lane.v();

    copy_wait_all();
    __syncthreads();  // the tile's keys are here (two stages: values too), all warps are done with the one before
    if constexpr (stages == 2) {
      if (more) {
        load_keys(stage ^ 1, std::false_type{});
        load_values(stage ^ 1, std::false_type{});
        copy_commit();
      }
    } else if (!first) {
      load_values(0, std::false_type{});
      copy_commit();
    }

    // S = Q Kᵀ
    float s[slices][tile_k / 8][4] = {};
#pragma unroll
    for (int d = 0; d < head_dim / 16; ++d) {
      int const at = Config::q_in_registers ? d : 0;
      if (!Config::q_in_registers || first) {
#pragma unroll
        for (int m = 0; m < slices; ++m) load_matrices(q[m][at], Tile::right(from_q, d) + m * 16 * Tile::row_bytes);
      }
#pragma unroll
      for (int n = 0; n < tile_k / 16; ++n) {
        uint32_t k[4];
        load_matrices(k, Tile::right(from_k, d) + n * 16 * Tile::row_bytes);
#pragma unroll
        for (int m = 0; m < slices; ++m) {
          multiply<Element>(s[m][2 * n], q[m][at], k[0], k[1]);
          multiply<Element>(s[m][2 * n + 1], q[m][at], k[2], k[3]);
        }
      }
    }

    if constexpr (stages == 1) {
      copy_wait_all();
      __syncthreads();  // the tile's values are here, and all warps are done with its keys
      if (more) {
        load_keys(0, std::false_type{});
        copy_commit();
      }
    }

    if constexpr (!Config::Score::plain) {
      score.transform_all([&](auto transform) {
#pragma unroll
        for (int n = 0; n < tile_k / 8; ++n) {
#pragma unroll
          for (int m = 0; m < slices; ++m) {
#pragma unroll
            for (int i = 0; i < 4; ++i) s[m][n][i] = transform(s[m][n][i]);
          }
          __syncwarp();  // keeps the assembler from working on so many scores at once that registers spill
        }
      });
    }

    if (tile < range.full_begin || tile >= range.full_end) {  // a tile that not all queries see whole
#pragma unroll
      for (int m = 0; m < slices; ++m) {
#pragma unroll
        for (int half = 0; half < 2; ++half) {
          int const row = edge.q_first + lane.accumulator_row() + m * 16 + half * 8;
          int const first_key = edge.mask.first_key(row) - tile * tile_k - lane.accumulator_column();
          int const end_key = edge.mask.end_key(row) - tile * tile_k - lane.accumulator_column();
#pragma unroll
          for (int n = 0; n < tile_k / 8; ++n) {
#pragma unroll
            for (int i = 0; i < 2; ++i) {
              if (n * 8 + i < first_key || n * 8 + i >= end_key) s[m][n][2 * half + i] = minus_infinity();
            }
          }
        }
      }
    }

    // The rows' new maxima, and what the sums and outputs so far are to be multiplied by where one rose.
    bool rose = false;
    float ratio[slices][2], offset[slices][2];
#pragma unroll
    for (int m = 0; m < slices; ++m) {
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        float top = s[m][0][2 * half];
#pragma unroll
        for (int n = 0; n < tile_k / 8; ++n) {
          top = fmaxf(top, fmaxf(s[m][n][2 * half], s[m][n][2 * half + 1]));
        }
        ratio[m][half] = state[m][half].raise(fmaxf(state[m][half].max, quad_max(top)), score.factor);
        offset[m][half] = SoftmaxRow::offset(state[m][half].max, score.factor);
        rose |= ratio[m][half] != 1.0f;
      }
    }
    if (__any_sync(0xffffffffu, rose)) {
#pragma unroll
      for (int m = 0; m < slices; ++m) {
#pragma unroll
        for (int n = 0; n < head_dim / 8; ++n) {
#pragma unroll
          for (int i = 0; i < 4; ++i) o[m][n][i] *= ratio[m][i / 2];
        }
      }
    }

    // Weights of 16 keys at a time, and O += P V with them: the next weights are computed while the tensor cores
    // multiply.
#pragma unroll
    for (int n = 0; n < tile_k / 16; ++n) {
      uint32_t weights[slices][4];
#pragma unroll
      for (int m = 0; m < slices; ++m) {
#pragma unroll
        for (int i = 0; i < 8; ++i) {
          float& x = s[m][2 * n + i / 4][i % 4];
          x = exp2_of(x * score.factor - offset[m][i / 2 % 2]);
          state[m][i / 2 % 2].sum += x;
        }
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          weights[m][i] = Precision<Element>::pack(s[m][2 * n + i / 2][i % 2 * 2], s[m][2 * n + i / 2][i % 2 * 2 + 1]);
        }
      }
#pragma unroll
      for (int d = 0; d < head_dim / 16; ++d) {
        uint32_t v[4];
        load_matrices_transposed(v, Tile::right(from_v, d) + n * 16 * Tile::row_bytes);
#pragma unroll
        for (int m = 0; m < slices; ++m) {
          multiply<Element>(o[m][2 * d], weights[m], v[0], v[1]);
          multiply<Element>(o[m][2 * d + 1], weights[m], v[2], v[3]);
        }
      }
    }
  }

  // Divide by the sums. The result goes through shared memory, where each warp only touches rows of its own: the
  // queries' place is free once the warp is past its last product with them.
  scheduler.work(p, block_index(), work);
  q_first = work.tile * tile_q;
  q_rows = min_of(tile_q, work.seqlen_q - q_first);
  Lane<Config> const lane(thread_index());
  __syncwarp();
#pragma unroll
  for (int m = 0; m < slices; ++m) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      SoftmaxRow& row_state = state[m][half];
      row_state.sum = quad_sum(row_state.sum);
      float const inverse = row_state.inverse_sum();
      int const row = lane.accumulator_row() + m * 16 + half * 8;
      if (p.lse != nullptr && lane.accumulator_column() == 0 && row < q_rows) {
        int64_t const line = p.cu_seqlens_q ? int64_t{work.head} : int64_t{work.sequence} * p.heads_q + work.head;
        p.lse[line * p.seqlen_q + work.q_begin + q_first + row] = row_state.lse(score.factor);
      }
#pragma unroll
      for (int n = 0; n < head_dim / 8; ++n) {
        uint32_t const pair = Precision<Element>::pack(o[m][n][2 * half] * inverse, o[m][n][2 * half + 1] * inverse);
        *reinterpret_cast<uint32_t*>(shared + Tile::offset(row, n) + lane.accumulator_column() * 2) = pair;
      }
    }
  }
  __syncwarp();

  Element* const out = const_cast<Element*>(place(p.o, work.head, work.q_begin + q_first));
  constexpr int chunks = head_dim / 8;
#pragma unroll
  for (int i = 0; i < 16 * slices * chunks / 32; ++i) {
    int const row = lane.row + (i * 32 + lane.lane) / chunks, chunk = (i * 32 + lane.lane) % chunks;
    if (row < q_rows && chunk * 8 < p.head_dim) {
      *reinterpret_cast<uint4*>(out + row * p.o.row_stride + chunk * 8) =
          *reinterpret_cast<uint4 const*>(shared + Tile::offset(row, chunk));
    }
  }
}

template <class Config>
void run_forward(ForwardParams const& params, Plan const& plan, cudaStream_t stream) {
  auto const kernel = forward_kernel<Config>;
  static OncePerDevice prepare;
  prepare([&] {
    cuda_check(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, Config::shared_memory),
               "preparing the sm80 kernel");
  });
  TileScheduler<false> const scheduler{Config::tile_q, plan.heads_per_section, params.heads_q};
  // The score is a parameter, made on the host, so that its numbers are operands in constant memory.
  auto const score = Config::Score::make(params.scale, params.softcap);
  kernel<<<static_cast<unsigned>(plan.blocks), Config::threads, Config::shared_memory, stream>>>(params, scheduler,
                                                                                                 score);
  cuda_check(cudaGetLastError(), "launching the sm80 kernel");
}

}  // namespace flashcore::sm80

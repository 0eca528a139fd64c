// SPDX-License-Identifier: Apache-2.0
// The kernel for problems of one to a few tiles of queries a multiprocessor, with head dimensions to 64, plain scores
// and no mask. Two blocks share a multiprocessor, each of two warpgroups of 64 rows of queries, and there is no
// producer: who has done with keys or values asks for the next ones.
#pragma once

#include <cute/arch/copy_sm90_tma.hpp>

#include "core/cuda_check.h"
#include "core/once_per_device.h"
#include "flashcore/plan.h"
#include "sm90/dependent_launch.h"
#include "sm90/forward_output.cuh"
#include "sm90/output_row.cuh"
#include "sm90/references.cuh"
#include "sm90/stream_tile.h"

namespace flashcore::sm90 {

template <class Element_>
struct StreamConfig {
  using Element = Element_;
  using Score = PlainScore;
  using Tile = StreamTile;
  static constexpr int head_dim = Tile::head_dim, tile_q = Tile::tile_q, tile_k = Tile::tile_k;
  static constexpr int threads = Tile::threads, warps = threads / 32, buffers = Tile::buffers;
  static constexpr int bytes = tile_k * row_bytes;  // of a tile of queries, a chunk's keys, its values
  static constexpr bool steady = false;             // weights are relative to references: see Steady
  static constexpr int columns = head_dim;          // of the second product
  static_assert(head_dim == panel_columns && tile_q == tile_k && buffers == 2 && Tile::warpgroups == 2);
};

// The same without maxima (references.cuh), where there are many rows, nobody asks for their log-sum-exp and TMA takes
// the output.
template <class Config>
struct SteadyStream : Config {
  static constexpr bool steady = true;
  static constexpr int columns = Config::head_dim + 8;
};

struct StreamArguments : Arguments<PlainScore> {
  CUtensorMap o;       // boxes of a warp's 16 rows
  bool stores_by_tma;  // or lane by lane, where TMA does not take the strides
  int head_tiles;      // tiles of queries of a head
  int chunks;          // of a tile's keys
  uint32_t zero;       // 0, which the compiler does not know
};

// A tile of queries.
struct StreamJob {
  JobPlace place;
  int head_k;
};

template <class Config>
struct StreamMemory {
  alignas(1024) char q[Config::buffers][Config::bytes];
  alignas(1024) char k[Config::buffers][Config::bytes];
  alignas(1024) char v[Config::buffers][Config::bytes];
  alignas(16) char ones[ones_bytes];
  Barrier q_full[Config::buffers], k_full[Config::buffers], v_full[Config::buffers];
  Barrier q_empty[Config::buffers], k_empty[Config::buffers], v_empty[Config::buffers];
  float factor;   // of the score
  int job_count;  // of the block
  StreamJob jobs[StreamTile::most_jobs];
};

// The block's jobs: tiles blockIdx.x, blockIdx.x + blocks, ... The tiles of a head follow each other.
__device__ __forceinline__ int stream_jobs(StreamArguments const& a) {
  return ceil_div(static_cast<int>(a.tiles - blockIdx.x), static_cast<int>(gridDim.x));
}
__device__ __forceinline__ StreamJob stream_job(StreamArguments const& a, int round) {
  int const number = static_cast<int>(round * gridDim.x + blockIdx.x);
  int const line = number / a.head_tiles, first = (number - line * a.head_tiles) * StreamTile::tile_q;
  int const sequence = line / a.p.heads_q, head = line - sequence * a.p.heads_q;
  return {{sequence, head, first, min_of(StreamTile::tile_q, a.p.seqlen_q - first)}, head / a.p.group};
}

// Whether a block has its multiprocessor for itself, or shares it with the next call's.
__device__ __forceinline__ bool alone() { return gridDim.x <= StreamTile::units; }

// Until the kernel before has ended: asks for the lines of the first job to be brought into the L2 cache. Blocks that
// work on the tiles of one head share its keys and values. Only a multiprocessor's first block does so: the other's
// data would come with its, and late.
template <class Config>
__device__ __forceinline__ void prefetch(StreamArguments const& a) {
  using Element = typename Config::Element;
  if (blockIdx.x >= StreamTile::units) return;
  StreamJob const job = stream_job(a, 0);
  int const thread = threadIdx.x;
  if (thread < job.place.queries) {
    prefetch_row<Element, 1>(a.p.q, job.place.sequence, job.place.head, job.place.first + thread);
  }
  auto const lines = [&](auto const& rows) {
#pragma unroll 1
    for (int row = job.place.first / Config::tile_q + thread * a.head_tiles; row < a.p.seqlen_k;
         row += Config::threads * a.head_tiles) {
      prefetch_row<Element, 1>(rows, job.place.sequence, job.head_k, row);
    }
  };
  lines(a.p.k);
  // Two blocks with a tile each: values would come between the other one's keys.
  if (alone() || a.tiles > gridDim.x) lines(a.p.v);
}

template <class Config>
__global__ void __launch_bounds__(Config::threads, StreamTile::blocks_a_unit)
    stream_kernel(__grid_constant__ StreamArguments const a) {
  using Element = typename Config::Element;
  constexpr int head_dim = Config::head_dim, tile_k = Config::tile_k;
  extern __shared__ __align__(1024) char memory[];
  auto& shared = *reinterpret_cast<StreamMemory<Config>*>(memory);
  // Read anew where it is needed: it does not stay in a register during the loop.
  auto const job_count = [&] {
    int count;
    asm volatile("ld.shared.u32 %0, [%1];" : "=r"(count) : "r"(cute::cast_smem_ptr_to_uint(&shared.job_count)));
    return count;
  };
  // Everything up to wait_for_prerequisites() may run while the kernel before still works: it reads and writes no
  // array.
  if (threadIdx.x == 64) {
#pragma unroll
    for (int i = 0; i < Config::buffers; ++i) {
      for (Barrier* full : {&shared.q_full[i], &shared.k_full[i], &shared.v_full[i]}) full->init(1);
      for (Barrier* empty : {&shared.q_empty[i], &shared.k_empty[i], &shared.v_empty[i]}) empty->init(Config::warps);
    }
    cutlass::arch::fence_barrier_init();
  }
  if (threadIdx.x == 96) {
    cute::prefetch_tma_descriptor(reinterpret_cast<cute::TmaDescriptor const*>(&a.q));
    cute::prefetch_tma_descriptor(reinterpret_cast<cute::TmaDescriptor const*>(&a.k));
    cute::prefetch_tma_descriptor(reinterpret_cast<cute::TmaDescriptor const*>(&a.v));
  }
  if (int const jobs = stream_jobs(a); threadIdx.x < jobs) {
    shared.jobs[threadIdx.x] = stream_job(a, threadIdx.x);
    shared.job_count = jobs;
  }
  if (threadIdx.x == 128) shared.factor = a.score.factor;
  if constexpr (Config::steady) fill_ones<Element>(shared.ones);
  prefetch<Config>(a);
  __syncthreads();
  wait_for_prerequisites();

  // The chunk is number `i` of job `job`, and `buffer` its place. Not all chunks that are asked for exist.
  auto const load = [](CUtensorMap const& map, char* to, Barrier& full, int row, int head, int sequence) {
    constexpr auto hint = static_cast<uint64_t>(cute::TMA::CacheHintSm90::EVICT_NORMAL);
    full.arrive_and_expect_tx(Config::bytes);
    cute::SM90_TMA_LOAD_5D::copy(&map, reinterpret_cast<uint64_t*>(&full), hint, to, 0, 0, row, head, sequence);
  };
  auto const load_queries = [&](int job) {
    if (job >= job_count()) return;
    JobPlace const& place = shared.jobs[job].place;
    load(a.q, shared.q[job % 2], shared.q_full[job % 2], place.first, place.head, place.sequence);
  };
  auto const load_chunk = [&](CUtensorMap const& map, char* to, Barrier& full, int job, int i) {
    for (; i >= a.chunks; i -= a.chunks) ++job;
    if (job >= job_count()) return;
    StreamJob const& from = shared.jobs[job];
    load(map, to, full, i * tile_k, from.head_k, from.place.sequence);
  };
  auto const load_keys = [&](int buffer, int job, int i) {
    load_chunk(a.k, shared.k[buffer], shared.k_full[buffer], job, i);
  };
  auto const load_values = [&](int buffer, int job, int i) {
    load_chunk(a.v, shared.v[buffer], shared.v_full[buffer], job, i);
  };
  // What all blocks ask for first is to come first: the rest when the first keys are there.
  if (threadIdx.x == 0) load_queries(0);
  if (threadIdx.x == 128) load_keys(0, 0, 0);
  if (threadIdx.x == 32) load_values(0, 0, 0);
  __syncwarp();

  int const warpgroup = __shfl_sync(0xffffffffu, static_cast<int>(threadIdx.x) / 128, 0);
  // This lane's first row in the tile; read anew where it is needed: it does not stay in a register during the loop.
  auto const row_of_lane = [] {
    int thread;
    asm volatile("mov.u32 %0, %%tid.x;" : "=r"(thread));
    return thread / 32 * 16 + thread % 32 / 4;
  };
  auto const release = [](Barrier& empty) {
    if (threadIdx.x % 32 == 0) empty.arrive();
  };

  constexpr int columns = Config::columns;
  float o[columns / 2], s[tile_k / 2];
  uint32_t weights[tile_k / 4];
  SoftmaxRow state[2];
  float offset[2];
#pragma unroll
  for (int i = 0; i < columns / 2; ++i) o[i] = 0.0f;
  // One warpgroup's exponentials meet the other's products: they take turns, the first one first.
  auto const take_turn = [&] { cutlass::arch::NamedBarrier::sync(Config::threads, 1 + warpgroup); };
  auto const pass_turn = [&](uint32_t none) {
    cutlass::arch::NamedBarrier::arrive(Config::threads, 2 - warpgroup + none);
  };
  if (warpgroup == 1) pass_turn(0);

  // S = Q Kᵀ, asynchronous.
  auto const issue_scores = [&](int job, int buffer) {
    uint64_t const queries = operand(cute::cast_smem_ptr_to_uint(shared.q[job % 2]) + warpgroup * 64 * row_bytes, 0);
    uint64_t const keys = operand(cute::cast_smem_ptr_to_uint(shared.k[buffer]), 0);
    hold(s);
    cute::warpgroup_arrive();
#pragma unroll
    for (int d = 0; d < head_dim / 16; ++d) multiply_keys<Element, tile_k>(s, queries + 2 * d, keys + 2 * d, d > 0);
    cute::warpgroup_commit_batch();
  };

  // Chunk i of a job's keys, the block's `chunk`-th of all.
  int job = 0, i = 0, chunk = 0;
#pragma unroll 1
  while (true) {
    int const buffer = chunk & 1;
    uint32_t const phase = chunk >> 1 & 1;
    bool const last = i == a.chunks - 1, ends = last && job == job_count() - 1;
    if (i == 0) shared.q_full[job % 2].wait(job / 2 & 1);
    if (chunk == 0) launch_dependents();
    shared.k_full[buffer].wait(phase);
    issue_scores(job, buffer);
    if (chunk == 0) {
      if (threadIdx.x == 128) load_keys(1, 0, 1);
      if (threadIdx.x == 160) load_values(1, 0, 1);
      if (threadIdx.x == 192) load_queries(1);
    }
    // While products run, places are filled again: of keys, which both warpgroups have read when the second one does
    // its exponentials, by the first one's warps, and of values, whose last reader is the second one, by its.
    if (threadIdx.x == 96 && chunk > 0) {
      shared.k_empty[buffer ^ 1].wait((chunk - 1) >> 1 & 1);
      load_keys(buffer ^ 1, job, i + 1);
    }
    if (threadIdx.x == 160 && chunk > 0) {
      shared.v_empty[buffer ^ 1].wait((chunk - 1) >> 1 & 1);
      load_values(buffer ^ 1, job, i + 1);
    }
    if (i == 0 && job > 0) {
      // The rows of the job before lay in the place of its queries, and have been read from there by now.
      if (threadIdx.x % 32 == 0) {
        asm volatile("cp.async.bulk.wait_group.read 0;" ::: "memory");
        shared.q_empty[job % 2 ^ 1].arrive();
      }
      if (threadIdx.x == 192 && job + 1 < job_count()) {
        shared.q_empty[job % 2 ^ 1].wait((job - 1) / 2 & 1);
        load_queries(job + 1);
      }
    }
    __syncwarp();
    cute::warpgroup_wait<0>();
    hold(s);
    release(shared.k_empty[buffer]);
    if (last && a.p.seqlen_k % tile_k != 0) {
      int const end = a.p.seqlen_k % tile_k - Lane::column();
      hide(s, Visible{{0, 0}, {end, end}});
    }
    using Reference = Reference<Element>;
    if constexpr (!Config::steady) {
      float ratio[2];
      raise_maxima(s, state, ratio, offset, a.score);
      if (i > 0) {
#pragma unroll
        for (int j = 0; j < head_dim / 2; ++j) o[j] *= ratio[j / 2 % 2];
      }
    } else if (i == 0) {
      Reference::template find<Reference::seen>(s, state);
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        offset[half] = SoftmaxRow::offset(state[half].max, a.score.factor) + Reference::slack;
      }
    }
    // What the exponentials need is read behind the barrier, or `ptxas` would begin them before it.
    take_turn();
    float factor;
    asm volatile("ld.shared.f32 %0, [%1];"
                 : "=f"(factor)
                 : "r"(cute::cast_smem_ptr_to_uint(&shared.factor))
                 : "memory");
    if constexpr (!Config::steady) {
#pragma unroll
      for (int half = 0; half < 2; ++half) offset[half] = SoftmaxRow::offset(state[half].max, factor);
    }
    // O += P V, the first half of the keys while the other half's exponentials run.
    uint32_t const values_at = cute::cast_smem_ptr_to_uint(shared.v[buffer]);
    uint64_t const values = operand(values_at, cute::cast_smem_ptr_to_uint(shared.ones) - values_at);
    constexpr uint64_t next = Config::steady ? next_16_values : 16 * row_bytes / 16;
#pragma unroll
    for (int j = 0; j < 2; ++j) {
      auto& part = reinterpret_cast<float (&)[tile_k / 4]>(s[j * tile_k / 4]);
      uint32_t* const w = weights + j * tile_k / 8;
      // Eight at a time: added up one by one they would wait for their sums in registers.
#pragma unroll
      for (int m = 0; m < tile_k / 4; m += 8) {
        float x[8];
#pragma unroll
        for (int k = 0; k < 8; ++k) x[k] = exp2_of(part[m + k] * factor - offset[k / 2 % 2]);
#pragma unroll
        for (int k = 0; k < 4; ++k) w[m / 2 + k] = Precision<Element>::pack(x[2 * k], x[2 * k + 1]);
        if constexpr (Config::steady) continue;
        state[0].sum += (x[0] + x[1]) + (x[4] + x[5]);
        state[1].sum += (x[2] + x[3]) + (x[6] + x[7]);
      }
      // Not before the last ones are done, which the barrier's number is made to depend on.
      if (j == 1) pass_turn((w[tile_k / 8 - 1] ^ w[tile_k / 8 - 4]) & a.zero);
      if (j == 0) {
        shared.v_full[buffer].wait(phase);
        hold(o);
      }
      cute::warpgroup_arrive();
#pragma unroll
      for (int m = 0; m < tile_k / 32; ++m) {
        multiply_values<Element, columns>(o, w + 4 * m, values + (j * tile_k / 32 + m) * next);
      }
      cute::warpgroup_commit_batch();
    }
    cute::warpgroup_wait<0>();
    hold(o);
    release(shared.v_empty[buffer]);
    ++chunk;
    if (!last) {
      ++i;
      continue;
    }
    // The rows leave through the place of the job's queries, which all warps of the warpgroup have read: their scores
    // were there before its turn.
    JobPlace const& place = shared.jobs[job].place;
    int const row = row_of_lane(), warp_row = row / 16 * 16, lane = threadIdx.x % 32;
    float inverse[2];
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      state[half].sum = Config::steady ? o[head_dim / 2 + 2 * half] : quad_sum(state[half].sum);
    }
    if constexpr (Config::steady) {
      bool const lost[2] = {!Reference::holds(state[0].sum), !Reference::holds(state[1].sum)};
      if (__any_sync(0xffffffffu, lost[0] || lost[1])) {  // these rows alone: another's bits must not depend on them
        Mask const all = Mask::make(a.p.seqlen_q, a.p.seqlen_k, unlimited, unlimited);
        float exact[head_dim / 2];
        SoftmaxRow exact_state[2];
        attend_exactly<Element>(a, place.sequence, shared.jobs[job].head_k, all, {0, 0}, 0, a.p.seqlen_k,
                                cute::cast_smem_ptr_to_uint(shared.q[job % 2]), warp_row, exact, exact_state);
#pragma unroll
        for (int i = 0; i < head_dim / 2; ++i) {
          if (lost[i / 2 % 2]) o[i] = exact[i];
        }
#pragma unroll
        for (int half = 0; half < 2; ++half) {
          if (lost[half]) state[half] = exact_state[half];
        }
      }
    }
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      inverse[half] = state[half].sum == 0.0f ? 0.0f : reciprocal(state[half].sum);  // 0: all scores are -inf
    }
    if (!Config::steady && a.p.lse != nullptr && lane % 4 == 0) {
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        PlacedRow<Config> const out(a, place, row + half * 8);
        if (out.present) *out.lse = state[half].lse(a.score.factor);
      }
    }
    if (Config::steady || a.stores_by_tma) {
      char* const rows = shared.q[job % 2] + warp_row * row_bytes;
      uint32_t const to = cute::cast_smem_ptr_to_uint(rows) + lane % 16 * row_bytes;
#pragma unroll
      for (int g = 0; g < head_dim / 16; ++g) {
        uint32_t x[4];
#pragma unroll
        for (int k = 0; k < 4; ++k) {
          float const* const pair = &o[8 * g + 2 * k];
          x[k] = Precision<Element>::pack(pair[0] * inverse[k % 2], pair[1] * inverse[k % 2]);
        }
        asm volatile("stmatrix.sync.aligned.m8n8.x4.shared.b16 [%0], {%1, %2, %3, %4};" ::"r"(
                         to + ((2 * g + lane / 16) ^ lane % 8) * 16),
                     "r"(x[0]), "r"(x[1]), "r"(x[2]), "r"(x[3])
                     : "memory");
      }
      cutlass::arch::fence_view_async_shared();
      __syncwarp();
      if (lane == 0 && warp_row < place.queries) {
        cute::SM90_TMA_STORE_5D::copy(&a.o, rows, 0, 0, place.first + warp_row, place.head, place.sequence);
        asm volatile("cp.async.bulk.commit_group;" ::: "memory");
      }
      __syncwarp();
    } else {
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        write_row<Config>(PlacedRow<Config>(a, place, row + half * 8), half, a.p.head_dim, o, inverse[half]);
      }
    }
    if (ends) break;
    state[0] = {}, state[1] = {};
#pragma unroll
    for (int j = 0; j < columns / 2; ++j) o[j] = 0.0f;
    i = 0;
    ++job;
  }
  asm volatile("cp.async.bulk.wait_group.read 0;" ::: "memory");
}

template <class Config>
void launch_stream(StreamArguments const& arguments, int64_t blocks, cudaStream_t stream) {
  auto const kernel = stream_kernel<Config>;
  static_assert(sizeof(StreamMemory<Config>) <= StreamTile::shared_memory);
  static_assert(StreamTile::blocks_a_unit * (StreamTile::shared_memory + 1024) <= 228 * 1024);
  static OncePerDevice prepare;
  prepare([&] {
    char const* const preparing = "preparing the stream sm90 kernel";
    cuda_check(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, StreamTile::shared_memory),
               preparing);
    cuda_check(
        cudaFuncSetAttribute(kernel, cudaFuncAttributePreferredSharedMemoryCarveout, cudaSharedmemCarveoutMaxShared),
        preparing);
  });
  launch_dependent(kernel,
                   {dim3(static_cast<unsigned>(blocks)), Config::threads, StreamTile::shared_memory, 1, /*early=*/true},
                   stream, arguments, "launching the stream sm90 kernel");
}

template <class Config>
void run_stream(ForwardParams const& p, Plan const& plan, bool stores_by_tma, cudaStream_t stream) {
  constexpr DType dtype = std::is_same_v<typename Config::Element, __half> ? float16 : bfloat16;
  auto const map = [&](auto const& rows, int seqlen, int heads, int box) {
    return tensor_map({rows.data,
                       dtype,
                       p.head_dim,
                       {1, seqlen, heads, p.batch},
                       {0, rows.row_stride, rows.head_stride, rows.batch_stride},
                       {1, box}});
  };
  StreamArguments const arguments{{map(p.q, p.seqlen_q, p.heads_q, Config::tile_q),
                                   map(p.k, p.seqlen_k, p.heads_k, Config::tile_k),
                                   map(p.v, p.seqlen_k, p.heads_k, Config::tile_k),
                                   p,
                                   {Config::tile_q, 1, p.heads_q, 0},
                                   static_cast<uint32_t>(plan.tiles),
                                   /*pack=*/1,
                                   /*per_row=*/1 << 16,
                                   Config::bytes,
                                   /*steady=*/false,
                                   PlainScore::make(p.scale, p.softcap)},
                                  stores_by_tma ? map(p.o, p.seqlen_q, p.heads_q, 16) : CUtensorMap{},
                                  stores_by_tma,
                                  ceil_div(p.seqlen_q, Config::tile_q),
                                  ceil_div(p.seqlen_k, Config::tile_k),
                                  0};
  bool const many = int64_t{p.batch} * p.heads_q * p.seqlen_q >= few_rows;
  if (many && p.lse == nullptr && stores_by_tma && p.head_dim == Config::head_dim) {
    launch_stream<SteadyStream<Config>>(arguments, plan.blocks, stream);
  } else {
    launch_stream<Config>(arguments, plan.blocks, stream);
  }
}

}  // namespace flashcore::sm90

// SPDX-License-Identifier: Apache-2.0
// The kernel for problems of one to a few tiles of queries a multiprocessor, with head dimensions to 64 and plain
// scores. Two blocks share a multiprocessor, each of two warpgroups of 64 rows of queries, and there is no producer:
// who has done with keys or values asks for the next ones. What a block will do is written down before the kernel
// before has ended.
#pragma once

#include <cute/arch/copy_sm90_tma.hpp>

#include "attention/mask.h"
#include "core/cuda_check.h"
#include "core/once_per_device.h"
#include "flashcore/plan.h"
#include "sm90/dependent_launch.h"
#include "sm90/forward_output.cuh"
#include "sm90/output_row.cuh"
#include "sm90/stream_tile.h"

namespace flashcore::sm90 {

template <class Element_, int warpgroups_>
struct StreamConfig {
  using Element = Element_;
  using Score = PlainScore;
  static constexpr StreamTile tile{warpgroups_};
  static constexpr int head_dim = StreamTile::head_dim, tile_q = tile.tile_q(), tile_k = StreamTile::tile_k;
  static constexpr int warpgroups = warpgroups_, threads = tile.threads(), warps = threads / 32;
  static constexpr int q_buffers = StreamTile::q_buffers, buffers = tile.buffers();
  static constexpr int q_bytes = tile_q * row_bytes, kv_bytes = tile_k * row_bytes;
  static_assert(head_dim == panel_columns && q_buffers == 2);
  // How many chunks behind the places of keys, and of values, are filled again.
  static constexpr int keys_lag = buffers > 2 ? 1 : 0, values_lag = buffers > 2 ? 2 : 1;
};

struct StreamArguments : Arguments<PlainScore> {
  CUtensorMap o;       // boxes of a warp's 16 rows
  bool stores_by_tma;  // or lane by lane, where TMA does not take the strides
  int head_tiles;      // tiles of queries of a head
  uint32_t zero;       // 0, which the compiler does not know
};

// A tile of queries, and the chunks of keys that it sees; −1 chunks: there is no such job.
struct StreamJob {
  JobPlace place;
  int head_k, begin, count;
};

// A chunk of a job's keys.
struct StreamChunk {
  static constexpr int first = 16, last = 32;  // of its job
  int what;  // job << 18 | chunk << 6 | these, and a bit for each warpgroup that has to mask it
  int head_k, sequence;

  __device__ __forceinline__ static int job(int what) { return what >> 18; }
  __device__ __forceinline__ static int first_key(int what) { return (what >> 6 & 0xfff) * StreamTile::tile_k; }
};

template <class Config>
struct StreamMemory {
  alignas(1024) char q[Config::q_buffers][Config::q_bytes];
  alignas(1024) char k[Config::buffers][Config::kv_bytes];
  alignas(1024) char v[Config::buffers][Config::kv_bytes];
  Barrier q_full[Config::q_buffers], q_empty[Config::q_buffers];
  Barrier k_full[Config::buffers], v_full[Config::buffers];
  Barrier k_empty[Config::buffers], v_empty[Config::buffers];
  // What the block does: jobs with keys, then those without; chunks of all.
  int full_jobs, all_jobs, chunks;
  Mask mask;
  float factor;  // of the score
  StreamJob jobs[StreamTile::most_jobs];
  StreamChunk table[StreamTile::most_chunks];
};

// The block's job of a round. The tiles of a head follow each other.
template <class Config>
__device__ __forceinline__ StreamJob stream_job(StreamArguments const& a, Mask const& mask, int round) {
  int const number = static_cast<int>(round * gridDim.x + blockIdx.x);
  StreamJob job{};
  if (number >= static_cast<int>(a.tiles)) {
    job.count = -1;
    return job;
  }
  int const line = number / a.head_tiles, tile = number - line * a.head_tiles;
  int const sequence = line / a.p.heads_q, head = line - sequence * a.p.heads_q, first = tile * Config::tile_q;
  job.place = {sequence, head, first, min_of(Config::tile_q, a.p.seqlen_q - first)};
  job.head_k = head / a.p.group;
  KeyRange const range = mask.key_range(first, first + job.place.queries, Config::tile_k);
  job.begin = range.begin;
  job.count = range.count();
  return job;
}

// The first warp writes down the block's jobs, and their chunks in the order in which they are multiplied.
template <class Config>
__device__ __forceinline__ void write_down(StreamArguments const& a, StreamMemory<Config>& shared, Mask const& mask) {
  constexpr uint32_t all_lanes = 0xffffffff;
  int const lane = threadIdx.x;
  StreamJob job{};
  job.count = -1;
  if (lane < StreamTile::most_jobs) job = stream_job<Config>(a, mask, lane);
  uint32_t const full = __ballot_sync(all_lanes, job.count > 0), empty = __ballot_sync(all_lanes, job.count == 0);
  uint32_t const before = (1u << lane) - 1;
  int const at = job.count > 0 ? __popc(full & before) : __popc(full) + __popc(empty & before);
  if (job.count >= 0) shared.jobs[at] = job;
  int chunks = max_of(job.count, 0);
#pragma unroll
  for (int step = 1; step < 32; step *= 2) {
    int const other = __shfl_up_sync(all_lanes, chunks, step);
    if (lane >= step) chunks += other;
  }
#pragma unroll 1
  for (int i = 0; i < job.count; ++i) {
    int const key = (job.begin + i) * Config::tile_k;
    int flags = (i == 0 ? StreamChunk::first : 0) | (i == job.count - 1 ? StreamChunk::last : 0);
#pragma unroll
    for (int warpgroup = 0; warpgroup < Config::warpgroups; ++warpgroup) {
      int const query = job.place.first + warpgroup * 64;
      if (key < mask.first_key(query + 63) || key + Config::tile_k > mask.end_key(query)) flags |= 1 << warpgroup;
    }
    shared.table[chunks - job.count + i] = {at << 18 | (job.begin + i) << 6 | flags, job.head_k, job.place.sequence};
  }
  if (lane == 31) {
    shared.full_jobs = __popc(full);
    shared.all_jobs = __popc(full) + __popc(empty);
    shared.chunks = chunks;
    shared.mask = mask;
    shared.factor = a.score.factor;
  }
}

// Whether a block has its multiprocessor for itself, or shares it with the next call's.
__device__ __forceinline__ bool alone() { return gridDim.x <= StreamTile::units; }

// Until the kernel before has ended: asks for the lines of the first job to be brought into the L2 cache. Blocks that
// work on the tiles of one head share its keys and values. Only a multiprocessor's first block does so: the other's
// data would come with its, and late.
template <class Config>
__device__ __forceinline__ void prefetch(StreamArguments const& a, StreamMemory<Config> const& shared,
                                         Mask const& mask) {
  using Element = typename Config::Element;
  if (shared.full_jobs == 0 || blockIdx.x >= StreamTile::units) return;
  StreamJob const& job = shared.jobs[0];
  int const thread = threadIdx.x;
  if (thread < job.place.queries) {
    prefetch_row<Element, 1>(a.p.q, job.place.sequence, job.place.head, job.place.first + thread);
  }
  int const begin = mask.first_key(0) + job.place.first / Config::tile_q, end = mask.end_key(a.p.seqlen_q - 1);
  auto const lines = [&](auto const& rows) {
#pragma unroll 1
    for (int row = begin + thread * a.head_tiles; row < end; row += Config::threads * a.head_tiles) {
      prefetch_row<Element, 1>(rows, job.place.sequence, job.head_k, row);
    }
  };
  lines(a.p.k);
  // Two blocks with a tile each: values would come between the other one's keys.
  if (alone() || a.tiles > gridDim.x) lines(a.p.v);
}

template <class Config>
__global__ void __launch_bounds__(Config::threads, Config::tile.blocks_a_unit())
    stream_kernel(__grid_constant__ StreamArguments const a) {
  using Element = typename Config::Element;
  constexpr int head_dim = Config::head_dim, tile_k = Config::tile_k;
  extern __shared__ __align__(1024) char memory[];
  auto& shared = *reinterpret_cast<StreamMemory<Config>*>(memory);
  // Everything up to wait_for_prerequisites() may run while the kernel before still works: it reads and writes no
  // array.
  {
    if (threadIdx.x == 64) {
#pragma unroll
      for (int i = 0; i < Config::buffers; ++i) {
        for (Barrier* full : {&shared.k_full[i], &shared.v_full[i]}) full->init(1);
        for (Barrier* empty : {&shared.k_empty[i], &shared.v_empty[i]}) empty->init(Config::warps);
      }
#pragma unroll
      for (int i = 0; i < 2; ++i) shared.q_full[i].init(1), shared.q_empty[i].init(Config::warps);
      cutlass::arch::fence_barrier_init();
    }
    if (threadIdx.x == 96) {
      cute::prefetch_tma_descriptor(reinterpret_cast<cute::TmaDescriptor const*>(&a.q));
      cute::prefetch_tma_descriptor(reinterpret_cast<cute::TmaDescriptor const*>(&a.k));
      cute::prefetch_tma_descriptor(reinterpret_cast<cute::TmaDescriptor const*>(&a.v));
    }
    Mask const mask = Mask::make(a.p.seqlen_q, a.p.seqlen_k, a.p.window_left, a.p.window_right);
    if (threadIdx.x < 32) write_down<Config>(a, shared, mask);
    __syncthreads();
    prefetch<Config>(a, shared, mask);
  }
  wait_for_prerequisites();

  auto const load = [](CUtensorMap const& map, char* to, Barrier& full, int bytes, int row, int head, int sequence) {
    constexpr auto hint = static_cast<uint64_t>(cute::TMA::CacheHintSm90::EVICT_NORMAL);
    full.arrive_and_expect_tx(bytes);
    cute::SM90_TMA_LOAD_5D::copy(&map, reinterpret_cast<uint64_t*>(&full), hint, to, 0, 0, row, head, sequence);
  };
  auto const load_queries = [&](int job) {
    if (job >= shared.full_jobs) return;
    JobPlace const& place = shared.jobs[job].place;
    load(a.q, shared.q[job % 2], shared.q_full[job % 2], Config::q_bytes, place.first, place.head, place.sequence);
  };
  auto const load_keys = [&](int chunk) {
    if (chunk >= shared.chunks) return;
    int const buffer = chunk % Config::buffers;
    StreamChunk const x = shared.table[chunk];
    load(a.k, shared.k[buffer], shared.k_full[buffer], Config::kv_bytes, StreamChunk::first_key(x.what), x.head_k,
         x.sequence);
  };
  auto const load_values = [&](int chunk) {
    if (chunk >= shared.chunks) return;
    int const buffer = chunk % Config::buffers;
    StreamChunk const x = shared.table[chunk];
    load(a.v, shared.v[buffer], shared.v_full[buffer], Config::kv_bytes, StreamChunk::first_key(x.what), x.head_k,
         x.sequence);
  };
  // Two threads, in the order in which the products come: what all blocks ask for first is to come first. A block alone
  // asks for the rest when its first keys are there.
  if (threadIdx.x == 0) {
    load_queries(0);
    load_values(0);
    if (!alone()) {
#pragma unroll 1
      for (int i = 1; i < Config::buffers; ++i) load_values(i);
    }
  }
  if (threadIdx.x == 128) {
    load_keys(0);
    if (!alone()) {
#pragma unroll 1
      for (int i = 1; i < Config::buffers; ++i) load_keys(i);
      load_queries(1);
    }
  }
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
#pragma unroll 1
  for (int job = shared.full_jobs; job < shared.all_jobs; ++job) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      PlacedRow<Config> const row(a, shared.jobs[job].place, row_of_lane() + half * 8);
      if (!row.present) continue;
      if (row.lse != nullptr && threadIdx.x % 4 == 0) *row.lse = minus_infinity();
      write_zeros(row, a.p.head_dim);
    }
  }

  constexpr int loader = (Config::warpgroups - 1) * 128;
  float o[head_dim / 2], s[tile_k / 2];
  uint32_t weights[tile_k / 4];
  SoftmaxRow state[2];
#pragma unroll
  for (int i = 0; i < head_dim / 2; ++i) o[i] = 0.0f;
  // One warpgroup's exponentials meet the other's products: they take turns, the first one first.
  auto const take_turn = [&] { cutlass::arch::NamedBarrier::sync(256, 1 + warpgroup); };
  auto const pass_turn = [&](uint32_t none) {
    cutlass::arch::NamedBarrier::arrive(256, 1 + (warpgroup + 1) % Config::warpgroups + none);
  };
  if (warpgroup == Config::warpgroups - 1) pass_turn(0);

#pragma unroll 1
  for (int chunk = 0; chunk < shared.chunks; ++chunk) {
    int what = shared.table[chunk].what;
    int const buffer = chunk % Config::buffers;
    uint32_t const phase = chunk / Config::buffers & 1;
    {
      // S = Q Kᵀ
      int const job = StreamChunk::job(what), other = job % 2 ^ 1;
      bool const after_job = what & StreamChunk::first && job > 0;
      if (what & StreamChunk::first) shared.q_full[job % 2].wait(job / 2 & 1);
      if (chunk == 0) launch_dependents();
      shared.k_full[buffer].wait(phase);
      if (chunk == 0 && alone()) {
        if (threadIdx.x == loader) {
#pragma unroll 1
          for (int i = 1; i < Config::buffers; ++i) load_keys(i);
        }
        if (threadIdx.x == loader + 32) {
#pragma unroll 1
          for (int i = 1; i < Config::buffers; ++i) load_values(i);
        }
        if (threadIdx.x == loader + 64) load_queries(1);
        __syncwarp();
      }
      uint64_t const queries = operand(cute::cast_smem_ptr_to_uint(shared.q[job % 2]) + warpgroup * 64 * row_bytes, 0);
      uint64_t const keys = operand(cute::cast_smem_ptr_to_uint(shared.k[buffer]), 0);
      hold(s);
      cute::warpgroup_arrive();
#pragma unroll
      for (int d = 0; d < head_dim / 16; ++d) multiply_keys<Element, tile_k>(s, queries + 2 * d, keys + 2 * d, d > 0);
      cute::warpgroup_commit_batch();
      cute::warpgroup_wait<0>();
      hold(s);
      release(shared.k_empty[buffer]);
      // The rows of the job before lay in the place of its queries, and have been read from there by now.
      if (after_job && threadIdx.x % 32 == 0) {
        asm volatile("cp.async.bulk.wait_group.read 0;" ::: "memory");
        shared.q_empty[other].arrive();
      }
      // The second warpgroup is the later one: its warps have the places filled again.
      if (threadIdx.x == loader && chunk >= Config::keys_lag) {
        int const done = chunk - Config::keys_lag;
        if (done + Config::buffers < shared.chunks) {
          shared.k_empty[done % Config::buffers].wait(done / Config::buffers & 1);
          load_keys(done + Config::buffers);
        }
      }
      if (threadIdx.x == loader + 32 && chunk >= Config::values_lag) {
        int const done = chunk - Config::values_lag;
        if (done + Config::buffers < shared.chunks) {
          shared.v_empty[done % Config::buffers].wait(done / Config::buffers & 1);
          load_values(done + Config::buffers);
        }
      }
      if (threadIdx.x == loader + 64 && after_job && job + 1 < shared.full_jobs) {
        shared.q_empty[other].wait((job - 1) / 2 & 1);
        load_queries(job + 1);
      }
      __syncwarp();
    }
    if (what >> warpgroup & 1) {
      int const query = shared.jobs[StreamChunk::job(what)].place.first + row_of_lane();
      hide(s, visible(shared.mask, {query, query + 8}, StreamChunk::first_key(what)));
    }
    float ratio[2], offset[2];
    raise_maxima(s, state, ratio, offset, a.score);
    if (!(what & StreamChunk::first)) {
#pragma unroll
      for (int i = 0; i < head_dim / 2; ++i) o[i] *= ratio[i / 2 % 2];
    }
    // What the exponentials need is read behind the barrier, or `ptxas` would begin them before it.
    take_turn();
    {
      float factor;
      asm volatile("ld.shared.f32 %0, [%1];"
                   : "=f"(factor)
                   : "r"(cute::cast_smem_ptr_to_uint(&shared.factor))
                   : "memory");
#pragma unroll
      for (int half = 0; half < 2; ++half) offset[half] = SoftmaxRow::offset(state[half].max, factor);
    }
    // O += P V, the first half of the keys while the other half's exponentials run.
    uint64_t const values = operand(cute::cast_smem_ptr_to_uint(shared.v[buffer]), 0);
#pragma unroll
    for (int j = 0; j < 2; ++j) {
      auto& part = reinterpret_cast<float (&)[tile_k / 4]>(s[j * tile_k / 4]);
      uint32_t* const w = weights + j * tile_k / 8;
#pragma unroll
      for (int i = 0; i < tile_k / 4; i += 8) {
        float x[8];
#pragma unroll
        for (int k = 0; k < 8; ++k) x[k] = exp2_of(part[i + k] * a.score.factor - offset[k / 2 % 2]);
#pragma unroll
        for (int k = 0; k < 4; ++k) w[i / 2 + k] = Precision<Element>::pack(x[2 * k], x[2 * k + 1]);
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
        multiply_values<Element, head_dim>(o, w + 4 * m, values + (j * tile_k / 2 + m * 16) * row_bytes / 16);
      }
      cute::warpgroup_commit_batch();
    }
    cute::warpgroup_wait<0>();
    hold(o);
    release(shared.v_empty[buffer]);

    what = shared.table[chunk].what;
    if (!(what & StreamChunk::last)) continue;
    // The rows leave through the place of the job's queries, which all warps of the warpgroup have read: their scores
    // were there before its turn.
    JobPlace const& place = shared.jobs[StreamChunk::job(what)].place;
    int const row = row_of_lane(), warp_row = row / 16 * 16, lane = threadIdx.x % 32;
    float inverse[2];
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      state[half].sum = quad_sum(state[half].sum);
      inverse[half] = state[half].inverse_sum();
      if (a.p.lse != nullptr && lane % 4 == 0) {
        PlacedRow<Config> const out(a, place, row + half * 8);
        if (out.present) *out.lse = state[half].lse(a.score.factor);
      }
    }
    if (a.stores_by_tma) {
      char* const rows = shared.q[StreamChunk::job(what) % 2] + warp_row * row_bytes;
      uint32_t const to = cute::cast_smem_ptr_to_uint(rows) + lane % 16 * row_bytes;
#pragma unroll
      for (int g = 0; g < head_dim / 16; ++g) {
        uint32_t x[4];
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          float const* const pair = &o[8 * g + 2 * i];
          x[i] = Precision<Element>::pack(pair[0] * inverse[i % 2], pair[1] * inverse[i % 2]);
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
    state[0] = {}, state[1] = {};
#pragma unroll
    for (int i = 0; i < head_dim / 2; ++i) o[i] = 0.0f;
  }
  asm volatile("cp.async.bulk.wait_group.read 0;" ::: "memory");
}

template <class Config>
void launch_stream(StreamArguments const& arguments, int64_t blocks, cudaStream_t stream) {
  auto const kernel = stream_kernel<Config>;
  constexpr int shared_memory = Config::tile.shared_memory();
  static_assert(sizeof(StreamMemory<Config>) <= shared_memory);
  static_assert(Config::tile.blocks_a_unit() * (shared_memory + 1024) <= 228 * 1024);
  static OncePerDevice prepare;
  prepare([&] {
    char const* const preparing = "preparing the stream sm90 kernel";
    cuda_check(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, shared_memory),
               preparing);
    cuda_check(
        cudaFuncSetAttribute(kernel, cudaFuncAttributePreferredSharedMemoryCarveout, cudaSharedmemCarveoutMaxShared),
        preparing);
  });
  launch_dependent(kernel,
                   {dim3(static_cast<unsigned>(blocks)), Config::threads, shared_memory, 1, /*early=*/true},
                   stream, arguments, "launching the stream sm90 kernel");
}

template <class Config>
void run_stream(ForwardParams const& p, Plan const& plan, bool stores_by_tma, cudaStream_t stream) {
  constexpr DType dtype = std::is_same_v<typename Config::Element, __half> ? float16 : bfloat16;
  auto const map = [&](auto const& rows, int seqlen, int heads, int box) {
    // A problem without keys has nothing to describe, and nobody reads it.
    return tensor_map({rows.data != nullptr ? rows.data : p.q.data,
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
                                   Config::tile_q * row_bytes,
                                   /*steady=*/false,
                                   PlainScore::make(p.scale, p.softcap)},
                                  stores_by_tma ? map(p.o, p.seqlen_q, p.heads_q, 16) : CUtensorMap{},
                                  stores_by_tma,
                                  ceil_div(p.seqlen_q, Config::tile_q),
                                  0};
  launch_stream<Config>(arguments, plan.blocks, stream);
}

}  // namespace flashcore::sm90

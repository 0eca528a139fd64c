// SPDX-License-Identifier: Apache-2.0
// The kernel for small problems, where launch, first loads and idle multiprocessors take longer than the arithmetic. A
// block has one tile of queries and a part of the keys that fits its shared memory: it asks for everything at once and
// multiplies what is there. The blocks of a cluster divide a tile's keys and merge their results through distributed
// shared memory. README.md beside this file says which step waits for which.
#pragma once

#include <bit>

#include "attention/mask.h"
#include "sm90/forward_kernel.cuh"
#include "sm90/small_tile.h"

namespace flashcore::sm90 {

// What the kernel is compiled for; small_tiles.inc has the numbers and their reasons.
template <class Element_, int head_dim_, int warpgroups_, int blocks_, bool plain_score_>
struct SmallConfig {
  using Element = Element_;
  using Score = std::conditional_t<plain_score_, PlainScore, CappedScore>;
  static constexpr SmallTile tile{head_dim_, warpgroups_, blocks_, plain_score_};
  static constexpr int head_dim = head_dim_, warpgroups = warpgroups_, blocks = blocks_;
  static constexpr bool adds_sums = true;  // the rows' sums are added up, not multiplied by a column of ones

  static constexpr int chunk = SmallTile::chunk;
  static constexpr int tile_q = tile.tile_q(), threads = 128 * warpgroups;
  static constexpr int panels = tile.panels();
  static constexpr int q_panel = tile_q * row_bytes, kv_panel = chunk * row_bytes;
  static constexpr int q_bytes = tile.q_bytes(), kv_bytes = tile.kv_bytes();
  static_assert(head_dim % 64 == 0);

  // The exchange: eight rows, one of a lane's two in each quad of a warp, go to one block.
  static constexpr int bands = tile_q / 8;
  static constexpr int band_bytes = 8 * head_dim * 4;
  static constexpr int lane_vectors = head_dim / 16;  // of four floats, that a lane has of a band
};

template <class Score>
struct SmallArguments : Arguments<Score> {
  int splits, log_splits;  // blocks of a cluster
  // Where in shared memory the values, what other blocks send of outputs and of rows' states, and the block's own state
  // begin.
  int values_at, output_at, rows_at, state_at;
};

// --- instructions that CuTe has not, or not with the memory clobber that the compiler has to see ---------------------

__device__ __forceinline__ void cluster_arrive_relaxed() {
  asm volatile("barrier.cluster.arrive.relaxed.aligned;" ::: "memory");
}
__device__ __forceinline__ void cluster_arrive_release() {
  asm volatile("barrier.cluster.arrive.release.aligned;" ::: "memory");
}
__device__ __forceinline__ void cluster_wait_acquire() {
  asm volatile("barrier.cluster.wait.acquire.aligned;" ::: "memory");
}
// The address of what lies at `address` of this block's shared memory in that of the cluster's block `rank`.
__device__ __forceinline__ uint32_t in_block(uint32_t address, int rank) {
  uint32_t result;
  asm volatile("mapa.shared::cluster.u32 %0, %1, %2;" : "=r"(result) : "r"(address), "r"(rank));
  return result;
}
__device__ __forceinline__ void write_cluster(uint32_t address, float x, float y) {
  asm volatile("st.shared::cluster.v2.f32 [%0], {%1, %2};" ::"r"(address), "f"(x), "f"(y) : "memory");
}
__device__ __forceinline__ void write_cluster(uint32_t address, float x, float y, float z, float w) {
  asm volatile("st.shared::cluster.v4.f32 [%0], {%1, %2, %3, %4};" ::"r"(address), "f"(x), "f"(y), "f"(z), "f"(w)
               : "memory");
}
// Lets the next kernel of the stream be launched, and waits until the one before has finished and its writes are seen.
__device__ __forceinline__ void launch_dependents() { asm volatile("griddepcontrol.launch_dependents;" ::: "memory"); }
__device__ __forceinline__ void wait_for_prerequisites() { asm volatile("griddepcontrol.wait;" ::: "memory"); }

// --- what a block does -----------------------------------------------------------------------------------------------

// The chunks of keys [begin, begin + count) of this block. The chunks that a tile sees are divided evenly. Lies in
// shared memory: kept in registers over the products, its numbers would make them spill.
struct Part {
  Mask mask;
  KeyRange range;
  int begin, count;
  int share;  // chunks of each of the cluster's blocks, but for those at the end

  // Whether the cluster's block `rank` has keys.
  __device__ __forceinline__ bool has_keys(int rank) const { return rank * share < range.count(); }
};

// --- shared memory ---------------------------------------------------------------------------------------------------

// Queries, keys and values in panels of 64 columns; what other blocks send, in the order of the senders but for this
// block: for each sender bands of this block's rows, as the lanes hold them, and behind all of them the maxima and
// sums.
template <class Config>
struct SmallMemory {
  char* base;
  SmallArguments<typename Config::Score> const& a;

  __device__ __forceinline__ char* queries() const { return base; }
  __device__ __forceinline__ char* keys(int chunk) const { return base + Config::q_bytes + chunk * Config::kv_bytes; }
  __device__ __forceinline__ char* values(int chunk) const { return base + a.values_at + chunk * Config::kv_bytes; }
  __device__ __forceinline__ char* output(int place) const { return base + a.output_at + place * Config::band_bytes; }
  __device__ __forceinline__ char* rows(int place) const { return base + a.rows_at + place * 64; }
  __device__ __forceinline__ Barrier* barriers() const { return reinterpret_cast<Barrier*>(base + a.state_at); }
  __device__ __forceinline__ Barrier& full_keys(int chunk) const { return barriers()[chunk]; }
  __device__ __forceinline__ Barrier& full_values(int chunk) const {
    return barriers()[SmallTile::most_chunks + chunk];
  }
  __device__ __forceinline__ Part& part() const {
    return *reinterpret_cast<Part*>(barriers() + 2 * SmallTile::most_chunks);
  }
};
static_assert(2 * SmallTile::most_chunks * sizeof(Barrier) + sizeof(Part) <= SmallTile::state_bytes);

__device__ __forceinline__ uint32_t address_of(void const* shared) { return cute::cast_smem_ptr_to_uint(shared); }

// --- the block's part ------------------------------------------------------------------------------------------------

// This block's tile of queries, and its rank in the cluster that shares it. The grid is (blocks of a cluster · heads,
// tiles, sequences), and the tiles with the most keys come first within a sequence. Read anew from the special
// registers at each call, rather than kept over the products.
template <class Score>
__device__ __forceinline__ JobPlace this_job(SmallArguments<Score> const& a, int& rank) {
  int x, y, z;
  asm volatile("mov.u32 %0, %%ctaid.x;" : "=r"(x));
  asm volatile("mov.u32 %0, %%ctaid.y;" : "=r"(y));
  asm volatile("mov.u32 %0, %%ctaid.z;" : "=r"(z));
  int const queries = a.scheduler.tile_q, first = (static_cast<int>(gridDim.y) - 1 - y) * queries;
  rank = x & (a.splits - 1);
  return {z, x >> a.log_splits, first, min_of(queries, a.p.seqlen_q - first)};
}

template <class Score>
__device__ __forceinline__ Part this_part(SmallArguments<Score> const& a, JobPlace const& job, int rank) {
  Part part;
  part.mask = Mask::make(a.p.seqlen_q, a.p.seqlen_k, a.p.window_left, a.p.window_right);
  part.range = part.mask.key_range(job.first, job.first + job.queries, SmallTile::chunk);
  part.share = (part.range.count() + a.splits - 1) >> a.log_splits;
  part.begin = part.range.begin + rank * part.share;
  part.count = clamp_to(part.range.end - part.begin, 0, part.share);
  return part;
}

// One thread: asks for all that the block will read, in the order in which it is needed: Q K0 K1 V0 K2 V1 ... V(last).
template <class Config>
__device__ __forceinline__ void request(SmallArguments<typename Config::Score> const& a,
                                        SmallMemory<Config> const& shared, JobPlace const& job, Part const& part) {
  constexpr auto hint = static_cast<uint64_t>(cute::TMA::CacheHintSm90::EVICT_NORMAL);
  int const head_k = a.pack == a.p.group ? job.head : job.head * a.pack / a.p.group;
  auto const load = [&](CUtensorMap const& map, Barrier& full, char* to, int panel_bytes, int row, int head) {
#pragma unroll
    for (int panel = 0; panel < Config::panels; ++panel) {
      cute::SM90_TMA_LOAD_5D::copy(&map, reinterpret_cast<uint64_t*>(&full), hint, to + panel * panel_bytes,
                                   panel * panel_columns, 0, row, head, job.sequence);
    }
  };
  int const begin = part.begin, count = part.count;
#pragma unroll 1
  for (int c = 0; c <= count; ++c) {
    if (c < count) {
      Barrier& full = shared.full_keys(c);
      full.arrive_and_expect_tx(Config::kv_bytes + (c == 0 ? a.q_bytes : 0));
      if (c == 0) load(a.q, full, shared.queries(), Config::q_panel, job.first, job.head);
      load(a.k, full, shared.keys(c), Config::kv_panel, (begin + c) * Config::chunk, head_k);
    }
    if (c > 0) {
      Barrier& full = shared.full_values(c - 1);
      full.arrive_and_expect_tx(Config::kv_bytes);
      load(a.v, full, shared.values(c - 1), Config::kv_panel, (begin + c - 1) * Config::chunk, head_k);
    }
  }
}

// --- products and softmax --------------------------------------------------------------------------------------------

// Where a warpgroup's results of a part stand: the output so far, not divided by the rows' sums, and their state.
template <class Config>
struct Partial {
  float o[Config::head_dim / 2];
  SoftmaxRow state[2];
};

// Works off the block's chunks as they arrive: a chunk's softmax runs while the chunk before is multiplied with its
// values.
template <class Config>
__device__ __forceinline__ void attend(SmallArguments<typename Config::Score> const& a,
                                       SmallMemory<Config> const& shared, JobPlace const& job, Lane lane,
                                       Partial<Config>& partial) {
  using Element = typename Config::Element;
  constexpr int chunk = Config::chunk, head_dim = Config::head_dim;
  float (&o)[head_dim / 2] = partial.o;
  SoftmaxRow(&state)[2] = partial.state;
  float s[chunk / 2], ratio[2], offset[2];
  uint32_t weights[chunk / 4];
  int query[2];
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    int const row = lane.row + half * 8;
    query[half] = job.first + (a.pack == 1 ? row : row / a.pack);
  }
#pragma unroll
  for (int i = 0; i < head_dim / 2; ++i) o[i] = 0.0f;
  int const warpgroup = Config::warpgroups == 1 ? 0 : __shfl_sync(0xffffffffu, threadIdx.x / 128, 0);
  uint64_t const queries = operand(address_of(shared.queries()) + warpgroup * 64 * row_bytes, 0);
  uint64_t const all_keys = operand(address_of(shared.keys(0)), 0);
  uint64_t const all_values = operand(address_of(shared.values(0)), Config::kv_panel);

  // S = Q Kᵀ with chunk c's keys; O += P V with its values. Asynchronous.
  auto const issue_scores = [&](int c) {
    shared.full_keys(c).wait(0);
    uint64_t const keys = all_keys + c * (Config::kv_bytes / 16);
    hold(s);
    cute::warpgroup_arrive();
#pragma unroll
    for (int d = 0; d < head_dim / 16; ++d) {
      multiply_keys<Element, chunk>(s, queries + (d / 4 * Config::q_panel + d % 4 * 32) / 16,
                                    keys + (d / 4 * Config::kv_panel + d % 4 * 32) / 16, d > 0);
    }
    cute::warpgroup_commit_batch();
  };
  auto const issue_output = [&](int c) {
    shared.full_values(c).wait(0);
    uint64_t const values = all_values + c * (Config::kv_bytes / 16);
    hold(o);
    cute::warpgroup_arrive();
#pragma unroll
    for (int n = 0; n < chunk / 16; ++n) {
      multiply_values<Element, head_dim>(o, weights + 4 * n, values + n * 16 * row_bytes / 16);
    }
    cute::warpgroup_commit_batch();
  };
  auto const softmax = [&](int c) {
    hold(s);
    transform(s, a.score);
    Part const& part = shared.part();
    int const tile = part.begin + c;
    if (tile < part.range.full_begin || tile >= part.range.full_end) {
      hide(s, visible(part.mask, query, tile * chunk));
    }
    raise_maxima(s, state, ratio, offset, a.score);
    exponentials<Config>(s, state, offset, a.score.factor);
  };
  auto const pack_weights = [&] {
#pragma unroll
    for (int i = 0; i < chunk / 4; ++i) weights[i] = Precision<Element>::pack(s[2 * i], s[2 * i + 1]);
  };

  int const count = shared.part().count;
  if (count == 0) return;
  issue_scores(0);
  cute::warpgroup_wait<0>();
  softmax(0);
  pack_weights();
#pragma unroll 1
  for (int c = 1; c < count; ++c) {
    issue_scores(c);
    issue_output(c - 1);
    cute::warpgroup_wait<1>();
    softmax(c);
    cute::warpgroup_wait<0>();
    hold(o);
#pragma unroll
    for (int i = 0; i < head_dim / 2; ++i) o[i] *= ratio[i / 2 % 2];
    pack_weights();
  }
  issue_output(count - 1);
#pragma unroll
  for (int half = 0; half < 2; ++half) state[half].sum = quad_sum(state[half].sum);
  cute::warpgroup_wait<0>();
  hold(o);
}

// --- the merge -------------------------------------------------------------------------------------------------------

// A band of eight rows, row `half` of the lanes' two: the block of the cluster that merges and writes it, and its place
// among that block's bands.
struct Band {
  int owner, index;
};
template <class Config>
__device__ __forceinline__ Band band_of(SmallArguments<typename Config::Score> const& a, Lane lane, int half) {
  int const band = lane.row / 8 + half;
  return {band * a.splits / Config::bands, band & ((Config::bands >> a.log_splits) - 1)};
}
// Where a block keeps band `index` of what another sends it; senders are numbered without the block itself.
template <class Config>
__device__ __forceinline__ int band_place(SmallArguments<typename Config::Score> const& a, int sender, int index) {
  return sender * (Config::bands >> a.log_splits) + index;
}

// Sends the rows that other blocks merge to them.
template <class Config>
__device__ __forceinline__ void send(SmallMemory<Config> const& shared, int rank, Lane lane,
                                     Partial<Config> const& partial) {
  int const thread = threadIdx.x % 32;
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    auto const [owner, index] = band_of<Config>(shared.a, lane, half);
    if (owner == rank) continue;
    int const place = band_place<Config>(shared.a, rank < owner ? rank : rank - 1, index);
    uint32_t const output = in_block(address_of(shared.output(place)) + thread * 16, owner);
#pragma unroll
    for (int i = 0; i < Config::lane_vectors; ++i) {
      float const* const x = &partial.o[8 * i + 2 * half];
      write_cluster(output + i * 512, x[0], x[1], x[4], x[5]);
    }
    if (thread % 4 == 0) {
      SoftmaxRow const& state = partial.state[half];
      write_cluster(in_block(address_of(shared.rows(place)) + thread / 4 * 8, owner), state.max, state.sum);
    }
  }
}

// Adds what the other blocks sent of this lane's rows to its own, in the order of the keys but for its own part. Where
// only one of the two rows is this block's, the other one's numbers mean nothing, and nobody writes them.
template <class Config>
__device__ __forceinline__ void merge(SmallMemory<Config> const& shared, int rank, Lane lane, float factor,
                                      Partial<Config>& partial) {
  int const thread = threadIdx.x % 32;
  int const index[2] = {band_of<Config>(shared.a, lane, 0).index, band_of<Config>(shared.a, lane, 1).index};
  // The last blocks may have had no keys, and sent nothing.
  int senders = 0;
#pragma unroll
  for (int other = 0; other < SmallTile::most_splits; ++other) {
    senders += other < shared.a.splits && other != rank && shared.part().has_keys(other);
  }
  auto const row = [&](int sender, int half) {
    int const place = band_place<Config>(shared.a, sender, index[half]);
    float2 const sent = reinterpret_cast<float2 const*>(shared.rows(place))[thread / 4];
    return SoftmaxRow{sent.x, sent.y};
  };
  float top[2];
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    top[half] = partial.state[half].max;
#pragma unroll
    for (int sender = 0; sender < SmallTile::most_splits - 1; ++sender) {
      if (sender < senders) top[half] = fmaxf(top[half], row(sender, half).max);
    }
    float const ratio = partial.state[half].raise(top[half], factor);
#pragma unroll
    for (int i = 0; i < Config::lane_vectors; ++i) {
      float* const o = &partial.o[8 * i + 2 * half];
      o[0] *= ratio;
      o[1] *= ratio;
      o[4] *= ratio;
      o[5] *= ratio;
    }
  }
#pragma unroll 1
  for (int sender = 0; sender < senders; ++sender) {
    float4 x[2][Config::lane_vectors];
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      int const place = band_place<Config>(shared.a, sender, index[half]);
      auto const* const sent = reinterpret_cast<float4 const*>(shared.output(place)) + thread;
#pragma unroll
      for (int i = 0; i < Config::lane_vectors; ++i) x[half][i] = sent[i * 32];
    }
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      SoftmaxRow other = row(sender, half);
      float const ratio = other.raise(top[half], factor);
      partial.state[half].sum += other.sum;
#pragma unroll
      for (int i = 0; i < Config::lane_vectors; ++i) {
        float* const o = &partial.o[8 * i + 2 * half];
        o[0] += x[half][i].x * ratio;
        o[1] += x[half][i].y * ratio;
        o[4] += x[half][i].z * ratio;
        o[5] += x[half][i].w * ratio;
      }
    }
  }
}

// Merges the parts of the cluster, and writes the rows that are this block's to write.
template <class Config>
__device__ __forceinline__ void finish(SmallArguments<typename Config::Score> const& a,
                                       SmallMemory<Config> const& shared, Lane lane, Partial<Config>& partial) {
  int rank;
  JobPlace const job = this_job(a, rank);
  bool const divided = a.splits > 1;
  if (divided) {
    cluster_wait_acquire();  // all blocks have started: their shared memory may be written to
    if (shared.part().count > 0) send<Config>(shared, rank, lane, partial);
    __syncwarp();
    cluster_arrive_release();
    cluster_wait_acquire();  // all have sent: from here on nobody writes to another block
  }
  bool mine[2] = {true, true};
  if (divided) {
#pragma unroll
    for (int half = 0; half < 2; ++half) mine[half] = band_of<Config>(a, lane, half).owner == rank;
    if (mine[0] || mine[1]) merge<Config>(shared, rank, lane, a.score.factor, partial);
  }
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    if (!mine[half]) continue;
    SoftmaxRow const& state = partial.state[half];
    OutputRow<Config> const row(a, job, lane.row + half * 8);
    if (row.lse != nullptr && threadIdx.x % 4 == 0 && row.present) *row.lse = state.lse(a.score.factor);
    write_row<Config>(row, half, a.p.head_dim, partial.o, state.inverse_sum());
  }
}

// --- the kernel ------------------------------------------------------------------------------------------------------

template <class Config>
__global__ void __launch_bounds__(Config::threads, Config::blocks)
    small_kernel(__grid_constant__ SmallArguments<typename Config::Score> const a) {
  extern __shared__ __align__(1024) char memory[];
  SmallMemory<Config> const shared{memory, a};
  // Everything up to wait_for_prerequisites() may run while the kernel before still works: it touches no array.
  if (threadIdx.x < 2 * SmallTile::most_chunks) {
    shared.barriers()[threadIdx.x].init(1);
    cutlass::arch::fence_barrier_init();
  }
  if (threadIdx.x == 0) {
    cute::prefetch_tma_descriptor(reinterpret_cast<cute::TmaDescriptor const*>(&a.q));
    cute::prefetch_tma_descriptor(reinterpret_cast<cute::TmaDescriptor const*>(&a.k));
    cute::prefetch_tma_descriptor(reinterpret_cast<cute::TmaDescriptor const*>(&a.v));
  }
  int rank;
  JobPlace const job = this_job(a, rank);
  if (threadIdx.x == 32) shared.part() = this_part(a, job, rank);
  Lane const lane{static_cast<int>(threadIdx.x) / 32 * 16 + static_cast<int>(threadIdx.x) % 32 / 4};
  __syncthreads();
  bool const divided = a.splits > 1;
  if (divided) cluster_arrive_relaxed();
  launch_dependents();
  wait_for_prerequisites();

  if (threadIdx.x == 0) request<Config>(a, shared, job, shared.part());
  __syncwarp();
  Partial<Config> partial;
  attend<Config>(a, shared, job, lane, partial);
  finish<Config>(a, shared, lane, partial);
}

template <class Config>
void run_small(ForwardParams const& p, Plan const& plan, cudaStream_t stream) {
  constexpr DType dtype = std::is_same_v<typename Config::Element, __half> ? float16 : bfloat16;
  constexpr SmallTile tile = Config::tile;
  int const chunks = plan.tile_k / Config::chunk, splits = plan.splits;
  int const queries = Config::tile_q / plan.packed_heads, groups = p.heads_q / plan.packed_heads;
  int64_t const pack = plan.packed_heads;
  auto const keys = [&](Rows<const void*> const& rows) {
    // A problem without keys has nothing to describe, and nobody reads it.
    return tensor_map({rows.data != nullptr ? rows.data : p.q.data,
                       dtype,
                       p.head_dim,
                       {1, p.seqlen_k, p.heads_k, p.batch},
                       {0, rows.row_stride, rows.head_stride, rows.batch_stride},
                       {1, Config::chunk}});
  };
  SmallArguments<typename Config::Score> const arguments{
      {tensor_map({p.q.data,
                   dtype,
                   p.head_dim,
                   {pack, p.seqlen_q, p.heads_q / pack, p.batch},
                   {p.q.head_stride, p.q.row_stride, p.q.head_stride * pack, p.q.batch_stride},
                   {plan.packed_heads, queries}}),
       keys(p.k),
       keys(p.v),
       p,
       {queries, 1, groups, 0},
       static_cast<uint32_t>(plan.tiles),
       plan.packed_heads,
       Config::panels * plan.packed_heads * queries * row_bytes,
       0.0f,
       0,
       Config::Score::make(p.scale, p.softcap)},
      splits,
      std::countr_zero(static_cast<unsigned>(splits)),
      tile.values_at(chunks),
      tile.output_at(chunks),
      tile.rows_at(chunks, splits),
      tile.state_at(chunks, splits)};

  auto const kernel = small_kernel<Config>;
  constexpr int most_shared_memory = 227 * 1024;  // the same for every plan: threads may launch different ones at once
  cuda_check(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, most_shared_memory),
             "preparing the small sm90 kernel");
  cuda_check(
      cudaFuncSetAttribute(kernel, cudaFuncAttributePreferredSharedMemoryCarveout, cudaSharedmemCarveoutMaxShared),
      "preparing the small sm90 kernel");
  cudaLaunchAttribute attributes[2] = {};
  attributes[0].id = cudaLaunchAttributeProgrammaticStreamSerialization;
  attributes[0].val.programmaticStreamSerializationAllowed = 1;
  attributes[1].id = cudaLaunchAttributeClusterDimension;
  attributes[1].val.clusterDim.x = static_cast<unsigned>(splits);
  attributes[1].val.clusterDim.y = attributes[1].val.clusterDim.z = 1;
  cudaLaunchConfig_t config = {};
  config.gridDim = dim3(static_cast<unsigned>(splits) * groups, ceil_div(p.seqlen_q, queries), p.batch);
  config.blockDim = dim3(Config::threads);
  config.dynamicSmemBytes = static_cast<size_t>(tile.shared_memory(chunks, splits));
  config.stream = stream;
  config.attrs = attributes;
  config.numAttrs = splits > 1 ? 2 : 1;
  cuda_check(cudaLaunchKernelEx(&config, kernel, arguments), "launching the small sm90 kernel");
}

}  // namespace flashcore::sm90

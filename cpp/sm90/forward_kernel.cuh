// SPDX-License-Identifier: Apache-2.0
// The forward kernel for compute capability 9.0, in the manner of FlashAttention-3 (Shah et al., arXiv:2407.08608): a
// producer warp asks TMA for tiles of keys and values, consumer warpgroups of 64 rows of queries each multiply them
// (wgmma), and a tile's softmax runs while the tensor cores multiply for the tile before and for other warpgroups.
// README.md beside this file has the picture.
#pragma once

#include <cutlass/arch/reg_reconfig.h>

#include "core/cuda_check.h"
#include "core/once_per_device.h"
#include "flashcore/plan.h"
#include "sm90/dependent_launch.h"
#include "sm90/forward_consumers.cuh"
#include "sm90/forward_producer.cuh"

namespace flashcore::sm90 {

// The consumers, until the kernel before has ended: bring the lines that the block reads first into the L2 cache, its
// queries and the first of their keys and values. Where sequences vary in length, only arrays say which.
template <class Config>
__device__ __forceinline__ void prefetch_first(Arguments<typename Config::Score> const& a) {
  using Element = typename Config::Element;
  constexpr int consumers = 128 * Config::warpgroups, most_keys = 128;
  constexpr int lines = (Config::head_dim + 63) / 64;
  Work work;
  if (a.ragged()) return;
  if (!a.scheduler.work(a.p, blockIdx.x, work)) return;
  Job const job = job_of<Config>(a, work);
  int const thread = threadIdx.x - 128;
#pragma unroll 1
  for (int row = thread; row < job.queries * a.pack; row += consumers) {
    int const query = a.query(row);
    prefetch_row<Element, lines>(a.p.q, work.sequence, work.head * a.pack + (row - query * a.pack), job.first + query);
  }
  int const head_k = a.pack == a.p.group ? work.head : work.head * a.pack / a.p.group;
#pragma unroll 1
  for (int i = thread; i < min_of(job.range.count() * Config::tile_k, most_keys); i += consumers) {
    int const row = job.range.tile(i / Config::tile_k) * Config::tile_k + i % Config::tile_k;
    if (row >= a.p.seqlen_k) continue;
    prefetch_row<Element, lines>(a.p.k, work.sequence, head_k, row);
    prefetch_row<Element, lines>(a.p.v, work.sequence, head_k, row);
  }
}

template <class Config>
__global__ void __launch_bounds__(Config::threads, 1)
    forward_kernel(__grid_constant__ Arguments<typename Config::Score> const a) {
  extern __shared__ __align__(1024) char memory[];
  auto& shared = *reinterpret_cast<SharedMemory<Config>*>(memory);
  // The next kernel's blocks find room only where this one's end. Everything up to wait_for_prerequisites() reads and
  // writes no array.
  launch_dependents();
  if (threadIdx.x == 0) {
    shared.again_count = 0;
    constexpr int consumer_warps = 4 * Config::warpgroups;
    for (int i = 0; i < Config::q_buffers; ++i) {
      shared.q_full[i].init(1);
      shared.q_empty[i].init(consumer_warps);
    }
    shared.jobs_done.init(32 * consumer_warps);
    for (int i = 0; i < Config::slots; ++i) {
      shared.full[i].init(1);
      shared.empty[i].init(consumer_warps);
    }
    cutlass::arch::fence_barrier_init();
  }
  if constexpr (Config::sums_by_product) {
    uint32_t const one = Precision<typename Config::Element>::pack(1.0f, 1.0f);
    for (int i = threadIdx.x; i < Config::kv_panel / 4; i += Config::threads) {
      reinterpret_cast<uint32_t*>(shared.ones)[i] = one;
    }
    cutlass::arch::fence_view_async_shared();
  }
  __syncthreads();

  int const warpgroup = __shfl_sync(0xffffffffu, threadIdx.x / 128, 0);
  if (warpgroup == 0) {
    cutlass::arch::warpgroup_reg_dealloc<Config::producer_registers>();
    if (threadIdx.x == 0) {
      wait_for_prerequisites();
      produce<Config>(a, shared);
    }
  } else {
    cutlass::arch::warpgroup_reg_alloc<Config::consumer_registers>();
    prefetch_first<Config>(a);
    wait_for_prerequisites();
    consume<Config>(a, shared, warpgroup - 1);
  }
}

template <class Config>
void launch(Arguments<typename Config::Score> const& arguments, int64_t blocks, cudaStream_t stream) {
  auto const kernel = forward_kernel<Config>;
  constexpr int shared_memory = sizeof(SharedMemory<Config>);
  static OncePerDevice prepare;
  prepare([&] {
    cuda_check(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, shared_memory),
               "preparing the sm90 kernel");
  });
  launch_dependent(kernel, {dim3(static_cast<unsigned>(blocks)), Config::threads, shared_memory, 1, true}, stream,
                   arguments, "launching the sm90 kernel");
}

template <class Config>
void run_forward(ForwardParams const& p, Plan const& plan, cudaStream_t stream) {
  constexpr DType dtype = std::is_same_v<typename Config::Element, __half> ? float16 : bfloat16;
  bool const varlen = p.cu_seqlens_q != nullptr;
  int64_t const pack = plan.packed_heads, batch = varlen ? 1 : p.batch;
  int const queries = Config::tile_q / plan.packed_heads;
  int const groups = p.heads_q / plan.packed_heads;
  auto const keys = [&](Rows<const void*> const& rows) {
    // A problem without keys has nothing to describe, and nobody reads it.
    return tensor_map({rows.data != nullptr ? rows.data : p.q.data,
                       dtype,
                       p.head_dim,
                       {1, p.seqlen_k, p.heads_k, batch},
                       {0, rows.row_stride, rows.head_stride, rows.batch_stride},
                       {1, Config::tile_k},
                       Config::panel_columns});
  };
  Arguments<typename Config::Score> const arguments{
      tensor_map({p.q.data,
                  dtype,
                  p.head_dim,
                  {pack, p.seqlen_q, p.heads_q / pack, batch},
                  {p.q.head_stride, p.q.row_stride, p.q.head_stride * pack, p.q.batch_stride},
                  {plan.packed_heads, queries},
                  Config::panel_columns}),
      keys(p.k),
      keys(p.v),
      p,
      {queries, plan.heads_per_section, groups, plan.section_slots},
      varlen ? static_cast<uint32_t>(plan.tiles)
             : ceil_div(groups * p.batch, plan.heads_per_section) * static_cast<uint32_t>(plan.section_slots),
      plan.packed_heads,
      (65535 + plan.packed_heads) / plan.packed_heads,
      Config::panels * plan.packed_heads * queries * Config::row_bytes,
      Config::steady && (Config::sums_by_product || p.lse == nullptr),
      Config::Score::make(p.scale, p.softcap)};
  if constexpr (Config::sums_by_product) {
    if (p.lse != nullptr) return launch<WithLse<Config>>(arguments, plan.blocks, stream);
  }
  launch<Config>(arguments, plan.blocks, stream);
}

}  // namespace flashcore::sm90

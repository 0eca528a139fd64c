// SPDX-License-Identifier: Apache-2.0
// The kernel for small problems, where launch, first loads and idle multiprocessors take longer than the arithmetic. A
// block has one tile of queries and a part of the keys that fits its shared memory: it asks for everything at once and
// multiplies what is there. Warpgroups, and blocks of a cluster, divide a tile's keys and merge their results through
// (distributed) shared memory. small.md beside this file says which step waits for which.
#pragma once

#include "core/cuda_check.h"
#include "core/once_per_device.h"
#include "flashcore/plan.h"
#include "sm90/dependent_launch.h"
#include "sm90/small_loads.cuh"
#include "sm90/small_merge.cuh"
#include "sm90/small_output.cuh"

namespace flashcore::sm90 {

template <class Config>
__global__ void __launch_bounds__(Config::threads, Config::blocks)
    small_kernel(__grid_constant__ SmallArguments<typename Config::Score> const a) {
  extern __shared__ __align__(1024) char memory[];
  SmallMemory<Config> const shared{memory, a};
  // Everything up to wait_for_prerequisites() may run while the kernel before still works: it reads and writes no
  // array.
  if (threadIdx.x == 0) {
    shared.full_queries().init(1);
#pragma unroll
    for (int group = 0; group < Config::key_groups; ++group) {
#pragma unroll 1
      for (int i = 0; i < a.steps; ++i) {
        shared.full_keys(group, i).init(1);
        shared.full_values(group, i).init(1);
      }
    }
#pragma unroll
    for (int i = 0; i < Config::tile.warpgroups(); ++i) shared.received(i).init(1);
    cutlass::arch::fence_barrier_init();
  }
  if constexpr (Config::steady) fill_ones<typename Config::Element>(shared.ones());
  Task const task = this_task<Config>(a);
  if (threadIdx.x == 32) shared.task() = task;
  prefetch<Config>(a, task);
  for (int row = threadIdx.x; row < Config::tile_q; row += Config::threads) {
    shared.query(row) = task.job.first + query_of(a, row);
  }
  if (threadIdx.x == 64) {
    cute::prefetch_tma_descriptor(reinterpret_cast<cute::TmaDescriptor const*>(&a.q));
    cute::prefetch_tma_descriptor(reinterpret_cast<cute::TmaDescriptor const*>(&a.k));
    cute::prefetch_tma_descriptor(reinterpret_cast<cute::TmaDescriptor const*>(&a.v));
  }
  Warpgroup<Config> const warpgroup{
      Config::tile.warpgroups() == 1 ? 0 : __shfl_sync(0xffffffffu, static_cast<int>(threadIdx.x) / 128, 0)};
  bool const leads = warpgroup.thread() == 0;
  __syncthreads();
  if (Config::cluster > 1) {
    if (leads) {
      int const bytes = task.senders<Config::cluster>(warpgroup.rank()) * Config::tile.block_bytes();
      shared.received(warpgroup.index).arrive_and_expect_tx(bytes);
    }
    cluster_arrive_relaxed();  // the fence above has made the barriers known
  }
  bool const requests = leads && warpgroup.rows() == 0;
  if (requests) expect<Config>(a, shared, warpgroup, task);
  if (!a.alone) launch_dependents();
  wait_for_prerequisites();

  if (requests) request<Config>(a, shared, warpgroup, task);
  __syncwarp();
  Lane const lane{warpgroup.rows() * 64 + warpgroup.thread() / 32 * 16 + warpgroup.thread() % 32 / 4};
  Partial<Config> partial;
  attend<Config>(a, shared, warpgroup, lane, partial);
  // Where the rows go, before the merge has to be waited for.
  JobPlace const job = shared.task().job;
  PlacedRow<Config> const row[2] = {{a, job, lane.row}, {a, job, lane.row + 8}};
  float mine[4 * Config::pieces];
  exchange<Config>(shared, warpgroup, a.score.factor, partial, mine);
  write<Config>(a, row, warpgroup, partial.state, mine);
  if constexpr (Config::steady) {
    Lost<Config> const lost(row, partial.state);
    if (lost.any_of_warp()) write_exactly<Config>(a, shared, warpgroup, lost);
  }
}

template <class Config>
void launch_small(SmallArguments<typename Config::Score> const& arguments, dim3 grid, cudaStream_t stream) {
  auto const kernel = small_kernel<Config>;
  static OncePerDevice prepare;
  prepare([&] {
    constexpr int most_shared_memory = 227 * 1024;  // the same for every plan
    cuda_check(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, most_shared_memory),
               "preparing the small sm90 kernel");
    cuda_check(
        cudaFuncSetAttribute(kernel, cudaFuncAttributePreferredSharedMemoryCarveout, cudaSharedmemCarveoutMaxShared),
        "preparing the small sm90 kernel");
  });
  launch_dependent(kernel, {grid, Config::threads, Config::tile.shared_memory(arguments.steps), Config::cluster, true},
                   stream, arguments, "launching the small sm90 kernel");
}

template <class Config>
void run_small(ForwardParams const& p, Plan const& plan, cudaStream_t stream) {
  constexpr DType dtype = std::is_same_v<typename Config::Element, __half> ? float16 : bfloat16;
  constexpr SmallTile tile = Config::tile;
  int const steps = plan.tile_k / (Config::step * Config::key_groups);
  int const queries = Config::tile_q / plan.packed_heads, groups = p.heads_q / plan.packed_heads;
  int64_t const pack = plan.packed_heads;
  auto const keys = [&](Rows<const void*> const& rows, int box) {
    // A problem without keys has nothing to describe, and nobody reads it.
    return tensor_map({rows.data != nullptr ? rows.data : p.q.data,
                       dtype,
                       p.head_dim,
                       {1, p.seqlen_k, p.heads_k, p.batch},
                       {0, rows.row_stride, rows.head_stride, rows.batch_stride},
                       {1, box}});
  };
  SmallArguments<typename Config::Score> const arguments{
      {tensor_map({p.q.data,
                   dtype,
                   p.head_dim,
                   {pack, p.seqlen_q, p.heads_q / pack, p.batch},
                   {p.q.head_stride, p.q.row_stride, p.q.head_stride * pack, p.q.batch_stride},
                   {plan.packed_heads, queries}}),
       keys(p.k, Config::step),
       keys(p.v, Config::steps * Config::step),
       p,
       {queries, 1, groups, 0},
       static_cast<uint32_t>(plan.tiles),
       plan.packed_heads,
       ceil_div(1 << 16, plan.packed_heads),
       Config::panels * plan.packed_heads * queries * row_bytes,
       false,
       Config::Score::make(p.scale, p.softcap)},
      steps,
      tile.values_at(steps),
      tile.ones_at(steps),
      tile.received_at(steps),
      tile.barriers_at(steps),
      plan.blocks <= SmallTile::units};

  dim3 const grid(static_cast<unsigned>(Config::cluster * groups), ceil_div(p.seqlen_q, queries),
                  static_cast<unsigned>(p.batch));
  if constexpr (Config::tile.ones_bytes() > 0) {
    bool const many = int64_t{p.batch} * p.heads_q * p.seqlen_q >= few_rows;
    if (many && p.lse == nullptr && p.head_dim == Config::head_dim)
      return launch_small<Steady<Config>>(arguments, grid, stream);
  }
  launch_small<Config>(arguments, grid, stream);
}

}  // namespace flashcore::sm90

// SPDX-License-Identifier: Apache-2.0
// From a plan to an instance of the Hopper decode kernels.
#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <atomic>
#include <random>
#include <string_view>

#include "flashcore/error.h"
#include "sm90/decode_parts.cuh"
#include "sm90/decode_tile.h"
#include "sm90/decode_turned_tile.h"
#include "sm90/sm90.h"

namespace flashcore::sm90 {

// Instantiated in the files that cmake/KernelInstances.cmake makes.
template <class Element, int head_dim, int slices>
struct DecodeConfig;
template <class Config>
void run_decode(DecodeParams const& params, Plan const& plan, cudaStream_t stream);
template <class Element, int head_dim, int rows>
struct TurnedConfig;
template <class Config>
void run_decode_turned(DecodeParams const& params, Plan const& plan, cudaStream_t stream);

namespace {

bool is_turned(Plan const& plan) { return std::string_view(plan.kernel) == "sm90_decode_turned"; }

template <class Element>
bool run(DecodeParams const& params, Plan const& plan, cudaStream_t stream) {
#define FLASHCORE_SM90_DECODE_TURNED(D, rows)                                \
  if (is_turned(plan) && plan.head_dim == D && plan.tile_q == rows) {        \
    run_decode_turned<TurnedConfig<Element, D, rows>>(params, plan, stream); \
    return true;                                                             \
  }
#include "sm90/decode_turned_tiles.inc"
#undef FLASHCORE_SM90_DECODE_TURNED
#define FLASHCORE_SM90_DECODE(D, slices)                                      \
  if (!is_turned(plan) && plan.head_dim == D && plan.tile_q == 16 * slices) { \
    run_decode<DecodeConfig<Element, D, slices>>(params, plan, stream);       \
    return true;                                                              \
  }
#include "sm90/decode_tiles.inc"
#undef FLASHCORE_SM90_DECODE
  return false;
}

// A launch's own number, by which the blocks that merge know what another one has left (decode_merge.cuh). The first is
// drawn, so that no data is likely to look like it.
unsigned long long launch_number() {
  static std::atomic<uint64_t> next{[] {
    std::random_device draw;
    return uint64_t{draw()} << 32 | draw();
  }()};
  return next.fetch_add(1, std::memory_order_relaxed) << MergeArguments::count_bits;
}

}  // namespace

void decode(const KvCacheParams& params, DType dtype, const Plan& plan, void* workspace, void* stream) {
  DecodeParams p{};
  static_cast<sm80::DecodeParams&>(p) = sm80::decode_params(params, plan, workspace);
  HopperDecodeTile const tile{plan.head_dim, plan.tile_q / 16};
  int const cluster_rows = plan.shares > 1 ? p.part_rows * (plan.shares / plan.cluster) : 0;
  p.stages = is_turned(plan) ? TurnedDecodeTile{plan.head_dim, plan.tile_q}.stages_of(plan.shared_memory)
                             : tile.stages_of(plan.shared_memory, cluster_rows);
  int const most = plan.even_parts == 0 && plan.teams == 0 ? plan.splits : 0;
  p.parts = DecodeParts::of(p.heads_k * p.row_tiles, p.batch, most, plan.teams);
  // Where lengths change nothing, parts need no search: a single sequence is as long as itself, and one part is all of
  // it.
  p.even = most > 0 ? most == 1 : plan.even_parts;
  if (plan.workspace > 0) {  // outputs, counts and log-sum-exps of all slots
    int64_t const slots = plan.workspace / merge_slot_bytes(p.part_rows, p.head_dim);
    p.part_out = static_cast<float*>(workspace);
    p.merge.counts = reinterpret_cast<unsigned long long*>(p.part_out + slots * p.part_rows * p.head_dim);
    p.part_lse = reinterpret_cast<float*>(p.merge.counts + slots);
    p.merge.launch = launch_number();
    p.merge.second = p.even > 0 ? 1 : p.parts.lines.divisor;
    p.merge.stride = plan.teams > 0 ? 2 * p.merge.second : p.merge.second;
  }
  auto const s = static_cast<cudaStream_t>(stream);
  bool const found = dtype == float16 ? run<__half>(p, plan, s) : run<__nv_bfloat16>(p, plan, s);
  if (!found) throw RuntimeError("the plan names no decode kernel of this build; plan() makes plans that do");
}

}  // namespace flashcore::sm90

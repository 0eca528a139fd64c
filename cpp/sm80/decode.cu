// SPDX-License-Identifier: Apache-2.0
// From a plan to an instance of the decode kernel.
#include "sm80/decode.h"

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include "flashcore/error.h"
#include "sm80/decode_params.h"

namespace flashcore::sm80 {

// Instantiated in the files that cmake/KernelInstances.cmake makes.
template <class Element, int head_dim, int slices>
struct DecodeConfig;
template <class Config>
void run_decode(DecodeParams const& params, Plan const& plan, cudaStream_t stream);

namespace {

template <class Element>
bool run(DecodeParams const& params, Plan const& plan, cudaStream_t stream) {
#define FLASHCORE_SM80_DECODE(D, slices)                                \
  if (plan.head_dim == D && plan.tile_q == 16 * slices) {               \
    run_decode<DecodeConfig<Element, D, slices>>(params, plan, stream); \
    return true;                                                        \
  }
#include "sm80/decode_tiles.inc"
#undef FLASHCORE_SM80_DECODE
  return false;
}

}  // namespace

DecodeParams decode_params(const KvCacheParams& params, const Plan& plan, void* workspace) {
  DecodeParams p{};
  static_cast<KvCacheParams&>(p) = params;
  p.rows = params.group * params.seqlen_q;
  p.tile_rows = plan.tile_q;
  p.row_tiles = ceil_div(p.rows, p.tile_rows);
  p.schedule = {static_cast<int32_t>(plan.blocks), params.heads_k * p.row_tiles,
                params.batch_invariant ? plan.splits : 0};
  p.plain_score = plan.plain_score;
  p.score = CappedScore::make(params.scale, params.softcap);
  if (p.plain_score) p.score.factor = PlainScore::make(params.scale, params.softcap).factor;
  p.part_rows = min_of(p.rows, p.tile_rows);
  if (plan.workspace > 0) {
    int64_t const slots = plan.workspace / (int64_t{p.part_rows} * (p.head_dim + 1) * 4);
    p.part_out = static_cast<float*>(workspace);
    p.part_lse = p.part_out + slots * p.part_rows * p.head_dim;
  }
  return p;
}

void decode(const KvCacheParams& params, DType dtype, const Plan& plan, void* workspace, void* stream) {
  DecodeParams p = decode_params(params, plan, workspace);
  p.stages = DecodeTile{plan.head_dim, plan.tile_q / 16}.stages_of(plan.shared_memory);
  auto const s = static_cast<cudaStream_t>(stream);
  bool const found = dtype == float16 ? run<__half>(p, plan, s) : run<__nv_bfloat16>(p, plan, s);
  if (!found) throw RuntimeError("the plan names no decode kernel of this build; plan() makes plans that do");
  if (plan.workspace > 0) merge_parts(p, dtype, s);
}

}  // namespace flashcore::sm80

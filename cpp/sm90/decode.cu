// SPDX-License-Identifier: Apache-2.0
// From a plan to an instance of the Hopper decode kernel.
#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <string_view>

#include "flashcore/error.h"
#include "sm80/decode_params.h"
#include "sm90/decode_tile.h"
#include "sm90/sm90.h"

namespace flashcore::sm90 {

// Instantiated in the files that cmake/KernelInstances.cmake makes.
template <class Element, int head_dim, int slices>
struct DecodeConfig;
template <class Config>
void run_decode(sm80::DecodeParams const& params, Plan const& plan, cudaStream_t stream);

namespace {

template <class Element>
bool run(sm80::DecodeParams const& params, Plan const& plan, cudaStream_t stream) {
#define FLASHCORE_SM90_DECODE(D, slices)                                \
  if (plan.head_dim == D && plan.tile_q == 16 * slices) {               \
    run_decode<DecodeConfig<Element, D, slices>>(params, plan, stream); \
    return true;                                                        \
  }
#include "sm90/decode_tiles.inc"
#undef FLASHCORE_SM90_DECODE
  return false;
}

}  // namespace

void decode(const KvCacheParams& params, DType dtype, const Plan& plan, void* workspace, void* stream) {
  sm80::DecodeParams p = sm80::decode_params(params, plan, workspace);
  HopperDecodeTile const tile{plan.head_dim, plan.tile_q / 16};
  p.stages = tile.stages_of(plan.shared_memory, HopperDecodeTile::clusters(plan.kernel));
  auto const s = static_cast<cudaStream_t>(stream);
  bool const found = dtype == float16 ? run<__half>(p, plan, s) : run<__nv_bfloat16>(p, plan, s);
  if (!found) throw RuntimeError("the plan names no decode kernel of this build; plan() makes plans that do");
  if (plan.workspace > 0) sm80::merge_parts(p, dtype, s);
}

}  // namespace flashcore::sm90

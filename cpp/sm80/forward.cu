// SPDX-License-Identifier: Apache-2.0
// From a plan to an instance of the sm80 forward kernel.
#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include "flashcore/error.h"
#include "sm80/sm80.h"

namespace flashcore::sm80 {

// Instantiated in the files that cmake/KernelInstances.cmake makes.
template <class Element, int head_dim, int tile_q, int tile_k, int warps, int stages, bool plain_score>
struct ForwardConfig;
template <class Config>
void run_forward(ForwardParams const& params, Plan const& plan, cudaStream_t stream);

namespace {

template <class Element>
bool run(ForwardParams const& params, Plan const& plan, cudaStream_t stream) {
#define FLASHCORE_SM80_TILE(D, Q, K, W, S, plain)                                                \
  if (plan.head_dim == D && plan.tile_q == Q && plan.tile_k == K && plan.plain_score == plain) { \
    run_forward<ForwardConfig<Element, D, Q, K, W, S, plain>>(params, plan, stream);             \
    return true;                                                                                 \
  }
#include "sm80/tiles.inc"
#undef FLASHCORE_SM80_TILE
  return false;
}

}  // namespace

void forward(const ForwardParams& params, DType dtype, const Plan& plan, void* stream) {
  auto const s = static_cast<cudaStream_t>(stream);
  bool const found = dtype == float16 ? run<__half>(params, plan, s) : run<__nv_bfloat16>(params, plan, s);
  if (!found) throw RuntimeError("the plan names no sm80 kernel of this build; plan() makes plans that do");
}

}  // namespace flashcore::sm80

// SPDX-License-Identifier: Apache-2.0
// From a plan to an instance of the sm90 forward kernel.
#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include "core/cuda_check.h"
#include "flashcore/error.h"
#include "sm90/sm90.h"

namespace flashcore::sm90 {

// Instantiated in the files that cmake/KernelInstances.cmake makes.
template <class Element, int head_dim, int tile_k, int warpgroups, int slots, bool in_turn, int q_buffers,
          bool plain_score>
struct ForwardConfig;
template <class Config>
void run_forward(ForwardParams const& params, Plan const& plan, cudaStream_t stream);

namespace {

template <class Element>
bool run(ForwardParams const& params, Plan const& plan, cudaStream_t stream) {
#define FLASHCORE_SM90_TILE(D, K, W, S, T, Q, plain)                                                  \
  if (plan.head_dim == D && plan.tile_q == 64 * W && plan.tile_k == K && plan.plain_score == plain) { \
    run_forward<ForwardConfig<Element, D, K, W, S, T, Q, plain>>(params, plan, stream);               \
    return true;                                                                                      \
  }
#include "sm90/tiles.inc"
#undef FLASHCORE_SM90_TILE
  return false;
}

}  // namespace

void forward(ForwardParams params, DType dtype, const Plan& plan, void* workspace, void* stream) {
  auto const s = static_cast<cudaStream_t>(stream);
  if (plan.workspace > 0 && workspace != nullptr) {
    params.next_tile = static_cast<uint32_t*>(workspace);
    cuda_check(cudaMemsetAsync(workspace, 0, sizeof(uint32_t), s), "clearing the sm90 kernel's counter of tiles");
  }
  bool const found = dtype == float16 ? run<__half>(params, plan, s) : run<__nv_bfloat16>(params, plan, s);
  if (!found) throw RuntimeError("the plan names no sm90 kernel of this build; plan() makes plans that do");
}

}  // namespace flashcore::sm90

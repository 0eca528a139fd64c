// SPDX-License-Identifier: Apache-2.0
// From a plan to an instance of the kernel for small problems.
#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include "flashcore/error.h"
#include "sm90/sm90.h"

namespace flashcore::sm90 {

// Instantiated in the files that cmake/KernelInstances.cmake makes.
template <class Element, int head_dim, int row_groups, int key_groups, int cluster, int chunk, int blocks,
          bool plain_score>
struct SmallConfig;
template <class Config>
void run_small(ForwardParams const& params, Plan const& plan, cudaStream_t stream);

namespace {

template <class Element>
bool run(ForwardParams const& params, Plan const& plan, cudaStream_t stream) {
#define FLASHCORE_SM90_SMALL_TILE(D, R, K, C, N, B, plain)                                                  \
  if (plan.head_dim == D && plan.tile_q == 64 * R && plan.threads == 128 * R * K && plan.splits == K * C && \
      plan.plain_score == plain) {                                                                          \
    run_small<SmallConfig<Element, D, R, K, C, N, B, plain>>(params, plan, stream);                         \
    return true;                                                                                            \
  }
#include "sm90/small_tiles.inc"
#undef FLASHCORE_SM90_SMALL_TILE
  return false;
}

}  // namespace

void small(const ForwardParams& params, DType dtype, const Plan& plan, void* stream) {
  auto const s = static_cast<cudaStream_t>(stream);
  bool const found = dtype == float16 ? run<__half>(params, plan, s) : run<__nv_bfloat16>(params, plan, s);
  if (!found) throw RuntimeError("the plan names no small sm90 kernel of this build; plan() makes plans that do");
}

}  // namespace flashcore::sm90

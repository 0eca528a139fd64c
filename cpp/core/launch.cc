// SPDX-License-Identifier: Apache-2.0
// From a Plan to a kernel: the one switch over machines.
#include <string_view>

#include "core/forward_params.h"
#include "core/kvcache_params.h"
#include "core/problem_facts.h"
#include "core/recent_plans.h"
#include "cpu/cpu.h"
#include "flashcore/flashcore.h"
#include "sm80/decode.h"
#include "sm80/sm80.h"
#include "sm90/sm90.h"

#if FLASHCORE_HAS_CUDA
#include "core/cuda_check.h"
#endif

namespace flashcore {

void launch(const Problem& problem, const Plan& plan, [[maybe_unused]] void* workspace) {
  if (plan.blocks == 0) return;  // no queries
  ForwardParams const params = forward_params(problem);
  DType const dtype = problem.query.dtype;
  switch (plan.backend) {
    case Backend::cpu:
      cpu::forward(params, dtype, plan);
      return;
#if FLASHCORE_HAS_CUDA
    case Backend::sm80: {
      CurrentDevice const current(problem.query.device.index);
      sm80::forward(params, dtype, plan, problem.stream);
      return;
    }
#endif
#if FLASHCORE_HAS_SM90
    case Backend::sm90: {
      CurrentDevice const current(problem.query.device.index);
      if (std::string_view(plan.kernel) == "sm90_small") {
        sm90::small(params, dtype, plan, problem.stream);
      } else if (std::string_view(plan.kernel) == "sm90_stream") {
        sm90::stream(params, dtype, plan, tma_encodes(problem.out), problem.stream);
      } else {
        sm90::forward(params, dtype, plan, workspace, problem.stream);
      }
      return;
    }
#endif
    default:
      throw RuntimeError("this build of FlashCore has no CUDA code: install it without FLASHCORE_CUDA=OFF");
  }
}

void launch(const KvCacheProblem& problem, const Plan& plan, void* workspace) {
  static_cast<void>(workspace);  // the CPU needs none
  KvCacheParams const params = kvcache_params(problem);
  DType const dtype = problem.query.dtype;
  if (plan.backend == Backend::cpu) {
    cpu::forward_kvcache(params, dtype, plan);
    return;
  }
#if FLASHCORE_HAS_CUDA
  if (plan.blocks == 0) return;  // no queries and nothing to append
  CurrentDevice const current(problem.query.device.index);
#if FLASHCORE_HAS_SM90
  if (plan.backend == Backend::sm90) {
    sm90::decode(params, dtype, plan, workspace, problem.stream);
    return;
  }
#endif
  sm80::decode(params, dtype, plan, workspace, problem.stream);
#else
  throw RuntimeError("this build of FlashCore has no CUDA code: install it without FLASHCORE_CUDA=OFF");
#endif
}

void launch(const CombineProblem& problem) {
  Device const device = problem.out.device;
  if (device.type == DeviceType::cpu) {
    cpu::combine(problem);
    return;
  }
#if FLASHCORE_HAS_CUDA
  CurrentDevice const current(device.index);
  sm80::combine(problem);
#else
  throw RuntimeError("this build of FlashCore has no CUDA code: install it without FLASHCORE_CUDA=OFF");
#endif
}

void attention(const Problem& problem) {
  validate(problem);
  if (!problem.out.present()) throw ValueError("out: is missing; expected an array for the result");
  DeviceProperties const& device = device_properties(problem.query.device);
  if (problem.query.device.type == DeviceType::cpu || check_requested()) check_values(problem);
  launch(problem, recent_plan(problem, device));
}

}  // namespace flashcore

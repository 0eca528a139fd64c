// SPDX-License-Identifier: Apache-2.0
// From a Plan to a kernel: the one switch over machines.
#include <optional>
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

namespace {

// A forward kernel, on the current device where that is a GPU. `tma_output`: whether TMA takes the output's strides.
void launch_forward(const ForwardParams& params, DType dtype, const Plan& plan, [[maybe_unused]] void* workspace,
                    [[maybe_unused]] void* stream, [[maybe_unused]] bool tma_output) {
  switch (plan.backend) {
    case Backend::cpu:
      cpu::forward(params, dtype, plan);
      return;
#if FLASHCORE_HAS_CUDA
    case Backend::sm80:
      sm80::forward(params, dtype, plan, stream);
      return;
#endif
#if FLASHCORE_HAS_SM90
    case Backend::sm90:
      if (std::string_view(plan.kernel) == "sm90_small") {
        sm90::small(params, dtype, plan, stream);
      } else if (std::string_view(plan.kernel) == "sm90_stream") {
        sm90::stream(params, dtype, plan, tma_output, stream);
      } else {
        sm90::forward(params, dtype, plan, workspace, stream);
      }
      return;
#endif
    default:
      throw RuntimeError("this build of FlashCore has no CUDA code: install it without FLASHCORE_CUDA=OFF");
  }
}

}  // namespace

void launch(const Problem& problem, const Plan& plan, void* workspace) {
  if (plan.blocks == 0) return;  // no queries
  if (decodes(plan)) {
    bool const has_room = plan.workspace == 0 || workspace != nullptr;
    if (has_room) return launch(cache_of(problem), plan, workspace);
    return launch(problem, plan_forward(problem, device_properties(problem.query.device)));
  }
#if FLASHCORE_HAS_CUDA
  std::optional<CurrentDevice> current;
  if (plan.backend != Backend::cpu) current.emplace(problem.query.device.index);
#endif
  launch_forward(forward_params(problem), problem.query.dtype, plan, workspace, problem.stream,
                 tma_encodes(problem.out));
}

void launch(const KvCacheProblem& problem, const Plan& plan, void* workspace) {
  KvCacheParams const params = kvcache_params(problem);
  DType const dtype = problem.query.dtype;
  if (plan.backend == Backend::cpu) {
    cpu::forward_kvcache(params, dtype, plan);
    return;
  }
#if FLASHCORE_HAS_CUDA
  if (plan.blocks == 0) return;  // no queries and nothing to append
  CurrentDevice const current(problem.query.device.index);
  if (!decodes(plan)) {  // a prompt
    if (params.new_tokens > 0) sm80::append(params, problem.stream);
    ForwardParams forward = params;
    forward.seqused_k = params.cache_seqlens;
    forward.keys_added = params.new_tokens;
    if (problem.paged()) {
      int64_t const heads = int64_t{params.heads_k} * params.head_dim, sequence = params.seqlen_k * heads;
      void* const values = static_cast<char*>(workspace) + params.batch * sequence * 2;
      forward.k = {workspace, sequence, heads, params.head_dim};
      forward.v = {values, sequence, heads, params.head_dim};
      sm80::gather(params, workspace, values, problem.stream);
      workspace = nullptr;
    }
    launch_forward(forward, dtype, plan, workspace, problem.stream, tma_encodes(problem.out));
    return;
  }
#if FLASHCORE_HAS_SM90
  if (plan.backend == Backend::sm90) {
    sm90::decode(params, dtype, plan, workspace, problem.stream);
    return;
  }
#endif
  sm80::decode(params, dtype, plan, workspace, problem.stream);
#else
  static_cast<void>(workspace);
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

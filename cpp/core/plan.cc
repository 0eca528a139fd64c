// SPDX-License-Identifier: Apache-2.0
// Which kernel runs a problem: a pure function of the problem and the device's properties. Here the machine is chosen,
// and the choice put into words; plan_cpu.cc, plan_sm80.cc, plan_sm90.cc and plan_small.cc choose its tiles.
#include <optional>
#include <string_view>

#include "core/forward_plans.h"
#include "core/problem_facts.h"
#include "flashcore/flashcore.h"

namespace flashcore {
namespace {

// A build that leaves sm_90a out runs Hopper on the sm80 kernels. Without CUDA plan() tells what a whole build would
// do.
#if FLASHCORE_HAS_CUDA && !FLASHCORE_HAS_SM90
constexpr bool has_sm90 = false;
#else
constexpr bool has_sm90 = true;
#endif

bool tma_encodes(const Problem& problem) {
  return tma_encodes(problem.query) && tma_encodes(problem.key) && tma_encodes(problem.value);
}

}  // namespace

bool plain_score(const Problem& problem) { return problem.softcap == 0.0 && effective_scale(problem) > 1e-30; }

bool runs_sm90(const DeviceProperties& device) { return device.compute_capability == 90 && has_sm90; }

bool tma_encodes(const Tensor& tensor) {
  for (int i = 0; i + 1 < tensor.ndim; ++i) {
    if (tensor.shape[i] > 1 && (tensor.stride[i] < 0 || tensor.stride[i] >= tma_limit / tensor.dtype.bytes()))
      return false;
  }
  return true;
}

void check_gpu(const DeviceProperties& device, Backend backend) {
  if (backend == Backend::cpu) {
    throw ValueError("backend: got \"cpu\" for the device " + device.name + "; expected \"sm80\", \"sm90\" or None");
  }
  if (device.compute_capability < 80) {
    throw RuntimeError(device.name + " has compute capability " + capability(device) +
                       "; FlashCore's kernels need 8.0 (Ampere) or later: move the arrays to the CPU");
  }
}

void check_sm90(const DeviceProperties& device, bool tma_encodes) {
  if (!runs_sm90(device)) {
    throw RuntimeError("backend: got \"sm90\" for " + device.name + ", whose compute capability is " +
                       capability(device) +
                       (has_sm90 ? "; these kernels need 9.0 (Hopper)"
                                 : "; this build has no code for sm_90a (FLASHCORE_CUDA_ARCHS)"));
  }
  if (!tma_encodes) {
    throw ValueError(
        "backend: got \"sm90\" for arrays with strides that TMA cannot take (negative, or 2^40 bytes or more); "
        "expected \"sm80\" or None");
  }
}

std::string capability(const DeviceProperties& device) {
  return std::to_string(device.compute_capability / 10) + "." + std::to_string(device.compute_capability % 10);
}

Plan plan(const Problem& problem, const DeviceProperties& device) {
  Plan const forward = plan_forward(problem, device);
  return plan_few_queries(problem, device, forward).value_or(forward);
}

Plan plan_forward(const Problem& problem, const DeviceProperties& device) {
  if (device.type == DeviceType::cpu) {
    if (problem.backend == Backend::sm80 || problem.backend == Backend::sm90) {
      throw ValueError(std::string("backend: got \"") + to_string(problem.backend) +
                       "\" for the device cpu; expected \"cpu\" or None");
    }
    return plan_cpu(problem, device);
  }
  check_gpu(device, problem.backend);
  bool const hopper = runs_sm90(device);
  if (problem.backend == Backend::sm90) check_sm90(device, tma_encodes(problem));
  bool const wants_sm80 = problem.backend == Backend::sm80;
  return hopper && !wants_sm80 && tma_encodes(problem) ? plan_sm90(problem, device) : plan_sm80(problem, device);
}

std::string explain(const Problem& problem, const DeviceProperties& device, const Plan& plan) {
  if (decodes(plan)) return explain(cache_of(problem), device, plan);
  Sizes const s = sizes(problem);
  std::string const why = problem.backend == Backend::automatic ? "" : " (backend forced)";
  std::string text;
  if (plan.backend == Backend::cpu) {
    text = "The arrays are on the CPU" + why + ": tiles of " + std::to_string(plan.tile_q) + " queries and " +
           std::to_string(plan.tile_k) + " keys, divided over " + std::to_string(plan.threads) + " threads.";
  } else {
    bool const hopper = plan.backend == Backend::sm90;
    text = device.name + " has compute capability " + capability(device) + why + ": " +
           (hopper ? "wgmma" : "mma.sync") + " tiles of " + std::to_string(plan.tile_q) + " rows of queries and " +
           std::to_string(plan.tile_k) + " keys for head dimensions to " + std::to_string(plan.head_dim) +
           (plan.head_dim == s.head_dim ? "" : " (padded from " + std::to_string(s.head_dim) + ")") + ", " +
           std::to_string(plan.shared_memory / 1024) + " of " + std::to_string(device.shared_memory_per_block / 1024) +
           " KiB of shared memory a block.";
    text.append(explain_small(plan));
    if (hopper && std::string_view(plan.kernel) != "sm90_small") {
      text.append(" ").append(std::to_string(plan.blocks)).append(" blocks share ");
      text.append(std::to_string(plan.tiles)).append(" tiles.");
    }
    if (plan.packed_heads > 1) {
      text += " The rows of " + std::to_string(plan.packed_heads) + " query heads of a key head share a tile.";
    }
    if (plan.heads_per_section > 1) {
      text += " Longest tiles first among " + std::to_string(plan.heads_per_section) +
              " heads, whose keys and values share the L2 cache.";
    }
  }
  if (plan.backend == Backend::sm80 && problem.backend == Backend::automatic && runs_sm90(device)) {
    text += " TMA cannot take the arrays' strides (negative, or 2^40 bytes or more): the sm80 kernel does.";
  }
  if (!plan.plain_score)
    text += problem.softcap > 0 ? " Scores are capped." : " The scale is not positive: scores are scaled one by one.";
  return text;
}

}  // namespace flashcore

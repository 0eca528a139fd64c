// SPDX-License-Identifier: Apache-2.0
// Small facts of a Problem that several parts of the core share.
#pragma once

#include <cstdint>
#include <optional>
#include <string>

#include "flashcore/kvcache.h"
#include "flashcore/plan.h"
#include "flashcore/problem.h"

namespace flashcore {

// "cpu", "sm80", "sm90"
char const* to_string(Backend backend);

// The scale that the scores get: the problem's, or 1 / sqrt(head_dim).
double effective_scale(const Problem& problem);

// Whether the scores are only multiplied by a positive scale, which the exponent's multiplication takes over. A scale
// so small that the product with the score's factor is subnormal goes the general way, like zero and negative ones.
bool plain_score(const Problem& problem);

// The options of a problem over a cache and its arrays as if the cache were its keys and values.
Problem options_of(const KvCacheProblem& problem);

// The same as a problem of the forward kernels, which the cache's lengths go with, for plan_forward() and explain(). Of
// a cache in pages as if these had been brought together.
Problem forward_of(const KvCacheProblem& problem);

// The axis of tokens in an array of four dimensions.
inline int sequence_axis(Layout layout) { return layout == Layout::bshd ? 1 : 2; }

// "9.0"
std::string capability(const DeviceProperties& device);

// Whether the device runs the sm90 kernels of this build.
bool runs_sm90(const DeviceProperties& device);

// TMA takes strides from 0 to below this, in bytes.
constexpr int64_t tma_limit = int64_t{1} << 40;

// Whether TMA takes an array's strides.
bool tma_encodes(const Tensor& tensor);

// Throws where the device is a GPU that no kernel runs on, or where the CPU's backend is asked for on it.
void check_gpu(const DeviceProperties& device, Backend backend);

// What backend="sm90" needs of device and strides, as an error: RuntimeError, ValueError.
void check_sm90(const DeviceProperties& device, bool tma_encodes);

// Whether a plan is one of the decode kernels', and not a forward kernel's.
bool decodes(const Plan& plan);

// A problem over a cache with the arrays and options of `problem`, whose keys and values are the caches. Without
// cache_seqlens, which the caller may add, all of them count.
KvCacheProblem cache_of(const Problem& problem);

// Few queries with many keys: the decode kernels' plan for cache_of() the problem, where it is faster than `forward`,
// which is plan_forward()'s.
std::optional<Plan> plan_few_queries(const Problem& problem, const DeviceProperties& device, const Plan& forward);

// As plan(), but never a decode kernel's, which may need a workspace.
Plan plan_forward(const Problem& problem, const DeviceProperties& device);

// Into how many parts the CPU divides the keys of a problem of fixed length.
int cpu_splits(const Sizes& sizes, Layout layout);

}  // namespace flashcore

// SPDX-License-Identifier: Apache-2.0
// The sm90 machine as the core sees it: attention by wgmma and TMA, for compute capability 9.0.
#pragma once

#include "core/forward_params.h"
#include "core/kvcache_params.h"
#include "flashcore/plan.h"
#include "flashcore/problem.h"

namespace flashcore::sm90 {

// Launches `plan` on the current device. `workspace`: plan.workspace bytes there, or null, as in launch().
// Asynchronous. Throws RuntimeError when the launch fails.
void forward(ForwardParams params, DType dtype, const Plan& plan, void* workspace, void* stream);

// The same for a plan of the kernel for small problems, "sm90_small".
void small(const ForwardParams& params, DType dtype, const Plan& plan, void* stream);

// The same for a plan of the kernel "sm90_stream". `stores_by_tma`: whether TMA takes the output's strides.
void stream(const ForwardParams& params, DType dtype, const Plan& plan, bool stores_by_tma, void* stream);

// Attention over a cache, for a plan of "sm90_decode" or "sm90_decode_turned".
void decode(const KvCacheParams& params, DType dtype, const Plan& plan, void* workspace, void* stream);

}  // namespace flashcore::sm90

// SPDX-License-Identifier: Apache-2.0
// The sm80 machine as the core sees it: attention by mma.sync and cp.async, for compute capability 8.0 and later.
#pragma once

#include "core/forward_params.h"
#include "flashcore/plan.h"
#include "flashcore/problem.h"

namespace flashcore::sm80 {

// Launches `plan` on the current device. Asynchronous. Throws RuntimeError when the launch fails.
void forward(const ForwardParams& params, DType dtype, const Plan& plan, void* stream);

// Merges partial results on the current device. Asynchronous. Throws RuntimeError when the launch fails.
void combine(const CombineProblem& problem);

}  // namespace flashcore::sm80

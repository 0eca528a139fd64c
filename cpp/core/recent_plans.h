// SPDX-License-Identifier: Apache-2.0
// plan(), remembered: programs call with the same few problems over and over.
#pragma once

#include "flashcore/kvcache.h"
#include "flashcore/plan.h"
#include "flashcore/problem.h"

namespace flashcore {

// plan(problem, device), from this thread's last plans where one of them was for the same problem but for the places of
// its arrays. Throws what plan() throws.
Plan recent_plan(const Problem& problem, const DeviceProperties& device);
Plan recent_plan(const KvCacheProblem& problem, const DeviceProperties& device);

}  // namespace flashcore

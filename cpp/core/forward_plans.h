// SPDX-License-Identifier: Apache-2.0
// The parts of plan_forward(): a plan of each machine's forward kernels.
#pragma once

#include <optional>
#include <string>

#include "flashcore/plan.h"
#include "flashcore/problem.h"

namespace flashcore {

Plan plan_cpu(const Problem& problem, const DeviceProperties& device);
Plan plan_sm80(const Problem& problem, const DeviceProperties& device);
Plan plan_sm90(const Problem& problem, const DeviceProperties& device);

// For plan_sm90(). The small or the stream kernel's plan where it is chosen or forced. Not for sequences that have to
// get the same bits in every batch: the choice depends on how many there are.
std::optional<Plan> plan_small(const Problem& problem, const DeviceProperties& device);

// What explain() says of a plan of plan_small()'s, for the stream kernel up to the number of blocks; nothing of other
// plans.
std::string explain_small(const Plan& plan);

}  // namespace flashcore

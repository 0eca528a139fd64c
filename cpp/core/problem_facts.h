// SPDX-License-Identifier: Apache-2.0
// Small facts of a Problem that several parts of the core share.
#pragma once

#include "flashcore/problem.h"

namespace flashcore {

// "cpu", "sm80", "sm90"
char const* to_string(Backend backend);

// The scale that the scores get: the problem's, or 1 / sqrt(head_dim).
double effective_scale(const Problem& problem);

}  // namespace flashcore

// SPDX-License-Identifier: Apache-2.0
// The ladder: attention kernels from the plainest to nearly the library's own, each one idea further than the one
// before. Built into flashcore_bench only. README.md in this folder tells what each idea gains.
#pragma once

#include <string>
#include <vector>

#include "core/forward_params.h"
#include "flashcore/plan.h"
#include "flashcore/tensor.h"

namespace flashcore::ladder {

// A problem is what a ForwardParams says: fixed lengths, float16 or bfloat16, head dimension 64 or 128, no softcap, a
// positive scale; masks, grouped heads and differing lengths work on every rung. Each function launches on the current
// device and `stream` (a cudaStream_t), asynchronously, and throws RuntimeError when the launch fails.
using Run = void(const ForwardParams& params, DType dtype, void* stream);

Run baseline, vectorized, single_query_mma, register_fusion, multi_query, multi_query_mma, parallel_reductions,
    fused_tiles;

struct Rung {
  const char* name;
  Run* run;
  bool keeps_all_scores;  // of a query, in shared memory: the number of keys is limited
  const char* note;       // what is new, in a line
};

// The rungs, lowest first.
const std::vector<Rung>& rungs();

// Why the rung does not run this problem on this device; empty where it does.
std::string refusal(const Rung& rung, const ForwardParams& params, DType dtype, const DeviceProperties& device);

}  // namespace flashcore::ladder

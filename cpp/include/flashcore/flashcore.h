// SPDX-License-Identifier: Apache-2.0
// FlashCore's C++ interface: Problem -> validate -> plan -> launch. No Python, no framework, no CUDA headers.
#pragma once

#include <string>
#include <vector>

#include "flashcore/error.h"
#include "flashcore/kvcache.h"
#include "flashcore/plan.h"
#include "flashcore/problem.h"
#include "flashcore/tensor.h"

namespace flashcore {

// "0.1.0"
const char* version();

// Refuses everything that a kernel could not do right; after it nothing checks again. Never touches device memory.
// Throws TypeError, ValueError. `out` and `lse` are checked where present.
void validate(const Problem& problem);
void validate(const CombineProblem& problem);

// Checks the values inside cu_seqlens_* and seqused_k. For CPU arrays it reads them; for CUDA arrays it copies them
// and synchronizes the stream, so it is illegal while capturing a graph. Throws ValueError that names the sequence.
void check_values(const Problem& problem);

// Chooses kernel, tiles and grid. A pure function, of nothing but what core/recent_plans.cc remembers a plan by; the
// problem has passed validate(). Throws RuntimeError for a GPU that this build has no code for, ValueError for a forced
// backend that cannot run the problem.
Plan plan(const Problem& problem, const DeviceProperties& device);

// Runs the plan on the problem's device and stream: asynchronous on CUDA, complete on return on the CPU. Allocates
// nothing; `workspace` holds plan.workspace bytes on the device, which no other call may use until the stream has
// passed this one; null gives the same result, but with tiles of uneven length spread less evenly over the
// multiprocessors, and the many keys of a few queries not divided at all.
// Throws RuntimeError when the launch fails.
void launch(const Problem& problem, const Plan& plan, void* workspace = nullptr);
void launch(const CombineProblem& problem);

// validate, check_values (CPU arrays, or FLASHCORE_CHECK=1), plan and launch without a workspace in one call.
void attention(const Problem& problem);

// Whether FLASHCORE_CHECK=1 asks for check_values on CUDA arrays.
bool check_requested();

// Facts about this build and process, for info().
struct BuildInfo {
  bool cuda = false;                    // built with CUDA code
  std::vector<std::string> cuda_archs;  // "sm_80", "sm_90", "compute_80"; from the build
  int cuda_runtime_version = 0;         // 13000, ...; 0 without CUDA
  int cuda_driver_version = 0;          // what the installed driver supports; 0 without a driver
  std::string cuda_problem;             // why CUDA devices cannot be used although some may be there; else empty
  std::vector<std::string> cpu_isas;    // compiled in, worst first: "baseline", "avx2", ..., "avx512amx"
  std::string cpu_isa;                  // chosen for this processor (or by FLASHCORE_CPU_ISA)
};
BuildInfo build_info();

// Threads that the CPU backend uses: OMP_NUM_THREADS, else the processors this process may run on.
int num_threads();
// Throws ValueError for a number below 1.
void set_num_threads(int threads);

}  // namespace flashcore

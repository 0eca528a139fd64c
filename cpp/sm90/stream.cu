// SPDX-License-Identifier: Apache-2.0
// The stream kernel's instances, and from a plan to them.
#include "flashcore/error.h"
#include "sm90/sm90.h"
#include "sm90/stream_kernel.cuh"

namespace flashcore::sm90 {

void stream(const ForwardParams& params, DType dtype, const Plan& plan, bool stores_by_tma, void* stream) {
  auto const s = static_cast<cudaStream_t>(stream);
  auto const run = [&]<int warpgroups>() {
    if (dtype == float16) {
      run_stream<StreamConfig<__half, warpgroups>>(params, plan, stores_by_tma, s);
    } else {
      run_stream<StreamConfig<__nv_bfloat16, warpgroups>>(params, plan, stores_by_tma, s);
    }
  };
  switch (plan.tile_q) {
    case 128: return run.template operator()<2>();
    case 256: return run.template operator()<4>();
    default: throw RuntimeError("the plan names no stream sm90 kernel of this build; plan() makes plans that do");
  }
}

}  // namespace flashcore::sm90

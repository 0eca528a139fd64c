// SPDX-License-Identifier: Apache-2.0
// The stream kernel's two instances, and from a plan to them.
#include "sm90/stream_kernel.cuh"

#include "sm90/sm90.h"

namespace flashcore::sm90 {

void stream(const ForwardParams& params, DType dtype, const Plan& plan, bool stores_by_tma, void* stream) {
  auto const s = static_cast<cudaStream_t>(stream);
  if (dtype == float16) {
    run_stream<StreamConfig<__half>>(params, plan, stores_by_tma, s);
  } else {
    run_stream<StreamConfig<__nv_bfloat16>>(params, plan, stores_by_tma, s);
  }
}

}  // namespace flashcore::sm90

// SPDX-License-Identifier: Apache-2.0
// The values inside cu_seqlens_q, cu_seqlens_k and seqused_k. validate() never reads them: on a GPU that would cost a
// synchronization, so kernels clamp them and this check runs only where it is asked for.
#include <string>
#include <vector>

#include "flashcore/flashcore.h"

#if FLASHCORE_HAS_CUDA
#include "core/cuda_check.h"
#endif

namespace flashcore {
namespace {

std::vector<int32_t> values_of(const Tensor& t, void* stream) {
  std::vector<int32_t> values(static_cast<size_t>(t.shape[0]));
  if (values.empty()) return values;
  if (t.device.type == DeviceType::cpu) {
    auto const* const data = static_cast<int32_t const*>(t.data);
    values.assign(data, data + values.size());
    return values;
  }
#if FLASHCORE_HAS_CUDA
  CurrentDevice const current(t.device.index);
  auto const s = static_cast<cudaStream_t>(stream);
  cudaStreamCaptureStatus capture = cudaStreamCaptureStatusNone;
  cuda_check(cudaStreamIsCapturing(s, &capture), "FLASHCORE_CHECK");
  if (capture != cudaStreamCaptureStatusNone) cuda_check(cudaErrorStreamCaptureUnsupported, "FLASHCORE_CHECK");
  cuda_check(cudaMemcpyAsync(values.data(), t.data, values.size() * sizeof(int32_t), cudaMemcpyDeviceToHost, s),
             "FLASHCORE_CHECK: reading lengths");
  cuda_check(cudaStreamSynchronize(s), "FLASHCORE_CHECK: reading lengths");
#else
  static_cast<void>(stream);
#endif
  return values;
}

void check_cumulative(const char* name, const std::vector<int32_t>& cu, int64_t total) {
  if (cu[0] != 0)
    throw ValueError(std::string(name) + ": starts at " + std::to_string(cu[0]) + " for sequence 0; expected 0");
  for (size_t b = 0; b + 1 < cu.size(); ++b) {
    if (cu[b + 1] < cu[b]) {
      throw ValueError(std::string(name) + ": decreases from " + std::to_string(cu[b]) + " to " +
                       std::to_string(cu[b + 1]) + " at sequence " + std::to_string(b) +
                       "; expected values that never decrease");
    }
    if (cu[b + 1] > total) {
      throw ValueError(std::string(name) + ": sequence " + std::to_string(b) + " ends at " + std::to_string(cu[b + 1]) +
                       ", beyond the array's " + std::to_string(total) + " tokens; expected at most as many");
    }
  }
}

}  // namespace

void check_values(const Problem& problem) {
  if (!problem.varlen()) return;
  Sizes const s = sizes(problem);
  check_cumulative("cu_seqlens_q", values_of(problem.cu_seqlens_q, problem.stream), s.total_q);
  auto const cu_k = values_of(problem.cu_seqlens_k, problem.stream);
  check_cumulative("cu_seqlens_k", cu_k, s.total_k);
  if (!problem.seqused_k.present()) return;
  auto const used = values_of(problem.seqused_k, problem.stream);
  for (size_t b = 0; b < used.size(); ++b) {
    if (used[b] < 0 || used[b] > cu_k[b + 1] - cu_k[b]) {
      throw ValueError("seqused_k: got " + std::to_string(used[b]) + " for sequence " + std::to_string(b) +
                       ", which has " + std::to_string(cu_k[b + 1] - cu_k[b]) + " keys; expected 0 to as many");
    }
  }
}

}  // namespace flashcore

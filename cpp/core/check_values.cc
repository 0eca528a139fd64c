// SPDX-License-Identifier: Apache-2.0
// The values inside cu_seqlens_q, cu_seqlens_k, seqused_k, cache_seqlens and page_table. validate() never reads them:
// on a GPU that would cost a synchronization, so kernels clamp them and this check runs only where it is asked for.
#include <algorithm>
#include <string>
#include <vector>

#include "core/problem_facts.h"
#include "flashcore/flashcore.h"

#if FLASHCORE_HAS_CUDA
#include "core/cuda_check.h"
#endif

namespace flashcore {
namespace {

// The elements of a tensor of one or two dimensions, whose last stride is 1.
std::vector<int32_t> values_of(const Tensor& t, void* stream) {
  int64_t const rows = t.ndim > 1 ? t.shape[0] : 1, columns = t.shape[t.ndim - 1];
  int64_t const stride = rows > 1 ? t.stride[0] : columns;
  std::vector<int32_t> values(static_cast<size_t>(rows * columns));
  if (values.empty()) return values;
  auto const* const data = static_cast<int32_t const*>(t.data);
  if (t.device.type == DeviceType::cpu) {
    for (int64_t i = 0; i < rows; ++i) std::copy_n(data + i * stride, columns, values.data() + i * columns);
    return values;
  }
#if FLASHCORE_HAS_CUDA
  CurrentDevice const current(t.device.index);
  auto const s = static_cast<cudaStream_t>(stream);
  cudaStreamCaptureStatus capture = cudaStreamCaptureStatusNone;
  cuda_check(cudaStreamIsCapturing(s, &capture), "FLASHCORE_CHECK");
  if (capture != cudaStreamCaptureStatusNone) cuda_check(cudaErrorStreamCaptureUnsupported, "FLASHCORE_CHECK");
  for (int64_t i = 0; i < rows; ++i) {
    cuda_check(cudaMemcpyAsync(values.data() + i * columns, data + i * stride, columns * sizeof(int32_t),
                               cudaMemcpyDeviceToHost, s),
               "FLASHCORE_CHECK: reading lengths");
  }
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

void check_values(const KvCacheProblem& problem) {
  Sizes const s = sizes(problem);
  int64_t const appended = new_tokens(problem);
  auto const lengths = values_of(problem.cache_seqlens, problem.stream);
  for (size_t b = 0; b < lengths.size(); ++b) {
    if (lengths[b] < 0 || lengths[b] + appended > s.seqlen_k) {
      std::string text = "cache_seqlens: got " + std::to_string(lengths[b]) + " for sequence " + std::to_string(b);
      text.append(", whose part of the cache holds ").append(std::to_string(s.seqlen_k)).append(" tokens");
      if (appended > 0) text.append(", ").append(std::to_string(appended)).append(" of them new");
      throw ValueError(text + "; expected 0 to as many");
    }
  }
  if (!problem.paged()) return;
  auto const table = values_of(problem.page_table, problem.stream);
  int64_t const columns = problem.page_table.shape[1], pages = problem.key_cache.shape[0];
  int64_t const page_size = problem.key_cache.shape[sequence_axis(problem.layout)];
  for (size_t b = 0; b < lengths.size(); ++b) {
    int64_t const used = (lengths[b] + appended + page_size - 1) / page_size;
    for (int64_t i = 0; i < used; ++i) {
      int32_t const page = table[b * static_cast<size_t>(columns) + static_cast<size_t>(i)];
      if (page < 0 || page >= pages) {
        throw ValueError("page_table: got page " + std::to_string(page) + " at place " + std::to_string(i) +
                         " of sequence " + std::to_string(b) + ", the cache has " + std::to_string(pages) +
                         " pages; expected 0 to " + std::to_string(pages - 1));
      }
    }
  }
}

}  // namespace flashcore

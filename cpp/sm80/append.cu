// SPDX-License-Identifier: Apache-2.0
// The new keys and values of prompts go to their places in the cache, before a forward kernel reads them there. (The
// decode kernels append by themselves.)
#include <cuda_fp16.h>

#include <algorithm>

#include "core/cuda_check.h"
#include "sm80/decode.h"
#include "sm80/decode_rows.cuh"

namespace flashcore::sm80 {
namespace {

constexpr int threads = 256;

__global__ void __launch_bounds__(threads) append_kernel(__grid_constant__ KvCacheParams const p) {
  append<__half>(p, threads);  // whichever element of two bytes
}

}  // namespace

void append(const KvCacheParams& params, void* stream) {
  int64_t const chunks = int64_t{params.batch} * params.new_tokens * params.heads_k * (params.head_dim / 8);
  if (chunks == 0) return;
  constexpr int64_t most_blocks = 1024;  // a few rounds of the largest GPUs
  auto const blocks = static_cast<unsigned>(std::min(most_blocks, (chunks + threads - 1) / threads));
  append_kernel<<<blocks, threads, 0, static_cast<cudaStream_t>(stream)>>>(params);
  cuda_check(cudaGetLastError(), "launching the kernel that appends to a cache");
}

}  // namespace flashcore::sm80

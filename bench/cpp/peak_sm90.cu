// SPDX-License-Identifier: Apache-2.0
// The loop of Hopper's wgmma products, whose rate is the peak of its tensor cores: mma.sync does not reach it.
#include "core/cuda_check.h"
#include "gpu_kernels.h"
#include "random.h"
#include "sm90/tensor_core.h"

namespace flashcore::bench {
namespace {

constexpr int warpgroups = 2, threads = 128 * warpgroups;
constexpr int n = 256, columns = 64;  // of the right operand's rows; of both operands
constexpr int batch = 4;              // walks through the operands between two waits
constexpr int left_bytes = 64 * columns * 2, right_bytes = n * columns * 2;
constexpr int shared_memory = warpgroups * left_bytes + right_bytes + 1024;

__global__ void __launch_bounds__(threads, 1) wgmma_kernel(int repetitions, float* scratch) {
  extern __shared__ char memory[];
  uint32_t const start = static_cast<uint32_t>(__cvta_generic_to_shared(memory));
  uint32_t const base = (start + 1023) / 1024 * 1024;
  auto* const operands = reinterpret_cast<__half*>(memory + (base - start));
  for (int i = threadIdx.x; i < (warpgroups * left_bytes + right_bytes) / 2; i += threads) {
    operands[i] = __float2half_rn(normal(1, uint64_t{blockIdx.x} << 32 | i));
  }
  asm volatile("fence.proxy.async.shared::cta;" ::: "memory");  // the products read what was just written
  __syncthreads();
  uint64_t const left = sm90::operand(base + threadIdx.x / 128 * left_bytes, 0);
  uint64_t const right = sm90::operand(base + warpgroups * left_bytes, 0);
  float c[n / 2] = {};
  for (int i = 0; i < repetitions; ++i) {
    sm90::hold(c);
    cute::warpgroup_arrive();
#pragma unroll
    for (int k = 0; k < batch * columns / 16; ++k) {  // of each next one the operands are 32 bytes to the right
      sm90::multiply_keys<__half, n>(c, left + 2 * (k % (columns / 16)), right + 2 * (k % (columns / 16)), true);
    }
    cute::warpgroup_commit_batch();
    cute::warpgroup_wait<0>();  // the other warpgroup's products fill the gap
    sm90::hold(c);
  }
  float sum = 0;
#pragma unroll
  for (float const x : c) sum += x;
  if (sum == 0x1p126f) *scratch = sum;  // never: keeps the products
}

}  // namespace

double wgmma_loop(int multiprocessors, int repetitions, void* scratch, cudaStream_t stream) {
  cuda_check(cudaFuncSetAttribute(wgmma_kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, shared_memory),
             "preparing the loop of wgmma products");
  wgmma_kernel<<<multiprocessors, threads, shared_memory, stream>>>(repetitions, static_cast<float*>(scratch));
  cuda_check(cudaGetLastError(), "launching the loop of wgmma products");
  return 2.0 * 64 * n * columns * batch * repetitions * warpgroups * multiprocessors;
}

}  // namespace flashcore::bench

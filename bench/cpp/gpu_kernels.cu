// SPDX-License-Identifier: Apache-2.0
// Random inputs on the GPU; the loops of mma.sync products, copying and reading.
#include "gpu_kernels.h"

#include "core/cuda_check.h"
#include "random.h"
#include "sm80/tensor_core.h"

namespace flashcore::bench {
namespace {

template <class Element>
__global__ void fill_kernel(Element* to, int64_t count, uint64_t seed, int64_t row_length) {
  int64_t const step = int64_t{gridDim.x} * blockDim.x;
  for (int64_t i = int64_t{blockIdx.x} * blockDim.x + threadIdx.x; i < count; i += step) {
    float const x = normal(seed, i) * (row_length > 0 ? row_scale(i / row_length) : 1.0f);
    if constexpr (std::is_same_v<Element, __half>)
      to[i] = __float2half_rn(x);
    else
      to[i] = __float2bfloat16_rn(x);
  }
}

constexpr int mma_threads = 256, accumulators = 8;

__device__ uint64_t nanoseconds() {
  uint64_t t;
  asm volatile("mov.u64 %0, %%globaltimer;" : "=l"(t));
  return t;
}

// Eight sums a warp, so that no product waits for the one before. Operands are random: zeros take less power.
__global__ void __launch_bounds__(mma_threads) mma_kernel(int repetitions, uint64_t* ticks) {
  uint32_t a[4], b[2];
  uint64_t const index = uint64_t{blockIdx.x} * mma_threads + threadIdx.x;
  auto const pair = [&](int i) {
    return sm80::Precision<__half>::pack(normal(1, index * 12 + 2 * i), normal(1, index * 12 + 2 * i + 1));
  };
  for (int i = 0; i < 4; ++i) a[i] = pair(i);
  for (int i = 0; i < 2; ++i) b[i] = pair(4 + i);
  float c[accumulators][4] = {};
  __syncthreads();
  bool const first = index == 0;
  uint64_t const clock = clock64(), time = nanoseconds();
  for (int i = 0; i < repetitions; ++i) {
#pragma unroll
    for (int n = 0; n < accumulators; ++n) sm80::multiply<__half>(c[n], a, b[0], b[1]);
  }
  float sum = 0;
  for (auto const& x : c) sum += x[0] + x[1] + x[2] + x[3];
  if (first || sum == 0x1p126f) {  // the second never: keeps the products
    ticks[0] = clock64() - clock;
    ticks[1] = nanoseconds() - time;
  }
}

__global__ void copy_kernel(uint4* to, uint4 const* from, size_t count) {
  size_t const step = size_t{gridDim.x} * blockDim.x;
#pragma unroll 4
  for (size_t i = size_t{blockIdx.x} * blockDim.x + threadIdx.x; i < count; i += step) to[i] = from[i];
}

__global__ void read_kernel(uint4* scratch, uint4 const* from, size_t count) {
  size_t const step = size_t{gridDim.x} * blockDim.x;
  uint32_t all = 0;
#pragma unroll 8
  for (size_t i = size_t{blockIdx.x} * blockDim.x + threadIdx.x; i < count; i += step) {
    uint4 const x = from[i];
    all |= x.x ^ x.y ^ x.z ^ x.w;
  }
  if (all == 0x12345678) *scratch = {all, 0, 0, 0};
}

constexpr int stream_threads = 512, stream_blocks = 4;  // of a multiprocessor: as many threads as it holds

}  // namespace

void fill_on_gpu(void* to, DType dtype, int64_t count, uint64_t seed, int64_t row_length, cudaStream_t stream) {
  auto const blocks = static_cast<unsigned>(count / 1024 < 4096 ? count / 1024 + 1 : 4096);
  if (dtype == float16)
    fill_kernel<<<blocks, 256, 0, stream>>>(static_cast<__half*>(to), count, seed, row_length);
  else
    fill_kernel<<<blocks, 256, 0, stream>>>(static_cast<__nv_bfloat16*>(to), count, seed, row_length);
  cuda_check(cudaGetLastError(), "filling an array with random numbers");
}

double mma_loop(int multiprocessors, int repetitions, uint64_t* ticks, cudaStream_t stream) {
  int const blocks = 2 * multiprocessors;
  mma_kernel<<<blocks, mma_threads, 0, stream>>>(repetitions, ticks);
  cuda_check(cudaGetLastError(), "launching the loop of products");
  return 2.0 * 16 * 8 * 16 * accumulators * repetitions * (mma_threads / 32) * blocks;
}

void copy_bytes(void* to, const void* from, size_t bytes, int multiprocessors, cudaStream_t stream) {
  copy_kernel<<<stream_blocks * multiprocessors, stream_threads, 0, stream>>>(
      static_cast<uint4*>(to), static_cast<uint4 const*>(from), bytes / 16);
  cuda_check(cudaGetLastError(), "launching the copy");
}

void read_bytes(void* scratch, const void* from, size_t bytes, int multiprocessors, cudaStream_t stream) {
  read_kernel<<<stream_blocks * multiprocessors, stream_threads, 0, stream>>>(
      static_cast<uint4*>(scratch), static_cast<uint4 const*>(from), bytes / 16);
  cuda_check(cudaGetLastError(), "launching the read");
}

#if !FLASHCORE_HAS_SM90
double wgmma_loop(int, int, void*, cudaStream_t) { return 0; }
#endif

}  // namespace flashcore::bench

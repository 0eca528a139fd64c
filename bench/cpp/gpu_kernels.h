// SPDX-License-Identifier: Apache-2.0
// The benchmark's own kernels: random inputs, and loops that do one thing as fast as the GPU can.
#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>

#include "flashcore/tensor.h"

namespace flashcore::bench {

// `count` elements of float16 or bfloat16; with row_length > 0 each row times row_scale().
void fill_on_gpu(void* to, DType dtype, int64_t count, uint64_t seed, int64_t row_length, cudaStream_t stream);

// Tensor-core products from registers, float16 to float32: returns the floating-point operations. ticks[0] and [1]:
// clocks of a multiprocessor, nanoseconds.
double mma_loop(int multiprocessors, int repetitions, uint64_t* ticks, cudaStream_t stream);

// The same by wgmma, from shared memory; 0 where this build has none.
double wgmma_loop(int multiprocessors, int repetitions, void* scratch, cudaStream_t stream);

// `bytes` a multiple of 16. The read's result is written nowhere, but the compiler does not know.
void copy_bytes(void* to, const void* from, size_t bytes, int multiprocessors, cudaStream_t stream);
void read_bytes(void* scratch, const void* from, size_t bytes, int multiprocessors, cudaStream_t stream);

}  // namespace flashcore::bench

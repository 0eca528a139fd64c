// SPDX-License-Identifier: Apache-2.0
// Programmatic dependent launch: a kernel's blocks start as soon as there is room for them and every block of the
// kernel before has let them, and wait for the end of that kernel before they read or write an array. A kernel that
// lets go early may be followed by one that does, too: each waits for the whole of the one before, which waited for the
// one before that.
#pragma once

#include <cuda_runtime.h>

#include "attention/dependent.cuh"
#include "core/cuda_check.h"
#include "core/forward_params.h"

namespace flashcore::sm90 {

// Asks for a row of an array, `lines` times 128 bytes, to be brought into the L2 cache. All kernels share that, so this
// may be done while the kernel before still writes the array.
template <class Element, int lines, class Pointer>
__device__ __forceinline__ void prefetch_row(Rows<Pointer> const& rows, int sequence, int head, int row) {
  constexpr int elements = 128 / sizeof(Element);
  int64_t const at = sequence * rows.batch_stride + head * rows.head_stride + row * rows.row_stride;
#pragma unroll
  for (int line = 0; line < lines; ++line) {
    asm volatile("prefetch.global.L2 [%0];" ::"l"(static_cast<Element const*>(rows.data) + at + line * elements));
  }
}

// How a kernel that waits for its prerequisites is launched.
struct DependentLaunch {
  dim3 grid;
  int threads, shared_memory;
  int cluster;  // blocks of a cluster, along x
  bool early;   // whether blocks may start while the kernel before ends
};

template <class Arguments>
void launch_dependent(void (*kernel)(Arguments), DependentLaunch const& launch, cudaStream_t stream,
                      Arguments const& arguments, const char* doing) {
  cudaLaunchAttribute attributes[2] = {};
  attributes[0].id = cudaLaunchAttributeProgrammaticStreamSerialization;
  attributes[0].val.programmaticStreamSerializationAllowed = launch.early;
  attributes[1].id = cudaLaunchAttributeClusterDimension;
  attributes[1].val.clusterDim = {static_cast<unsigned>(launch.cluster), 1, 1};
  cudaLaunchConfig_t config = {};
  config.gridDim = launch.grid;
  config.blockDim = dim3(static_cast<unsigned>(launch.threads));
  config.dynamicSmemBytes = static_cast<size_t>(launch.shared_memory);
  config.stream = stream;
  config.attrs = attributes;
  config.numAttrs = launch.cluster > 1 ? 2 : 1;
  cuda_check(cudaLaunchKernelEx(&config, kernel, arguments), doing);
}

}  // namespace flashcore::sm90

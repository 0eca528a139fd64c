// SPDX-License-Identifier: Apache-2.0
// The two instructions of programmatic dependent launch (compute capability 9.0, in code compiled for it; nothing
// elsewhere): a kernel's blocks start while the kernel before still runs, and wait for the end of all of it.
#pragma once

namespace flashcore {

// Lets the next kernel of the stream be launched, and waits until the one before has finished and its writes are seen.
__device__ __forceinline__ void launch_dependents() {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.launch_dependents;" ::: "memory");
#endif
}
__device__ __forceinline__ void wait_for_prerequisites() {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
}

}  // namespace flashcore

// SPDX-License-Identifier: Apache-2.0
// CUDA's errors in FlashCore's words.
#if FLASHCORE_HAS_CUDA
#include "core/cuda_check.h"

#include <string>

#include "flashcore/error.h"

namespace flashcore {

void cuda_check(cudaError_t status, const char* doing) {
  if (status == cudaSuccess) return;
  cudaGetLastError();  // an error of this call is not the next one's
  std::string text = std::string(doing) + ": " + cudaGetErrorString(status) + " (" + cudaGetErrorName(status) + ").";
  switch (status) {
    case cudaErrorInsufficientDriver:
      text += " FlashCore is built with CUDA 13 and needs NVIDIA driver R580 or later: update the driver.";
      break;
    case cudaErrorNoKernelImageForDevice:
    case cudaErrorInvalidDeviceFunction:
    case cudaErrorUnsupportedPtxVersion:
      text += " This build has code for " FLASHCORE_CUDA_ARCHS
              ": build FlashCore from source with FLASHCORE_CUDA_ARCHS naming this GPU.";
      break;
    case cudaErrorMemoryAllocation:
      text += " The GPU is out of memory: free some, or split the batch.";
      break;
    case cudaErrorNoDevice:
      text += " No CUDA device is visible: see nvidia-smi and CUDA_VISIBLE_DEVICES.";
      break;
    case cudaErrorStreamCaptureUnsupported:
    case cudaErrorStreamCaptureInvalidated:
    case cudaErrorStreamCaptureImplicit:
      text += " This cannot be done while a CUDA graph is being captured: unset FLASHCORE_CHECK there.";
      break;
    default:
      break;
  }
  throw RuntimeError(text);
}

CurrentDevice::CurrentDevice(int device) : before_(device), device_(device) {
  cuda_check(cudaGetDevice(&before_), "asking for the current CUDA device");
  if (before_ != device_) cuda_check(cudaSetDevice(device_), "choosing the CUDA device");
}

CurrentDevice::~CurrentDevice() {
  if (before_ != device_) cudaSetDevice(before_);
}

}  // namespace flashcore
#endif  // FLASHCORE_HAS_CUDA

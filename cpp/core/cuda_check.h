// SPDX-License-Identifier: Apache-2.0
// CUDA status codes as FlashCore's errors, saying what to do about them; and the current device as a scope.
#pragma once

#include <cuda_runtime_api.h>

namespace flashcore {

// Throws RuntimeError unless `status` is cudaSuccess. `doing` says what was being done: "launching the sm80 kernel".
void cuda_check(cudaError_t status, const char* doing);

// Makes `device` the current one of this thread, and the one before it again at the end.
class CurrentDevice {
 public:
  explicit CurrentDevice(int device);
  ~CurrentDevice();
  CurrentDevice(const CurrentDevice&) = delete;
  CurrentDevice& operator=(const CurrentDevice&) = delete;

 private:
  int before_, device_;
};

}  // namespace flashcore

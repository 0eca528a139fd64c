// SPDX-License-Identifier: Apache-2.0
// DLPack's structures as FlashCore's values and back; no Python in here.
#pragma once

#include <dlpack/dlpack.h>

#include <cstdint>
#include <utility>

#include "flashcore/tensor.h"

namespace flashcore::dlpack {

DType dtype_of(DLDataType dtype);
Device device_of(DLDevice device);
DLDataType to_dlpack(DType dtype);
DLDevice to_dlpack(Device device);

// A view of `array` (strides may be absent, which means row-major). Of more than Tensor::max_ndim dimensions the first
// ones are taken; validate() refuses such a tensor by its ndim.
Tensor tensor_of(const DLTensor& array, bool read_only);

// A tensor of `ndim` extents without memory, row-major. Strides of extents too large for 64 bits wrap; validate()
// refuses them.
Tensor compact(DType dtype, Device device, int ndim, const int64_t* shape);

// How many elements; extents that validate() has seen.
int64_t elements(const Tensor& tensor);

// Shared ownership of somebody's array, in the old or the versioned form. Calls the owner's deleter once.
class Managed {
 public:
  Managed() = default;
  explicit Managed(DLManagedTensorVersioned* array) : versioned_(array) {}
  explicit Managed(DLManagedTensor* array) : plain_(array) {}
  Managed(Managed&& other) noexcept
      : versioned_(std::exchange(other.versioned_, nullptr)), plain_(std::exchange(other.plain_, nullptr)) {}
  Managed& operator=(Managed&& other) noexcept {
    std::swap(versioned_, other.versioned_);
    std::swap(plain_, other.plain_);
    return *this;
  }
  ~Managed() {
    if (versioned_ && versioned_->deleter) versioned_->deleter(versioned_);
    if (plain_ && plain_->deleter) plain_->deleter(plain_);
  }

  explicit operator bool() const { return versioned_ || plain_; }
  // Gives the ownership of an array in the versioned form away.
  DLManagedTensorVersioned* release() { return std::exchange(versioned_, nullptr); }
  Tensor tensor() const {
    return versioned_ ? tensor_of(versioned_->dl_tensor, versioned_->flags & DLPACK_FLAG_BITMASK_READ_ONLY)
                      : tensor_of(plain_->dl_tensor, false);
  }

 private:
  DLManagedTensorVersioned* versioned_ = nullptr;
  DLManagedTensor* plain_ = nullptr;
};

}  // namespace flashcore::dlpack

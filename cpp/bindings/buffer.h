// SPDX-License-Identifier: Apache-2.0
// Memory of FlashCore's own for results, where the framework offers no allocator. Other libraries take it through
// DLPack.
#pragma once

#include <nanobind/nanobind.h>

#include <cstddef>
#include <memory>

#include "cuda_stream.h"
#include "flashcore/tensor.h"

namespace flashcore {

// Row-major memory of one array: 64-byte aligned on the CPU (JAX takes no less without a copy), stream-ordered on CUDA.
class Storage {
 public:
  // Allocates for `shape`, which stands in tensor.shape; throws std::bad_alloc or RuntimeError.
  Storage(const Tensor& compact, void* stream);
  ~Storage();
  Storage(const Storage&) = delete;
  Storage& operator=(const Storage&) = delete;

  // Says that what has been issued to the stream so far makes the contents.
  void filled(std::shared_ptr<cuda::Event> event) { ready_ = std::move(event); }

  const Tensor& tensor() const { return tensor_; }
  const cuda::Event* ready() const { return ready_.get(); }

 private:
  Tensor tensor_;
  void* stream_;
  std::shared_ptr<cuda::Event> ready_;  // null on the CPU
};

// Makes the Python object over a storage.
nanobind::object make_buffer(std::shared_ptr<Storage> storage);

void bind_buffer(nanobind::module_& m);

}  // namespace flashcore

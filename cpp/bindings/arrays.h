// SPDX-License-Identifier: Apache-2.0
// The arrays of one call: read without a copy, on one stream, and held until their work has been issued.
#pragma once

#include <nanobind/nanobind.h>

#include <memory>
#include <optional>
#include <vector>

#include "array_type.h"
#include "buffer.h"
#include "cuda_stream.h"
#include "dlpack.h"
#include "flashcore/tensor.h"

namespace flashcore {

namespace nb = nanobind;

// A new array in the leader's array type. Work may be issued on `tensor` at once; `take` hands the Python object out.
class Result {
 public:
  Tensor tensor;

 private:
  friend class Arrays;
  dlpack::Managed managed_;           // from the framework's allocator, not yet a Python object,
  nb::object object_;                 // or made by the framework's Python functions,
  std::shared_ptr<Storage> storage_;  // or memory of ours, to become an array of the framework's
};

// The first array that is added leads: its framework gives the stream and makes the results.
class Arrays {
 public:
  // Reads an input; `name` is the argument's, for errors. Throws TypeError for what is no array or cannot be read,
  // ValueError for torch tensors that would need a gradient. The array outlives the call, so the object is only
  // borrowed.
  Tensor input(const char* name, nb::handle array);
  // Reads an array to write to. `instead` says what to do where arrays of its type are immutable.
  Tensor output(const char* name, nb::handle array,
                const char* instead = "call without out= and take the result that is returned");

  // The stream of the work: null on the CPU.
  void* stream() const { return stream_; }

  // A row-major array of the leader's framework and device. dtype: the leader's, float32 or uint8. Its Python object is
  // made by take() where that is possible, when the GPU works already.
  Result allocate(DType dtype, int ndim, const int64_t* shape);

  // To be called once the work has been issued: orders what other streams do later to the arrays after it.
  void issued();

  // The Python array of a result; on CUDA after issued().
  nb::object take(Result&& result);

 private:
  struct Array {
    std::shared_ptr<ArrayType> type;
    Device device;
    dlpack::Managed managed;  // empty where nothing is owned
  };

  Tensor add(const char* name, nb::handle array);
  Tensor read(const char* name, nb::handle array, Array& into);
  Tensor call_dlpack(const char* name, nb::handle array, Array& into);
  void lead(nb::handle array, const ArrayType& type, Device device);

  std::vector<Array> arrays_;
  nb::handle leader_;
  Device device_;
  DType dtype_;
  void* stream_ = nullptr;
  std::optional<bool> grad_enabled_;                // PyTorch's mode, asked once a call, where there are tensors of it
  std::vector<std::shared_ptr<Storage>> storages_;  // of the results, to be told when they are filled
};

// Waits for the work that still reads arrays of frameworks without streams, and lets them go. For the interpreter's
// exit.
void release_pending();

}  // namespace flashcore

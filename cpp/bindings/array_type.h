// SPDX-License-Identifier: Apache-2.0
// What FlashCore knows of one Python array type: how its arrays are read, which stream they live on, who allocates for
// it.
#pragma once

#include <dlpack/dlpack.h>
#include <nanobind/nanobind.h>

#include <memory>

namespace flashcore {

namespace nb = nanobind;

// Facts that hold for every array of a type; looked up once a type. What takes Python is told by an adapter of
// flashcore/_frameworks.py, whose base class says what each of its members means.
struct ArrayType {
  nb::object type;                         // kept alive, so that its address stays its own
  const DLPackExchangeAPI* api = nullptr;  // null: the Python protocol
  nb::object grad_enabled;                 // torch.is_grad_enabled for torch tensors, else absent
  bool on_cpu = false;                     // no array of this type lies elsewhere
  bool writable = true;                    // false: its arrays are immutable by contract
  bool own_stream = false;                 // its arrays have no current stream: one of FlashCore's is used
  bool versioned = true;                   // __dlpack__ takes max_version
  // Absent where the framework does not need them.
  nb::object export_array;  // (array, stream) -> capsule, instead of array.__dlpack__
  nb::object ready;         // (array): waits until an array on the CPU is computed
  nb::object describe;  // (array) -> address, read-only, shape, strides in bytes, dtype name: what DLPack cannot carry
  nb::object stream;    // (device index) -> the current stream's handle
  nb::object empty;     // (like, shape, dtype name or None for like's) -> array
  nb::object from_buffer;  // (like, buffer) -> array
};

// The type of `array`; null when it is no array (it has no __dlpack__). May run Python, whose error says why it is
// refused.
std::shared_ptr<ArrayType> array_type_of(nb::handle array);

// A Python string made once and kept for ever.
nb::handle interned(const char* text);

}  // namespace flashcore

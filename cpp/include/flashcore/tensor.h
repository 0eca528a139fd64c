// SPDX-License-Identifier: Apache-2.0
// What an array is to FlashCore: a data type, a device and a strided view of somebody else's memory.
#pragma once

#include <cstdint>
#include <string>

namespace flashcore {

enum class DTypeKind : uint8_t { none, boolean, signed_int, unsigned_int, floating, bfloat, complex, other };

// An element type: its kind and its width in bits (the way DLPack counts: one lane).
struct DType {
  DTypeKind kind = DTypeKind::none;
  uint8_t bits = 0;

  constexpr int64_t bytes() const { return (bits + 7) / 8; }
  friend constexpr bool operator==(DType a, DType b) { return a.kind == b.kind && a.bits == b.bits; }
  friend constexpr bool operator!=(DType a, DType b) { return !(a == b); }
};

inline constexpr DType float32{DTypeKind::floating, 32};
inline constexpr DType float16{DTypeKind::floating, 16};
inline constexpr DType bfloat16{DTypeKind::bfloat, 16};
inline constexpr DType int32{DTypeKind::signed_int, 32};

// "float16", "bfloat16", "int64", "bool", ...
std::string to_string(DType dtype);

enum class DeviceType : uint8_t { cpu, cuda, other };

struct Device {
  DeviceType type = DeviceType::cpu;
  int index = 0;

  friend constexpr bool operator==(Device a, Device b) { return a.type == b.type && a.index == b.index; }
  friend constexpr bool operator!=(Device a, Device b) { return !(a == b); }
};

// "cpu", "cuda:0", ...
std::string to_string(Device device);

// A view of an array that somebody else owns. Strides count elements and may be zero or negative.
// A tensor whose ndim is -1 is absent.
struct Tensor {
  static constexpr int max_ndim = 8;

  void* data = nullptr;
  DType dtype;
  Device device;
  bool read_only = false;
  int ndim = -1;  // may exceed max_ndim in a tensor that validate() is going to refuse
  int64_t shape[max_ndim] = {};
  int64_t stride[max_ndim] = {};

  bool present() const { return ndim >= 0; }
};

}  // namespace flashcore

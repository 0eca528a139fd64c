// SPDX-License-Identifier: Apache-2.0
// DLPack's structures as FlashCore's values and back.
#include "dlpack.h"

#include <algorithm>

namespace flashcore::dlpack {

namespace {

void fill_compact_strides(Tensor& tensor) {
  uint64_t stride = 1;
  for (int i = std::min(tensor.ndim, Tensor::max_ndim) - 1; i >= 0; --i) {
    tensor.stride[i] = static_cast<int64_t>(stride);
    stride *= static_cast<uint64_t>(std::max<int64_t>(tensor.shape[i], 1));
  }
}

}  // namespace

DType dtype_of(DLDataType dtype) {
  DTypeKind kind = DTypeKind::other;
  switch (dtype.code) {
    case kDLInt:
      kind = DTypeKind::signed_int;
      break;
    case kDLUInt:
      kind = DTypeKind::unsigned_int;
      break;
    case kDLFloat:
      kind = DTypeKind::floating;
      break;
    case kDLBfloat:
      kind = DTypeKind::bfloat;
      break;
    case kDLComplex:
      kind = DTypeKind::complex;
      break;
    case kDLBool:
      kind = DTypeKind::boolean;
      break;
    default:
      // The narrow floats, which only an error will name.
      if (dtype.code >= kDLFloat8_e3m4 && dtype.code <= kDLFloat4_e2m1fn) kind = DTypeKind::floating;
  }
  if (dtype.lanes != 1) kind = DTypeKind::other;
  return {kind, dtype.bits};
}

Device device_of(DLDevice device) {
  switch (device.device_type) {
    case kDLCPU:
    case kDLCUDAHost:
      return {DeviceType::cpu, 0};
    case kDLCUDA:
    case kDLCUDAManaged:
      return {DeviceType::cuda, device.device_id};
    default:
      return {DeviceType::other, device.device_id};
  }
}

DLDataType to_dlpack(DType dtype) {
  uint8_t code = kDLOpaqueHandle;
  switch (dtype.kind) {
    case DTypeKind::signed_int:
      code = kDLInt;
      break;
    case DTypeKind::unsigned_int:
      code = kDLUInt;
      break;
    case DTypeKind::floating:
      code = kDLFloat;
      break;
    case DTypeKind::bfloat:
      code = kDLBfloat;
      break;
    default:
      break;
  }
  return {code, dtype.bits, 1};
}

DLDevice to_dlpack(Device device) { return {device.type == DeviceType::cuda ? kDLCUDA : kDLCPU, device.index}; }

Tensor tensor_of(const DLTensor& array, bool read_only) {
  Tensor tensor;
  tensor.data = array.data ? static_cast<char*>(array.data) + array.byte_offset : nullptr;
  tensor.dtype = dtype_of(array.dtype);
  tensor.device = device_of(array.device);
  tensor.read_only = read_only;
  tensor.ndim = array.ndim;
  int const dims = std::min<int>(array.ndim, Tensor::max_ndim);
  std::copy_n(array.shape, dims, tensor.shape);
  if (array.strides) {
    std::copy_n(array.strides, dims, tensor.stride);
  } else {
    fill_compact_strides(tensor);
  }
  return tensor;
}

Tensor compact(DType dtype, Device device, int ndim, const int64_t* shape) {
  Tensor tensor;
  tensor.dtype = dtype;
  tensor.device = device;
  tensor.ndim = ndim;
  std::copy_n(shape, std::min(ndim, Tensor::max_ndim), tensor.shape);
  fill_compact_strides(tensor);
  return tensor;
}

int64_t elements(const Tensor& tensor) {
  int64_t count = 1;
  for (int i = 0; i < std::min(tensor.ndim, Tensor::max_ndim); ++i) count *= tensor.shape[i];
  return count;
}

}  // namespace flashcore::dlpack

// SPDX-License-Identifier: Apache-2.0
// Descriptors with which the TMA engine finds boxes of an array's rows.
#pragma once

#include <cuda.h>

#include <cstdint>

#include "flashcore/tensor.h"

namespace flashcore::sm90 {

// An array of head_dim × extent[0] × ... × extent[3] elements of two bytes, strides in elements, of which TMA loads
// boxes of `columns` columns, one panel's (64 or 32), box[0] × box[1] rows. What a box holds outside the array is zero.
struct TensorMapShape {
  const void* data;
  DType dtype;
  int64_t head_dim;
  int64_t extent[4], stride[4];
  int box[2];
  int columns = 64;
};

// Throws RuntimeError where the driver refuses, which plan() has ruled out for valid arrays.
CUtensorMap tensor_map(const TensorMapShape& shape);

}  // namespace flashcore::sm90

// SPDX-License-Identifier: Apache-2.0
// The shared memory of the decode kernel, as plan() and the kernel both count it.
#pragma once

#include "attention/portable.h"

namespace flashcore {
namespace {

struct DecodeTile {
  int head_dim, slices;

  static constexpr int warps = 4;
  static constexpr int warp_keys = 16;   // of a tile of keys, each warp's own
  static constexpr int most_stages = 8;  // tiles of keys on their way
  // The kernel's own state (1 KiB) and the 1 KiB that the driver reserves a block.
  static constexpr int static_bytes = 2048;

  FLASHCORE_HD constexpr int rows() const { return 16 * slices; }
  FLASHCORE_HD constexpr int q_bytes() const { return rows() * head_dim * 2; }
  // Keys and values of one tile.
  FLASHCORE_HD constexpr int stage_bytes() const { return 2 * warps * warp_keys * head_dim * 2; }
  // A slice's output of every warp, in float32. Rows are 8 floats longer than they need, so that the lanes of a warp
  // that hold different rows write to different banks.
  FLASHCORE_HD constexpr int merge_stride() const { return head_dim + 8; }
  FLASHCORE_HD constexpr int merge_bytes() const { return warps * 16 * merge_stride() * 4; }
  // The merge uses the stages' place.
  FLASHCORE_HD constexpr int shared_memory(int stages) const {
    return q_bytes() + max_of(stages * stage_bytes(), merge_bytes());
  }
  FLASHCORE_HD constexpr int stages_of(int shared_memory) const {
    return min_of((shared_memory - q_bytes()) / stage_bytes(), most_stages);
  }
};

}  // namespace
}  // namespace flashcore

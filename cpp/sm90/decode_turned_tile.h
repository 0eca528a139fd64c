// SPDX-License-Identifier: Apache-2.0
// The shared memory of the Hopper decode kernel with turned products, as plan() and the kernel both count it.
#pragma once

#include <cstdint>

#include "attention/portable.h"

namespace flashcore {
namespace {

struct TurnedDecodeTile {
  int head_dim, tile_rows;

  static constexpr int groups = 2;       // of consumers, which take a block's tiles in turn
  static constexpr int key_warps = 4;    // of a group, which divide a tile's keys
  static constexpr int warp_keys = 16;   // of a tile of 64 keys
  static constexpr int most_stages = 8;  // tiles of keys on their way
  static constexpr int most_cluster = 8;

  FLASHCORE_HD constexpr int rows() const { return tile_rows; }
  FLASHCORE_HD constexpr int warps() const { return groups * key_warps; }
  FLASHCORE_HD constexpr int threads() const { return 32 * (warps() + groups); }  // a producer for each is the last
  FLASHCORE_HD constexpr int blocks_a_unit() const { return 2; }
  // Keys or values of a tile, in panels of 64 columns.
  FLASHCORE_HD constexpr int panels() const { return ceil_div(head_dim, 64); }
  FLASHCORE_HD constexpr int kv_bytes() const { return panels() * 64 * 128; }
  FLASHCORE_HD constexpr int stage_bytes() const { return 2 * kv_bytes(); }
  FLASHCORE_HD constexpr int q_bytes() const { return panels() * rows() * 128; }
  // A group's weights of a tile's keys. Where these are not in use, its warps' maxima or sums.
  FLASHCORE_HD constexpr int weights_bytes() const { return rows() * 128; }
  // Whether a block may have one part after the other; then each group keeps what its producer is ahead by.
  FLASHCORE_HD constexpr bool walks() const { return rows() <= 16; }
  // Whether such blocks may merge what they have divided; and whether they do, in teams for a batch, or another kernel:
  // with fewer sequences than teams, or more rows, the last block of a sequence has too much to merge alone.
  FLASHCORE_HD constexpr bool may_merge() const { return rows() <= 8; }
  FLASHCORE_HD constexpr bool merges(int64_t teams, int64_t batch) const {
    return may_merge() && 0 < teams && teams < batch;
  }
  FLASHCORE_HD constexpr int kept_parts() const { return walks() ? most_stages + 1 : 1; }
  // Barriers, which boxes are absent, the block's parts and its divided items, and where the groups' outputs lie.
  FLASHCORE_HD constexpr int control_bytes() const {
    return groups * most_stages * (2 * 8 + 4) + (groups + 2) * 8 + groups * kept_parts() * 64 + 2 * 16 + 16;
  }
  // Of this part and of the next one.
  FLASHCORE_HD constexpr int reference_bytes() const { return (walks() ? 2 : 1) * groups * rows() * 4; }
  // A group's output in float32, in its slots' place when these have been read. Rows are 4 floats longer than they
  // need, so that the lanes of a warp, which hold pairs of rows, write to different banks.
  FLASHCORE_HD constexpr int merge_stride() const { return panels() * 64 + 4; }
  FLASHCORE_HD constexpr int merge_bytes() const { return rows() * merge_stride() * 4; }
  // What all of a cluster's blocks send to each of these: its columns of `cluster_rows` rows, and all rows'
  // log-sum-exp. `cluster_rows` are those of a part, where the blocks of a cluster merge; else 0.
  FLASHCORE_HD constexpr int received_bytes(int cluster_rows) const {
    return cluster_rows * (head_dim + most_cluster) * 4;
  }

  // What comes before the stages. What a cluster's blocks send lies behind the last group's output.
  FLASHCORE_HD constexpr int head_bytes() const {
    return (q_bytes() + groups * weights_bytes() + control_bytes() + reference_bytes() + 1023) / 1024 * 1024;
  }
  FLASHCORE_HD constexpr int shared_memory(int stages, int cluster_rows) const {
    int const last_group = stages * stage_bytes() / groups * (groups - 1);
    return head_bytes() + max_of(stages * stage_bytes(), last_group + merge_bytes() + received_bytes(cluster_rows));
  }
  FLASHCORE_HD constexpr int stages_of(int shared_memory) const {
    return min_of((shared_memory - head_bytes()) / stage_bytes(), most_stages);
  }
};

}  // namespace
}  // namespace flashcore

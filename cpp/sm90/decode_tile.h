// SPDX-License-Identifier: Apache-2.0
// The shared memory of the Hopper decode kernel, as plan() and the kernel both count it.
#pragma once

#include "attention/portable.h"

namespace flashcore {
namespace {

struct HopperDecodeTile {
  int head_dim, slices;  // of 16 rows

  static constexpr int key_warps = 4;     // consumers of a slice, which divide a tile's keys
  static constexpr int warp_keys = 16;    // of a tile of 64 keys
  static constexpr int most_stages = 8;   // tiles of keys on their way
  static constexpr int most_cluster = 8;  // blocks that share an item
  static constexpr int units = 132;       // multiprocessors of the devices that numbers here are for

  FLASHCORE_HD constexpr int rows() const { return 16 * slices; }
  FLASHCORE_HD constexpr int warps() const { return key_warps * slices; }
  FLASHCORE_HD constexpr int threads() const { return 32 * warps() + 32; }  // the producer's warp is the last
  // Two blocks share a multiprocessor's registers where the accumulators are few.
  FLASHCORE_HD constexpr int blocks_a_unit() const { return head_dim * slices <= 128 ? 2 : 1; }
  // Keys or values of a tile, in panels of 64 columns.
  FLASHCORE_HD constexpr int panels() const { return ceil_div(head_dim, 64); }
  FLASHCORE_HD constexpr int kv_bytes() const { return panels() * 64 * 128; }
  FLASHCORE_HD constexpr int stage_bytes() const { return 2 * kv_bytes(); }
  FLASHCORE_HD constexpr int q_bytes() const { return rows() * head_dim * 2; }
  FLASHCORE_HD constexpr int state_bytes() const { return key_warps * rows() * 2 * 4; }
  static constexpr int kept_parts = most_stages + 1;
  // Barriers, which boxes are absent, the block's parts.
  static constexpr int control_bytes = 2 * most_stages * 8 + 2 * 8 + most_stages * (8 + 4) + kept_parts * 64;
  // All warps' outputs in float32, in a stage's place, or that of as many as there are slices.
  FLASHCORE_HD constexpr int merge_bytes() const { return key_warps * rows() * head_dim * 4; }
  // What a block gets from all of a cluster, each of which computes one share: its columns of `rows` rows, and all
  // rows' log-sum-exp. Where the blocks compute several shares in turn, that many times as much.
  FLASHCORE_HD constexpr int received_bytes(int rows) const { return rows * head_dim * 4; }
  FLASHCORE_HD constexpr int received_lse_bytes(int rows) const { return rows * most_cluster * 4; }

  // What comes before the stages, and behind them, in clusters only.
  FLASHCORE_HD constexpr int head_bytes() const {
    return (q_bytes() + state_bytes() + control_bytes + 1023) / 1024 * 1024;
  }
  FLASHCORE_HD constexpr int tail_bytes(int cluster_rows) const {
    return received_bytes(cluster_rows) + received_lse_bytes(cluster_rows);
  }
  // `cluster_rows`: of a part, times the shares of a block, where the blocks of a cluster merge; else 0.
  FLASHCORE_HD constexpr int shared_memory(int stages, int cluster_rows) const {
    return head_bytes() + max_of(stages * stage_bytes(), merge_bytes()) + tail_bytes(cluster_rows);
  }
  FLASHCORE_HD constexpr int stages_of(int shared_memory, int cluster_rows) const {
    return min_of((shared_memory - head_bytes() - tail_bytes(cluster_rows)) / stage_bytes(), most_stages);
  }
};

}  // namespace
}  // namespace flashcore

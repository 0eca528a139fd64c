// SPDX-License-Identifier: Apache-2.0
// The small kernel's tiles and their shared memory, as plan() and the kernel both count it.
#pragma once

#include "attention/portable.h"

namespace flashcore {
namespace {

struct SmallTile {
  int head_dim;
  int row_groups;  // warpgroups of 64 rows of queries each
  int key_groups;  // for each of these, warpgroups that divide the keys of the block: 1 or 2
  int cluster;     // blocks that divide a tile's keys
  int chunk;       // keys whose scores a warpgroup asks for at once, 64 to a product
  int blocks;      // of a multiprocessor, that the registers leave room for
  bool plain_score;

  // Keys of a product; each step has a barrier for its keys, each chunk one for its values.
  static constexpr int step = 64;
  static constexpr int most_steps = 16;    // of a warpgroup's part of the keys
  static constexpr int state_bytes = 128;  // what the block is to do
  static constexpr int units = 132;        // multiprocessors of the devices that the choice of tiles is for

  FLASHCORE_HD constexpr int tile_q() const { return 64 * row_groups; }
  FLASHCORE_HD constexpr int parts() const { return cluster * key_groups; }  // of a tile's keys
  FLASHCORE_HD constexpr int warpgroups() const { return row_groups * key_groups; }
  FLASHCORE_HD constexpr int threads() const { return 128 * warpgroups(); }
  FLASHCORE_HD constexpr int panels() const { return ceil_div(head_dim, 64); }
  FLASHCORE_HD constexpr int q_bytes() const { return panels() * tile_q() * 128; }
  FLASHCORE_HD constexpr int steps() const { return chunk / step; }
  FLASHCORE_HD constexpr int kv_bytes() const { return panels() * step * 128; }  // of a step's keys, or its values
  // What a warpgroup is sent of 64 rows' outputs in float32 and of their states: by the other warpgroup of its rows,
  // and by each of the cluster's other blocks.
  FLASHCORE_HD constexpr int sent_bytes(int parts) const { return 64 * (head_dim / parts * 4 + 8); }
  FLASHCORE_HD constexpr int neighbour_bytes() const { return key_groups > 1 ? sent_bytes(key_groups) : 0; }
  FLASHCORE_HD constexpr int block_bytes() const { return sent_bytes(parts()); }
  FLASHCORE_HD constexpr int received_bytes() const { return neighbour_bytes() + (cluster - 1) * block_bytes(); }
  // For the queries, each step's keys and values, what a warpgroup receives.
  FLASHCORE_HD constexpr int barriers() const { return 1 + key_groups * 2 * most_steps + warpgroups(); }

  // What gives the rows' sums, where weights are relative to references: 16 rows of 128 bytes.
  FLASHCORE_HD constexpr int ones_bytes() const { return plain_score && head_dim == 64 ? 16 * 128 : 0; }

  // The order in shared memory: queries, keys, values, ones, what warpgroups receive, barriers, the block's own state,
  // and which query each row of the tile is.
  FLASHCORE_HD constexpr int values_at(int steps) const { return q_bytes() + key_groups * steps * kv_bytes(); }
  FLASHCORE_HD constexpr int ones_at(int steps) const { return values_at(steps) + key_groups * steps * kv_bytes(); }
  FLASHCORE_HD constexpr int received_at(int steps) const { return ones_at(steps) + ones_bytes(); }
  FLASHCORE_HD constexpr int barriers_at(int steps) const {
    return received_at(steps) + warpgroups() * received_bytes();
  }
  FLASHCORE_HD constexpr int shared_memory(int steps) const {
    return barriers_at(steps) + barriers() * 8 + state_bytes + tile_q() * 4;
  }
};

}  // namespace
}  // namespace flashcore

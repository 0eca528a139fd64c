// SPDX-License-Identifier: Apache-2.0
// The small kernel's tiles and their shared memory, as plan() and the kernel both count it.
#pragma once

#include "attention/portable.h"

namespace flashcore {
namespace {

struct SmallTile {
  int head_dim;
  int warpgroups;  // of 64 rows of queries each
  int blocks;      // of a multiprocessor, that the registers leave room for
  bool plain_score;

  static constexpr int chunk = 64;                              // keys; each has its own barriers
  static constexpr int most_chunks = 8;                         // of a block's part of the keys
  static constexpr int most_splits = 8;                         // blocks of a cluster on every device
  static constexpr int state_bytes = 2 * most_chunks * 8 + 64;  // barriers, and what the block is to do

  FLASHCORE_HD constexpr int tile_q() const { return 64 * warpgroups; }
  FLASHCORE_HD constexpr int panels() const { return ceil_div(head_dim, 64); }
  FLASHCORE_HD constexpr int q_bytes() const { return panels() * tile_q() * 128; }
  FLASHCORE_HD constexpr int kv_bytes() const { return panels() * chunk * 128; }  // of a chunk's keys, or its values
  // Rows that a block gets of the other blocks to merge, each with its output in float32, its maximum and its sum.
  FLASHCORE_HD constexpr int merged_rows(int splits) const { return tile_q() - tile_q() / splits; }

  // The order in shared memory: queries, keys, values, outputs to merge, their rows' states, the block's own state.
  FLASHCORE_HD constexpr int values_at(int chunks) const { return q_bytes() + chunks * kv_bytes(); }
  FLASHCORE_HD constexpr int output_at(int chunks) const { return values_at(chunks) + chunks * kv_bytes(); }
  FLASHCORE_HD constexpr int rows_at(int chunks, int splits) const {
    return output_at(chunks) + merged_rows(splits) * head_dim * 4;
  }
  FLASHCORE_HD constexpr int state_at(int chunks, int splits) const {
    return rows_at(chunks, splits) + merged_rows(splits) * 8;
  }
  FLASHCORE_HD constexpr int shared_memory(int chunks, int splits) const {
    return state_at(chunks, splits) + state_bytes;
  }
};

}  // namespace
}  // namespace flashcore

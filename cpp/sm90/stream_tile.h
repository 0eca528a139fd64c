// SPDX-License-Identifier: Apache-2.0
// The stream kernel's tiles, as plan() and the kernel both count them.
#pragma once

#include "attention/portable.h"

namespace flashcore {
namespace {

struct StreamTile {
  int warpgroups;  // of 64 rows of queries

  static constexpr int head_dim = 64;
  static constexpr int tile_k = 128;      // keys of a chunk
  static constexpr int q_buffers = 2;     // places for a tile of queries
  static constexpr int units = 132;       // multiprocessors of the devices that numbers here are for
  static constexpr int most_jobs = 16;    // tiles of queries of a block,
  static constexpr int most_chunks = 64;  // and chunks of keys of all of them
  static constexpr int control_bytes = 2048;  // barriers, the block's jobs and their chunks

  FLASHCORE_HD constexpr int tile_q() const { return 64 * warpgroups; }
  FLASHCORE_HD constexpr int threads() const { return 128 * warpgroups; }
  // A thread takes 128 registers: four warpgroups fill a multiprocessor.
  FLASHCORE_HD constexpr int blocks_a_unit() const { return 4 / warpgroups; }
  // Places for chunks of keys, and of values.
  FLASHCORE_HD constexpr int buffers() const { return warpgroups; }
  // Queries, keys and values in rows of 128 bytes.
  FLASHCORE_HD constexpr int shared_memory() const {
    return (q_buffers * tile_q() + 2 * buffers() * tile_k) * 128 + control_bytes;
  }
};

constexpr StreamTile stream_tiles[] = {{2}, {4}};

}  // namespace
}  // namespace flashcore

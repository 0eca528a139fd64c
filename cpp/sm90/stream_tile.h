// SPDX-License-Identifier: Apache-2.0
// The stream kernel's tile, as plan() and the kernel both count it.
#pragma once

#include "attention/portable.h"

namespace flashcore {
namespace {

struct StreamTile {
  static constexpr int head_dim = 64;
  static constexpr int warpgroups = 2, tile_q = 64 * warpgroups, threads = 128 * warpgroups;
  static constexpr int tile_k = 128;          // keys of a chunk
  static constexpr int buffers = 2;           // of queries, of keys, of values
  static constexpr int blocks_a_unit = 2;     // of a multiprocessor
  static constexpr int units = 132;           // multiprocessors of the devices that numbers here are for
  static constexpr int most_jobs = 32;        // tiles of queries of a block
  static constexpr int control_bytes = 4096;  // ones, barriers and the block's jobs

  // Queries, keys and values in rows of 128 bytes.
  static constexpr int shared_memory = buffers * (tile_q + 2 * tile_k) * 128 + control_bytes;
};

}  // namespace
}  // namespace flashcore

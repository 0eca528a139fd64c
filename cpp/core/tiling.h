// SPDX-License-Identifier: Apache-2.0
// How a problem's queries are divided into tiles, which the plans of all forward kernels count.
#pragma once

#include "flashcore/plan.h"
#include "flashcore/problem.h"

namespace flashcore {

// Tiles of `tile_q` queries over all sequences and `heads` heads. Throws ValueError where a grid cannot have so many.
int64_t tiles(const Problem& problem, int tile_q, int64_t heads);

// Whether later queries of a sequence have many more keys than the first ones: not where a window to the left makes
// them even, nor where there are many keys before all queries.
bool uneven(const Problem& problem);

// Where tiles are uneven, long ones go first among the pairs of sequence and head whose keys and values fit in half of
// the L2 cache; elsewhere the tiles of a pair follow each other, and its keys and values stay in the cache anyway.
// `pairs_per_key_head` of them share their keys.
int heads_per_section(const Problem& problem, const DeviceProperties& device, int64_t pairs,
                      int64_t pairs_per_key_head);

// Query heads of a key head.
inline int64_t group_of(const Sizes& s) { return s.heads_k == 0 ? 1 : s.heads_q / s.heads_k; }

struct Tiling {
  int packed_heads;  // query heads of one key head that share a tile
  int64_t tiles;
  int64_t rows;  // of queries that the GPU's busiest multiprocessor has, empty ones of its tiles included
};

// For the sm90 kernels: query heads of one key head share a tile where that leaves fewer of its rows empty.
Tiling tiling(const Problem& problem, const DeviceProperties& device, int tile_q);

}  // namespace flashcore

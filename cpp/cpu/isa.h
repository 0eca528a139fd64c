// SPDX-License-Identifier: Apache-2.0
// What the instruction sets' copies of the kernel share with the code that schedules them: one tile of work, and the
// function that each of them provides. Nothing here has code of its own.
#pragma once

#include "core/forward_params.h"
#include "cpu/cpu.h"

namespace flashcore::cpu {

// Where one sequence lies.
struct Sequence {
  int64_t batch;    // index along the batch stride; 0 when variable-length
  int64_t first_q;  // its first rows
  int64_t first_k;
  int seqlen_q, seqlen_k;
  // Keys and values in pages: the batch index of each page of the sequence. Else null.
  const int32_t* pages = nullptr;
  int page_size = 0;
};

// The queries [q_begin, q_begin + queries) of the query heads [head, head + heads), which share the key head `head_k`.
struct QueryTile {
  Sequence sequence;
  int q_begin, queries;
  int head, heads;
  int head_k;
  int key_heads;                     // head_k and those after it, each with `heads` query heads: 1, or few rows
  int first_key_tile, end_key_tile;  // the tiles of keys that some of them see; a part of those where they are divided

  // Where the keys of a tile are divided over tasks: a task's result, for each row its maximum, its sum and head_dim
  // outputs not yet divided by it. With `parts` > 0 the task is to merge that many, partial_floats apart, from
  // `partial` on.
  float* partial = nullptr;
  int64_t partial_floats = 0;
  int parts = 0;
};

enum class Element : uint8_t { float32, float16, bfloat16 };

// Computes one tile. `scratch` has scratch_floats floats, 64-byte aligned, and belongs to the calling thread.
using ForwardTile = void (*)(const ForwardParams&, const QueryTile&, Element, float* scratch);

// The tile of queries (packed for the first product, and its output), packed tiles of keys and of values, a strip of
// scores and weights, and the rows of a tile whose keys or values lie in pages, at the largest head dimension and with
// packed elements of up to 6 bytes (forward_amx.h): 3.5 MiB.
constexpr int max_head_dim = 256;
constexpr int strip_rows = 24;
constexpr int packed_bytes = 1 << 20;  // of keys and values
constexpr int64_t scratch_floats = packed_bytes / 4 + int64_t{5} * tile_q * max_head_dim / 2 + tile_q * 16 +
                                   64 * (2 * tile_k * 5 / 2 + 32) + 2 * tile_k * max_head_dim;

struct Isa {
  const char* name;
  ForwardTile forward_tile;
  bool (*supported)();
};

// The instruction set of chosen_isa().
const Isa& chosen();

}  // namespace flashcore::cpu

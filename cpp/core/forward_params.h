// SPDX-License-Identifier: Apache-2.0
// The arguments of a forward kernel, the same for every machine. launch() fills it from a Problem; validate() has made
// sure that everything in it is in range.
#pragma once

#include <cstdint>

#include "flashcore/problem.h"

namespace flashcore {

// Where an array's rows lie, in elements. A row is head_dim consecutive elements.
template <typename Pointer>
struct Rows {
  Pointer data;
  int64_t batch_stride;  // 0 when variable-length
  int64_t row_stride;    // from one token to the next
  int64_t head_stride;
};

struct ForwardParams {
  Rows<const void*> q;  // (batch, seqlen_q, heads_q, head_dim)
  Rows<const void*> k;  // (batch, seqlen_k, heads_k, head_dim)
  Rows<const void*> v;  // (batch, seqlen_k, heads_k, head_dim)
  Rows<void*> o;        // (batch, seqlen_q, heads_q, head_dim)
  float* lse;           // (batch, heads_q, seqlen_q) or (heads_q, total_q), or null

  // Variable-length: null otherwise.
  const int32_t* cu_seqlens_q;  // (batch + 1)
  const int32_t* cu_seqlens_k;  // (batch + 1)

  // (batch): how many keys of each sequence count, counted from the first, less keys_added; null: all.
  const int32_t* seqused_k;
  int32_t keys_added = 0;  // fixed-length

  int32_t batch;  // sequences, when variable-length
  int32_t heads_q, heads_k;
  int32_t group;               // heads_q / heads_k
  int32_t seqlen_q, seqlen_k;  // fixed-length; variable-length: total_q, total_k
  int32_t head_dim;

  // Keys that a query sees to either side of the diagonal; `unlimited` (attention/mask.h) where there is no limit.
  // causal is window_right = 0.
  int32_t window_left, window_right;

  float scale;    // of the scores, any sign
  float softcap;  // 0: off

  uint32_t* next_tile = nullptr;  // sm90: counts the tiles that free blocks have taken, from zero; or null
};

// Fills the parameters of a problem that has passed validate().
ForwardParams forward_params(const Problem& problem);

}  // namespace flashcore

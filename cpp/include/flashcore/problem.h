// SPDX-License-Identifier: Apache-2.0
// A Problem: one call of attention as a plain value. It owns nothing and checks nothing; validate() does.
#pragma once

#include <cstdint>
#include <optional>
#include <vector>

#include "flashcore/tensor.h"

namespace flashcore {

// The order of a 4-D array's axes: bshd is (batch, sequence, heads, head_dim), bhsd (batch, heads, sequence, head_dim).
enum class Layout : uint8_t { bshd, bhsd };

// The machine that runs a problem. `automatic` lets plan() choose.
enum class Backend : uint8_t { automatic, cpu, sm80, sm90 };

// softmax(scale · Q Kᵀ + mask) V for every batch and head.
//
// Fixed-length: query, key, value and out are 4-D in `layout`. Variable-length (cu_seqlens_q present): they are 3-D,
// (total tokens, heads, head_dim), sequence b being rows cu_seqlens[b] to cu_seqlens[b + 1].
struct Problem {
  Tensor query;  // float32 (CPU only), float16 or bfloat16; last stride 1
  Tensor key;    // as query; heads_k divides heads_q (grouped-query attention)
  Tensor value;  // as key, its last extent being head_dim_v
  Tensor out;    // as query, its last extent being head_dim_v; absent while only validating or planning
  Tensor
      lse;  // optional: float32, contiguous, (batch, heads_q, seqlen_q) or (heads_q, total_q): natural-log log-sum-exp

  // Variable-length problems: int32, contiguous, on the device of the arrays.
  Tensor cu_seqlens_q;  // (sequences + 1): starts at 0, never decreases
  Tensor cu_seqlens_k;  // (sequences + 1)
  Tensor seqused_k;     // optional (sequences): keys of each sequence that are used, counted from its first
  std::optional<int64_t> max_seqlen_q;  // the host's hints for plan(); the kernels take the truth from cu_seqlens
  std::optional<int64_t> max_seqlen_k;

  Layout layout = Layout::bshd;
  bool causal = false;                  // query i sees key j only if j <= i + (seqlen_k - seqlen_q): bottom right
  std::optional<int64_t> window_left;   // keys a query sees before its own position; empty: all
  std::optional<int64_t> window_right;  // and after
  std::optional<double> scale;          // empty: 1 / sqrt(head_dim)
  double softcap = 0.0;                 // c > 0: scores become c · tanh(score / c); 0: off
  bool batch_invariant = false;         // a sequence gets the same bits whatever shares its batch
  Backend backend = Backend::automatic;
  void* stream = nullptr;  // cudaStream_t on CUDA devices

  bool varlen() const { return cu_seqlens_q.present(); }
};

// A problem's extents, whatever its layout.
struct Sizes {
  int64_t batch = 0;  // sequences, when variable-length
  int64_t heads_q = 0, heads_k = 0;
  int64_t seqlen_q = 0, seqlen_k = 0;  // variable-length: the host's hints, or else the total lengths
  int64_t total_q = 0, total_k = 0;    // rows of query and of key over all sequences
  int64_t head_dim = 0, head_dim_v = 0;
};

// The extents of a problem whose ranks are right (validate() has seen it).
Sizes sizes(const Problem& problem);

// The merge of partial results over disjoint sets of keys: out = Σ exp(lse_i − lse) out_i, lse = log Σ exp(lse_i).
struct CombineProblem {
  static constexpr int max_parts = 64;

  std::vector<Tensor> outs;  // 1 to 64, of one shape and dtype: 4-D in `layout`, or 3-D (total, heads, head_dim)
  std::vector<Tensor> lses;  // float32, contiguous: (batch, heads, sequence), or (heads, total)
  Tensor out;                // of the shape and dtype of outs[0]
  Tensor lse;                // of the shape of lses[0]
  Layout layout = Layout::bshd;
  void* stream = nullptr;
};

}  // namespace flashcore

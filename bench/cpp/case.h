// SPDX-License-Identifier: Apache-2.0
// One problem of the benchmark: its sizes and options, its arrays on a machine, and its work in operations and bytes.
#pragma once

#include <cstdint>
#include <optional>
#include <string>
#include <vector>

#include "flashcore/flashcore.h"
#include "machine.h"

namespace flashcore::bench {

struct Case {
  int64_t batch = 1, heads = 1, seqlen = 1, head_dim = 64;
  int64_t heads_k = 0;            // 0: heads
  int64_t seqlen_k = 0;           // 0: seqlen
  std::vector<int64_t> varlen{};  // lengths of `batch` sequences packed one after another; seqlen is the longest
  DType dtype = float16;
  bool causal = false;
  std::optional<int64_t> window_left{}, window_right{};
  std::optional<double> scale{};
  double softcap = 0.0;
  Backend backend = Backend::automatic;

  int64_t kv_heads() const { return heads_k ? heads_k : heads; }
  int64_t keys() const { return seqlen_k ? seqlen_k : seqlen; }
  int64_t total_q() const;  // rows of all sequences
  int64_t total_k() const;
  int64_t query_elements() const { return total_q() * heads * head_dim; }
  int64_t key_elements() const { return total_k() * kv_heads() * head_dim; }
  // Of q, k, v and o, each once.
  double bytes() const { return 2.0 * (query_elements() + key_elements()) * dtype.bytes(); }
  // 4 · head_dim for every query, head and key seen. Causal alone counts half of all keys, as the peers' figures do.
  double flops() const;
  // "1, 8, 512, 64 fp16 causal"
  std::string label() const;
  Json::Members to_json() const;
};

// The queries and keys of a sequence, as rows of the arrays.
struct Sequence {
  int64_t q_begin, queries, k_begin, keys;
};
std::vector<Sequence> sequences(const Case& c);

// Sets of random arrays on a machine, (batch, seqlen, heads, head_dim) contiguous, or (total, heads, head_dim).
// The outputs begin as NaN: a row that nobody writes shows.
class Arrays {
 public:
  // As many sets as make `rotate` bytes, at least one.
  Arrays(Machine& machine, const Case& c, double rotate, uint64_t seed);

  int sets() const { return static_cast<int>(problems_.size()); }
  // The problem of a set, on this stream.
  Problem problem(int set, void* stream) const;

  // Set 0 on the host, elements in the array's dtype.
  std::vector<char> query() const { return host(problems_[0].query); }
  std::vector<char> key() const { return host(problems_[0].key); }
  std::vector<char> value() const { return host(problems_[0].value); }
  std::vector<char> out() const { return host(problems_[0].out); }
  // Makes set 0's output NaN again.
  void poison();
  // Gives the machine's memory back. No problem may run after it.
  void release() { machine_.release(); }

 private:
  std::vector<char> host(const Tensor& t) const;
  Machine& machine_;
  std::vector<Problem> problems_;
};

}  // namespace flashcore::bench

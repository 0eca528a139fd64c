// SPDX-License-Identifier: Apache-2.0
// The extents of a KvCacheProblem and the kernel arguments made of it.
#include "flashcore/kvcache.h"

#include "core/kvcache_params.h"
#include "core/problem_facts.h"

namespace flashcore {
namespace {

// The problem of queries over `key` and `value`, without what is particular to a cache.
Problem over(const KvCacheProblem& problem, const Tensor& key, const Tensor& value) {
  Problem forward = options_of(problem);
  forward.key = key;
  forward.value = value;
  return forward;
}

// A problem of one kind with the queries, results and options of one of the other.
template <class To, class From>
To with_options_of(const From& problem) {
  To to;
  to.query = problem.query;
  to.out = problem.out;
  to.lse = problem.lse;
  to.layout = problem.layout;
  to.causal = problem.causal;
  to.window_left = problem.window_left;
  to.window_right = problem.window_right;
  to.scale = problem.scale;
  to.softcap = problem.softcap;
  to.batch_invariant = problem.batch_invariant;
  to.backend = problem.backend;
  to.stream = problem.stream;
  return to;
}

// An array of the keys, or of the values, of all pages of each sequence.
Tensor together(const KvCacheProblem& problem) {
  Sizes const s = sizes(problem);
  int const sequence = sequence_axis(problem.layout), heads = 3 - sequence;
  Tensor tensor = problem.key_cache;
  tensor.shape[0] = s.batch;
  tensor.shape[sequence] = s.seqlen_k;
  tensor.stride[3] = 1;
  tensor.stride[heads] = s.head_dim;
  tensor.stride[sequence] = s.heads_k * s.head_dim;
  tensor.stride[0] = s.seqlen_k * tensor.stride[sequence];
  return tensor;
}

}  // namespace

Problem options_of(const KvCacheProblem& problem) {
  auto options = with_options_of<Problem>(problem);
  options.key = problem.key_cache;
  options.value = problem.value_cache;
  return options;
}

KvCacheProblem cache_of(const Problem& problem) {
  auto cache = with_options_of<KvCacheProblem>(problem);
  cache.key_cache = problem.key;
  cache.value_cache = problem.value;
  return cache;
}

Problem forward_of(const KvCacheProblem& problem) {
  Problem forward = options_of(problem);
  forward.seqused_k = problem.cache_seqlens;
  if (problem.paged()) forward.key = forward.value = together(problem);
  return forward;
}

Sizes sizes(const KvCacheProblem& problem) {
  Sizes s = sizes(options_of(problem));
  if (problem.paged()) s.seqlen_k *= problem.page_table.shape[1];
  s.total_k = 0;  // nobody's business: it is in cache_seqlens
  return s;
}

int64_t new_tokens(const KvCacheProblem& problem) {
  return problem.key.present() ? problem.key.shape[sequence_axis(problem.layout)] : 0;
}

KvCacheParams kvcache_params(const KvCacheProblem& problem) {
  Sizes const s = sizes(problem);
  KvCacheParams p{};
  static_cast<ForwardParams&>(p) = forward_params(options_of(problem));
  p.seqlen_k = static_cast<int32_t>(s.seqlen_k);
  p.batch_invariant = problem.batch_invariant;
  p.cache_seqlens = static_cast<int32_t const*>(problem.cache_seqlens.data);
  auto const writable = [](Rows<void const*> const& rows) {
    return Rows<void*>{const_cast<void*>(rows.data), rows.batch_stride, rows.row_stride, rows.head_stride};
  };
  p.k_out = writable(p.k);
  p.v_out = writable(p.v);
  if (problem.paged()) {
    Tensor const& table = problem.page_table;
    p.page_table = static_cast<int32_t const*>(table.data);
    p.page_table_stride = table.shape[0] > 1 ? table.stride[0] : 0;
    p.pages = static_cast<int32_t>(problem.key_cache.shape[0]);
    p.page_size = static_cast<int32_t>(problem.key_cache.shape[sequence_axis(problem.layout)]);
  }
  if (int64_t const count = new_tokens(problem); count > 0) {
    ForwardParams const appended = forward_params(over(problem, problem.key, problem.value));
    p.new_tokens = static_cast<int32_t>(count);
    p.new_k = appended.k;
    p.new_v = appended.v;
  }
  return p;
}

}  // namespace flashcore

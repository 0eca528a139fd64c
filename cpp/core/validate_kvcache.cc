// SPDX-License-Identifier: Apache-2.0
// What attention over a cache refuses.
#include "core/checks.h"
#include "flashcore/kvcache.h"

namespace flashcore {
namespace {

void check_page_table(const KvCacheProblem& problem, int64_t page_size) {
  Tensor const& table = problem.page_table;
  if (table.dtype != int32) throw TypeError("page_table: got dtype " + to_string(table.dtype) + "; expected int32");
  check_ndim("page_table", table, 2, "(batch, pages a sequence)");
  check_device("page_table", table, "query", problem.query);
  check_extent("page_table", "batch", table.shape[0], "query", problem.query.shape[0]);
  if (table.shape[1] > 1 && !empty(table) && table.stride[1] != 1) {
    refuse("page_table", "got a last stride of " + std::to_string(table.stride[1]) + "; expected 1");
  }
  if (page_size != 16 && page_size != 64 && page_size != 128 && page_size != 256) {
    refuse("key_cache", "has pages of " + std::to_string(page_size) + " tokens; expected 16, 64, 128 or 256");
  }
  if (problem.key_cache.shape[0] > max_pairs) {
    refuse("key_cache", "has " + std::to_string(problem.key_cache.shape[0]) + " pages; expected at most 2^31 - 1");
  }
}

// The arrays `key` and `value` of one cache or one call: alike but for nothing, with query's heads and head_dim.
void check_pair(const Named& key, const Named& value, const Tensor& query) {
  for (int i = 0; i < 4; ++i) {
    if (key.tensor.shape[i] != value.tensor.shape[i]) {
      refuse(value.name, "got shape " + shape_of(value.tensor) + ", " + key.name + " has " + shape_of(key.tensor) +
                             "; expected them to be equal");
    }
  }
  check_extent(key.name, "head_dim", key.tensor.shape[3], "query", query.shape[3]);
}

}  // namespace

void validate(const KvCacheProblem& problem) {
  Tensor const &q = problem.query, &cache = problem.key_cache, &k = problem.key;
  Named const all_inputs[] = {{"query", q},
                              {"key_cache", cache},
                              {"value_cache", problem.value_cache},
                              {"key", k},
                              {"value", problem.value},
                              {"cache_seqlens", problem.cache_seqlens},
                              {"page_table", problem.page_table}};
  auto const inputs = std::span(all_inputs).first(k.present() ? 5 : 3);
  if (k.present() != problem.value.present()) {
    refuse(k.present() ? "value" : "key", "is missing; expected key and value both, or neither");
  }
  char const* const axes = axes_of(problem.layout);
  check_inputs(inputs, 4, axes);
  check_lengths("cache_seqlens", problem.cache_seqlens, q, q.shape[0]);
  Problem const options = options_of(problem);
  check_options(options);
  check_backend(options);

  int const sequence = sequence_axis(problem.layout), heads = 3 - sequence;
  check_head_dim(q);
  check_pair({"key_cache", cache}, {"value_cache", problem.value_cache}, q);
  if (problem.paged()) {
    check_page_table(problem, cache.shape[sequence]);
  } else {
    check_extent("key_cache", "batch", cache.shape[0], "query", q.shape[0]);
  }
  if (k.present()) {
    check_pair({"key", k}, {"value", problem.value}, q);
    check_extent("key", "batch", k.shape[0], "query", q.shape[0]);
    check_extent("key", "number of heads", k.shape[heads], "key_cache", cache.shape[heads]);
  }
  check_heads("key_cache", q.shape[0], q.shape[heads], cache.shape[heads]);

  // Positions within a sequence are 32-bit in the kernels; offsets are 64-bit.
  bool const many_pages = problem.paged() && problem.page_table.shape[1] > unlimited / cache.shape[sequence];
  if (many_pages || cache.shape[sequence] > unlimited) {
    refuse(problem.paged() ? "page_table" : "key_cache",
           "a sequence's part of the cache holds more than 2^30 = 1073741824 tokens; expected at most as many");
  }
  if (q.shape[sequence] > unlimited) {
    refuse("query", "sequence length is " + std::to_string(q.shape[sequence]) + "; expected at most 2^30 = 1073741824");
  }
  Sizes const s = sizes(problem);
  if (new_tokens(problem) > s.seqlen_k) {
    refuse("key", "has " + std::to_string(new_tokens(problem)) + " tokens, a sequence's part of the cache holds " +
                      std::to_string(s.seqlen_k) + "; expected at most as many");
  }
  for (auto const& [name, tensor] : inputs) check_strides(name, tensor, q.device.type == DeviceType::cuda);

  if (new_tokens(problem) > 0) {  // the caches are written to
    for (Named const& target : inputs.subspan(1, 2)) {
      check_target(target.name, target.tensor);
      for (int i : {0, 3, 4, 5, 6}) check_apart(target.name, target.tensor, all_inputs[i].name, all_inputs[i].tensor);
    }
  }
  int64_t const lse_shape[] = {s.batch, s.heads_q, s.seqlen_q};
  check_results(problem.out, problem.lse, q, s.head_dim_v, lse_shape, axes, all_inputs);
}

}  // namespace flashcore

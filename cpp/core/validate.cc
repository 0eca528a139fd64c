// SPDX-License-Identifier: Apache-2.0
// The only place that refuses input, together with validate_kvcache.cc. Each message names the argument, what it got
// and what was expected.
#include <cstdlib>
#include <vector>

#include "core/checks.h"
#include "flashcore/flashcore.h"

namespace flashcore {

void validate(const Problem& problem) {
  bool const varlen = problem.varlen();
  Tensor const &q = problem.query, &k = problem.key, &v = problem.value;
  Named const all_inputs[] = {{"query", q},
                              {"key", k},
                              {"value", v},
                              {"cu_seqlens_q", problem.cu_seqlens_q},
                              {"cu_seqlens_k", problem.cu_seqlens_k},
                              {"seqused_k", problem.seqused_k}};
  auto const inputs = std::span(all_inputs).first<3>();
  const char* const axes = varlen ? "(total tokens, heads, head_dim)" : axes_of(problem.layout);
  check_inputs(inputs, varlen ? 3 : 4, axes);

  if (varlen) {
    if (!problem.cu_seqlens_k.present()) refuse("cu_seqlens_k", "is missing; expected it beside cu_seqlens_q");
    check_lengths("cu_seqlens_q", problem.cu_seqlens_q, q, -1);
    if (problem.cu_seqlens_q.shape[0] < 1) {
      refuse("cu_seqlens_q", "got shape (0,); expected (sequences + 1,), starting with 0");
    }
    check_lengths("cu_seqlens_k", problem.cu_seqlens_k, q, problem.cu_seqlens_q.shape[0]);
    if (problem.seqused_k.present()) {
      check_lengths("seqused_k", problem.seqused_k, q, problem.cu_seqlens_q.shape[0] - 1);
    }
  }
  check_options(problem);
  check_backend(problem);

  Sizes const s = sizes(problem);
  int const batch_axis = 0, tokens_axis = varlen ? 0 : sequence_axis(problem.layout);
  int const heads_axis = varlen ? 1 : problem.layout == Layout::bshd ? 2 : 1, dim_axis = q.ndim - 1;

  check_head_dim(q);
  check_extent("key", "head_dim", k.shape[dim_axis], "query", s.head_dim);
  check_extent("value", "head_dim", v.shape[dim_axis], "query", s.head_dim);
  if (!varlen) {
    check_extent("key", "batch", k.shape[batch_axis], "query", s.batch);
    check_extent("value", "batch", v.shape[batch_axis], "query", s.batch);
  }
  check_extent("value", varlen ? "number of tokens" : "sequence length", v.shape[tokens_axis], "key",
               k.shape[tokens_axis]);
  check_extent("value", "number of heads", v.shape[heads_axis], "key", s.heads_k);
  // Positions within a sequence are 32-bit in the kernels; offsets are 64-bit.
  for (auto const& [name, tensor] : inputs) {
    if (tensor.shape[tokens_axis] > unlimited) {
      refuse(name, std::string(varlen ? "number of tokens" : "sequence length") + " is " +
                       std::to_string(tensor.shape[tokens_axis]) + "; expected at most 2^30 = 1073741824");
    }
  }
  check_heads("key", s.batch, s.heads_q, s.heads_k);
  for (auto const& [name, tensor] : inputs) check_strides(name, tensor, q.device.type == DeviceType::cuda);

  int64_t const fixed_lse[] = {s.batch, s.heads_q, s.seqlen_q}, varlen_lse[] = {s.heads_q, s.total_q};
  auto const lse_shape = varlen ? std::span<int64_t const>(varlen_lse) : std::span<int64_t const>(fixed_lse);
  check_results(problem.out, problem.lse, q, s.head_dim_v, lse_shape, axes, all_inputs);
}

void validate(const CombineProblem& problem) {
  size_t const parts = problem.outs.size();
  if (parts < 1 || parts > CombineProblem::max_parts) {
    refuse("outs", "got " + std::to_string(parts) + " arrays; expected 1 to 64");
  }
  if (problem.lses.size() != parts) {
    refuse("lses", "got " + std::to_string(problem.lses.size()) + " arrays, outs has " + std::to_string(parts) +
                       "; expected as many");
  }
  Tensor const& first = problem.outs[0];
  if (first.device.type == DeviceType::other) {
    refuse("outs[0]", "is on " + to_string(first.device) + "; expected an array on the CPU or a CUDA device");
  }
  bool const varlen = first.ndim == 3;
  bool const gpu = first.device.type == DeviceType::cuda;
  std::vector<int64_t> lse_shape;
  auto const check_out = [&](const std::string& name, const Tensor& t) {
    check_dtype(name.c_str(), t, true);
    check_same_dtype(name.c_str(), t, "outs[0]", first);
    check_device(name.c_str(), t, "outs[0]", first);
    if (t.ndim != 3 && t.ndim != 4) check_ndim(name.c_str(), t, 4, "or 3: (total tokens, heads, head_dim)");
    if (t.ndim != first.ndim || !std::equal(t.shape, t.shape + t.ndim, first.shape)) {
      refuse(name, "got shape " + shape_of(t) + ", outs[0] has " + shape_of(first) + "; expected them to be equal");
    }
    check_strides(name.c_str(), t, gpu);
  };
  auto const check_lse = [&](const std::string& name, const Tensor& t) {
    if (t.dtype != float32) throw TypeError(name + ": got dtype " + to_string(t.dtype) + "; expected float32");
    check_device(name.c_str(), t, "outs[0]", first);
    bool right =
        t.ndim == static_cast<int>(lse_shape.size()) && std::equal(lse_shape.begin(), lse_shape.end(), t.shape);
    if (!right) {
      refuse(name, "got shape " + shape_of(t) + " for outs of shape " + shape_of(first) + "; expected " +
                       (varlen ? "(heads, total tokens)" : "(batch, heads, queries)"));
    }
    int64_t stride = 1;
    for (int i = t.ndim - 1; i >= 0; stride *= t.shape[i--]) {
      if (t.shape[i] > 1 && t.stride[i] != stride && !empty(t))
        refuse(name, "is not contiguous; expected a contiguous array");
    }
  };
  for (size_t i = 0; i < parts; ++i) check_out("outs[" + std::to_string(i) + "]", problem.outs[i]);
  lse_shape = varlen                           ? std::vector{first.shape[1], first.shape[0]}
              : problem.layout == Layout::bshd ? std::vector{first.shape[0], first.shape[2], first.shape[1]}
                                               : std::vector{first.shape[0], first.shape[1], first.shape[2]};
  int64_t const dim = first.shape[first.ndim - 1];
  if (dim < 1 || dim > max_head_dim || (gpu && dim % 8 != 0)) {
    refuse("outs[0]", "head_dim is " + std::to_string(dim) +
                          (gpu ? "; expected a multiple of 8 from 8 to 256 on a GPU" : "; expected 1 to 256"));
  }
  for (size_t i = 0; i < parts; ++i) check_lse("lses[" + std::to_string(i) + "]", problem.lses[i]);
  double rows = 1;
  for (int64_t n : lse_shape) rows *= static_cast<double>(n);
  if (rows > 1LL << 40) refuse("outs[0]", "has " + number(rows) + " rows; expected at most 2^40");

  if (problem.out.present()) {
    check_out("out", problem.out);
    check_target("out", problem.out);
  }
  if (problem.lse.present()) {
    check_lse("lse", problem.lse);
    check_target("lse", problem.lse);
  }
  for (size_t i = 0; i < parts; ++i) {
    std::string const index = "[" + std::to_string(i) + "]";
    if (problem.out.present()) {
      check_apart("out", problem.out, ("outs" + index).c_str(), problem.outs[i]);
      check_apart("out", problem.out, ("lses" + index).c_str(), problem.lses[i]);
    }
    if (problem.lse.present()) {
      check_apart("lse", problem.lse, ("outs" + index).c_str(), problem.outs[i]);
      check_apart("lse", problem.lse, ("lses" + index).c_str(), problem.lses[i]);
    }
  }
}

bool check_requested() {
  char const* const value = std::getenv("FLASHCORE_CHECK");
  return value != nullptr && value[0] != '\0' && std::string(value) != "0";
}

}  // namespace flashcore

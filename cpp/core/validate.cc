// SPDX-License-Identifier: Apache-2.0
// The only place that refuses input. Each message names the argument, what it got and what was expected.
#include <algorithm>
#include <cmath>
#include <cstdlib>
#include <limits>
#include <string>

#include "attention/mask.h"
#include "core/problem_facts.h"
#include "flashcore/flashcore.h"

namespace flashcore {
namespace {

constexpr int64_t max_head_dim = 256;
constexpr int64_t gpu_alignment = 16;  // bytes: what one cp.async or vector load moves
constexpr int64_t max_pairs = std::numeric_limits<int32_t>::max();

std::string number(double x) {
  std::string text = std::to_string(x);
  if (text.find('.') != std::string::npos) {
    text.erase(text.find_last_not_of('0') + 1);
    if (text.back() == '.') text.pop_back();
  }
  return text;
}

std::string shape_of(const Tensor& t) {
  std::string text = "(";
  for (int i = 0; i < std::min(t.ndim, Tensor::max_ndim); ++i) {
    if (i) text += ", ";
    text += std::to_string(t.shape[i]);
  }
  return text + (t.ndim == 1 ? ",)" : ")");
}

[[noreturn]] void refuse(const std::string& name, const std::string& what) { throw ValueError(name + ": " + what); }

void check_ndim(const char* name, const Tensor& t, int ndim, const char* axes) {
  if (t.ndim != ndim) {
    refuse(name, "got " + std::to_string(t.ndim) + " dimensions, shape " + shape_of(t) + "; expected " +
                     std::to_string(ndim) + ", " + axes);
  }
}

bool empty(const Tensor& t) {
  return std::any_of(t.shape, t.shape + t.ndim, [](int64_t n) { return n == 0; });
}

void check_device(const char* name, const Tensor& t, const char* first_name, const Tensor& first) {
  if (t.device != first.device) {
    refuse(name, "is on " + to_string(t.device) + ", " + first_name + " on " + to_string(first.device) +
                     "; expected all arrays on one device");
  }
}

void check_dtype(const char* name, const Tensor& t, bool one_of_ours_on_any_device = false) {
  if (t.dtype != float32 && t.dtype != float16 && t.dtype != bfloat16) {
    throw TypeError(std::string(name) + ": got dtype " + to_string(t.dtype) +
                    "; expected float16 or bfloat16, or float32 on the CPU");
  }
  if (!one_of_ours_on_any_device && t.dtype == float32 && t.device.type == DeviceType::cuda) {
    throw TypeError(std::string(name) + ": got dtype float32 on " + to_string(t.device) +
                    "; expected float16 or bfloat16 on a GPU: cast with .to(bfloat16) or .to(float16)");
  }
}

void check_same_dtype(const char* name, const Tensor& t, const char* first_name, const Tensor& first) {
  if (t.dtype != first.dtype) {
    throw TypeError(std::string(name) + ": got dtype " + to_string(t.dtype) + ", " + first_name + " has " +
                    to_string(first.dtype) + "; expected the same dtype");
  }
}

// Rows of consecutive elements; on a GPU each at a multiple of 16 bytes.
void check_strides(const char* name, const Tensor& t, bool aligned) {
  int const last = t.ndim - 1;
  if (empty(t)) return;
  if (t.shape[last] > 1 && t.stride[last] != 1) {
    refuse(name, "got a last stride of " + std::to_string(t.stride[last]) + "; expected 1 (each row contiguous)");
  }
  if (!aligned) return;
  if (reinterpret_cast<uintptr_t>(t.data) % gpu_alignment != 0) {
    refuse(name, "its memory starts " + std::to_string(reinterpret_cast<uintptr_t>(t.data) % gpu_alignment) +
                     " bytes past a multiple of 16; expected 16-byte alignment on a GPU");
  }
  for (int i = 0; i < last; ++i) {
    // In elements modulo 16 first, so that no product overflows.
    if (t.shape[i] > 1 && (t.stride[i] % gpu_alignment) * t.dtype.bytes() % gpu_alignment != 0) {
      refuse(name, "got a stride of " + std::to_string(t.stride[i]) + " elements in dimension " + std::to_string(i) +
                       "; expected rows aligned to 16 bytes on a GPU, a multiple of " +
                       std::to_string(gpu_alignment / t.dtype.bytes()) + " elements");
    }
  }
}

// First byte and one past the last that the elements of a tensor occupy; an empty interval for an empty tensor. In
// floating point, since extents times strides may pass 64 bits and only far-apart intervals are that large.
struct Bytes {
  double begin, end;
};
Bytes bytes_of(const Tensor& t) {
  if (empty(t) || t.data == nullptr) return {0, 0};
  // Offsets from the data pointer are exact here below 2^53; two arrays are compared through their pointers'
  // difference.
  double low = 0, high = 0;
  for (int i = 0; i < t.ndim; ++i) {
    double const reach = static_cast<double>(t.shape[i] - 1) * static_cast<double>(t.stride[i]);
    (reach < 0 ? low : high) += reach;
  }
  return {low * t.dtype.bytes(), (high + 1) * t.dtype.bytes()};
}

bool overlap(const Tensor& a, const Tensor& b) {
  Bytes const x = bytes_of(a), y = bytes_of(b);
  if (x.begin == x.end || y.begin == y.end) return false;
  double const apart = static_cast<double>(reinterpret_cast<intptr_t>(b.data) - reinterpret_cast<intptr_t>(a.data));
  return x.begin < apart + y.end && apart + y.begin < x.end;
}

// Whether two different indices of the tensor may name the same element. Exact for axes that nest, which are all that
// slicing and transposing make.
bool overlaps_itself(const Tensor& t) {
  auto const magnitude = [&](int i) {
    return t.stride[i] < 0 ? -static_cast<double>(t.stride[i]) : static_cast<double>(t.stride[i]);
  };
  int order[Tensor::max_ndim], axes = 0;  // the axes with more than one index, by growing stride
  for (int i = 0; i < t.ndim; ++i) {
    if (t.shape[i] <= 1) continue;
    int at = axes++;
    for (; at > 0 && magnitude(order[at - 1]) > magnitude(i); --at) order[at] = order[at - 1];
    order[at] = i;
  }
  double reach = 0;
  for (int i = 0; i < axes; ++i) {
    if (magnitude(order[i]) <= reach) return true;
    reach += magnitude(order[i]) * static_cast<double>(t.shape[order[i]] - 1);
  }
  return false;
}

void check_target(const char* name, const Tensor& t) {
  if (t.read_only) refuse(name, "is read-only; expected an array that can be written");
  if (!empty(t) && overlaps_itself(t)) {
    refuse(name, "several of its elements share memory (an expanded array); expected an array that can be written");
  }
}

void check_apart(const char* name, const Tensor& target, const char* input_name, const Tensor& input) {
  if (input.present() && overlap(target, input)) {
    refuse(name, "its memory overlaps that of " + std::string(input_name) + "; expected memory of its own");
  }
}

// int32 values on the arrays' device, contiguous.
void check_lengths(const char* name, const Tensor& t, const Tensor& query, int64_t expected) {
  if (t.dtype != int32) {
    throw TypeError(std::string(name) + ": got dtype " + to_string(t.dtype) + "; expected int32");
  }
  check_ndim(name, t, 1, expected < 0 ? "(sequences + 1,)" : ("(" + std::to_string(expected) + ",)").c_str());
  check_device(name, t, "query", query);
  if (expected >= 0 && t.shape[0] != expected) {
    refuse(name, "got shape " + shape_of(t) + "; expected (" + std::to_string(expected) + ",)");
  }
  if (t.shape[0] > 1 && t.stride[0] != 1) {
    refuse(name, "got a stride of " + std::to_string(t.stride[0]) + "; expected contiguous values");
  }
}

// The extent of one axis of key or value against what query or key has.
void check_extent(const char* name, const char* what, int64_t got, const char* other, int64_t expected) {
  if (got != expected) {
    refuse(name, std::string(what) + " is " + std::to_string(got) + ", " + other + "'s is " + std::to_string(expected) +
                     "; expected them to be equal");
  }
}

void check_options(const Problem& problem) {
  if (problem.scale && !std::isfinite(*problem.scale)) {
    refuse("scale", "got " + number(*problem.scale) + "; expected a finite number");
  }
  if (problem.scale && !std::isfinite(static_cast<float>(*problem.scale))) {
    refuse("scale", "got " + number(*problem.scale) + "; expected a number that float32 can hold");
  }
  if (!(problem.softcap >= 0.0) || !std::isfinite(static_cast<float>(problem.softcap))) {
    refuse("softcap", "got " + number(problem.softcap) + "; expected a finite number, 0 (off) or larger");
  }
  for (auto const& side : {problem.window_left, problem.window_right}) {
    if (side && *side < 0) {
      refuse("window", "got " + std::to_string(*side) + "; expected numbers of keys, 0 or larger, or None");
    }
  }
  for (auto const& [name, hint] :
       {std::pair{"max_seqlen_q", problem.max_seqlen_q}, {"max_seqlen_k", problem.max_seqlen_k}}) {
    if (hint && *hint < 0) refuse(name, "got " + std::to_string(*hint) + "; expected 0 or larger");
  }
}

void check_backend(const Problem& problem) {
  DeviceType const device = problem.query.device.type;
  bool const fits =
      problem.backend == Backend::automatic || (problem.backend == Backend::cpu) == (device == DeviceType::cpu);
  if (!fits) {
    refuse("backend", std::string("got \"") + to_string(problem.backend) + "\" for arrays on " +
                          to_string(problem.query.device) + "; expected " +
                          (device == DeviceType::cpu ? "\"cpu\" or None" : "\"sm80\", \"sm90\" or None"));
  }
}

}  // namespace

void validate(const Problem& problem) {
  bool const varlen = problem.varlen();
  struct Named {
    const char* name;
    const Tensor& tensor;
  };
  Named const inputs[] = {{"query", problem.query}, {"key", problem.key}, {"value", problem.value}};
  const char* const axes = varlen                           ? "(total tokens, heads, head_dim)"
                           : problem.layout == Layout::bshd ? "(batch, sequence, heads, head_dim)"
                                                            : "(batch, heads, sequence, head_dim)";

  if (problem.query.device.type == DeviceType::other) {
    refuse("query", "is on " + to_string(problem.query.device) + "; expected an array on the CPU or a CUDA device");
  }
  for (auto const& [name, tensor] : inputs) check_dtype(name, tensor);
  for (auto const& [name, tensor] : inputs) check_same_dtype(name, tensor, "query", problem.query);
  for (auto const& [name, tensor] : inputs) check_ndim(name, tensor, varlen ? 3 : 4, axes);
  for (auto const& [name, tensor] : inputs) check_device(name, tensor, "query", problem.query);

  if (varlen) {
    if (!problem.cu_seqlens_k.present()) refuse("cu_seqlens_k", "is missing; expected it beside cu_seqlens_q");
    check_lengths("cu_seqlens_q", problem.cu_seqlens_q, problem.query, -1);
    if (problem.cu_seqlens_q.shape[0] < 1) {
      refuse("cu_seqlens_q", "got shape (0,); expected (sequences + 1,), starting with 0");
    }
    check_lengths("cu_seqlens_k", problem.cu_seqlens_k, problem.query, problem.cu_seqlens_q.shape[0]);
    if (problem.seqused_k.present()) {
      check_lengths("seqused_k", problem.seqused_k, problem.query, problem.cu_seqlens_q.shape[0] - 1);
    }
  }
  check_options(problem);
  check_backend(problem);

  Sizes const s = sizes(problem);
  bool const gpu = problem.query.device.type == DeviceType::cuda;
  Tensor const &q = problem.query, &k = problem.key, &v = problem.value;
  int const batch_axis = 0, sequence_axis = varlen ? 0 : problem.layout == Layout::bshd ? 1 : 2;
  int const heads_axis = varlen ? 1 : problem.layout == Layout::bshd ? 2 : 1, dim_axis = q.ndim - 1;

  if (s.head_dim < 1 || s.head_dim > max_head_dim || (gpu && s.head_dim % 8 != 0)) {
    refuse("query", "head_dim is " + std::to_string(s.head_dim) +
                        (gpu ? "; expected a multiple of 8 from 8 to 256 on a GPU" : "; expected 1 to 256"));
  }
  check_extent("key", "head_dim", k.shape[dim_axis], "query", s.head_dim);
  check_extent("value", "head_dim", v.shape[dim_axis], "query", s.head_dim);
  if (!varlen) {
    check_extent("key", "batch", k.shape[batch_axis], "query", s.batch);
    check_extent("value", "batch", v.shape[batch_axis], "query", s.batch);
  }
  check_extent("value", varlen ? "number of tokens" : "sequence length", v.shape[sequence_axis], "key",
               k.shape[sequence_axis]);
  check_extent("value", "number of heads", v.shape[heads_axis], "key", s.heads_k);
  if (s.heads_k == 0 ? s.heads_q != 0 : s.heads_q % s.heads_k != 0) {
    refuse("key", "has " + std::to_string(s.heads_k) + " heads, query " + std::to_string(s.heads_q) +
                      "; expected a number that divides query's (grouped-query attention)");
  }

  // Positions within a sequence and the number of (sequence, head) pairs are 32-bit in the kernels; offsets are 64-bit.
  for (auto const& [name, tensor] : inputs) {
    if (tensor.shape[sequence_axis] > unlimited) {
      refuse(name, std::string(varlen ? "number of tokens" : "sequence length") + " is " +
                       std::to_string(tensor.shape[sequence_axis]) + "; expected at most 2^30 = 1073741824");
    }
  }
  if (s.batch > max_pairs || s.heads_q > max_pairs || (s.heads_q > 0 && s.batch > max_pairs / s.heads_q)) {
    refuse("query", "batch " + std::to_string(s.batch) + " times heads " + std::to_string(s.heads_q) +
                        " passes 2^31 - 1; expected fewer");
  }
  for (auto const& [name, tensor] : inputs) check_strides(name, tensor, gpu);

  if (problem.out.present()) {
    Tensor const& out = problem.out;
    check_same_dtype("out", out, "query", q);
    check_ndim("out", out, q.ndim, axes);
    check_device("out", out, "query", q);
    for (int i = 0; i < q.ndim; ++i) {
      if (out.shape[i] != (i == dim_axis ? s.head_dim_v : q.shape[i])) {
        refuse("out", "got shape " + shape_of(out) + "; expected " + shape_of(q));
      }
    }
    check_strides("out", out, gpu);
    check_target("out", out);
    for (auto const& [name, tensor] : inputs) check_apart("out", out, name, tensor);
    check_apart("out", out, "cu_seqlens_q", problem.cu_seqlens_q);
    check_apart("out", out, "cu_seqlens_k", problem.cu_seqlens_k);
    check_apart("out", out, "seqused_k", problem.seqused_k);
  }
  if (problem.lse.present()) {
    Tensor const& lse = problem.lse;
    if (lse.dtype != float32) throw TypeError("lse: got dtype " + to_string(lse.dtype) + "; expected float32");
    check_device("lse", lse, "query", q);
    std::vector<int64_t> const shape =
        varlen ? std::vector{s.heads_q, s.total_q} : std::vector{s.batch, s.heads_q, s.seqlen_q};
    bool right = lse.ndim == static_cast<int>(shape.size()) && std::equal(shape.begin(), shape.end(), lse.shape);
    int64_t stride = 1;
    for (int i = lse.ndim - 1; right && i >= 0; stride *= lse.shape[i--])
      right = lse.shape[i] <= 1 || lse.stride[i] == stride;
    if (!right) {
      refuse("lse", "got shape " + shape_of(lse) + "; expected a contiguous " +
                        (varlen ? "(heads, total tokens)" : "(batch, heads, queries)"));
    }
    check_target("lse", lse);
    for (auto const& [name, tensor] : inputs) check_apart("lse", lse, name, tensor);
    check_apart("lse", lse, "out", problem.out);
  }
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

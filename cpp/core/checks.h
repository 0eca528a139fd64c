// SPDX-License-Identifier: Apache-2.0
// The checks that the validations of all problems share. Each message names the argument, what it got and what was
// expected.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <limits>
#include <span>
#include <string>
#include <utility>

#include "attention/mask.h"
#include "core/problem_facts.h"
#include "flashcore/error.h"
#include "flashcore/problem.h"

namespace flashcore {
namespace {

constexpr int64_t max_head_dim = 256;
constexpr int64_t gpu_alignment = 16;  // bytes: what one cp.async or vector load moves
constexpr int64_t max_pairs = std::numeric_limits<int32_t>::max();

inline std::string number(double x) {
  std::string text = std::to_string(x);
  if (text.find('.') != std::string::npos) {
    text.erase(text.find_last_not_of('0') + 1);
    if (text.back() == '.') text.pop_back();
  }
  return text;
}

inline std::string shape_of(const Tensor& t) {
  std::string text = "(";
  for (int i = 0; i < std::min(t.ndim, Tensor::max_ndim); ++i) {
    if (i) text += ", ";
    text += std::to_string(t.shape[i]);
  }
  return text + (t.ndim == 1 ? ",)" : ")");
}

[[noreturn]] inline void refuse(const std::string& name, const std::string& what) {
  throw ValueError(name + ": " + what);
}

inline void check_ndim(const char* name, const Tensor& t, int ndim, const char* axes) {
  if (t.ndim != ndim) {
    refuse(name, "got " + std::to_string(t.ndim) + " dimensions, shape " + shape_of(t) + "; expected " +
                     std::to_string(ndim) + ", " + axes);
  }
}

inline bool empty(const Tensor& t) {
  return std::any_of(t.shape, t.shape + t.ndim, [](int64_t n) { return n == 0; });
}

inline void check_device(const char* name, const Tensor& t, const char* first_name, const Tensor& first) {
  if (t.device != first.device) {
    refuse(name, "is on " + to_string(t.device) + ", " + first_name + " on " + to_string(first.device) +
                     "; expected all arrays on one device");
  }
}

inline void check_dtype(const char* name, const Tensor& t, bool one_of_ours_on_any_device = false) {
  if (t.dtype != float32 && t.dtype != float16 && t.dtype != bfloat16) {
    throw TypeError(std::string(name) + ": got dtype " + to_string(t.dtype) +
                    "; expected float16 or bfloat16, or float32 on the CPU");
  }
  if (!one_of_ours_on_any_device && t.dtype == float32 && t.device.type == DeviceType::cuda) {
    throw TypeError(std::string(name) + ": got dtype float32 on " + to_string(t.device) +
                    "; expected float16 or bfloat16 on a GPU: cast with .to(bfloat16) or .to(float16)");
  }
}

inline void check_same_dtype(const char* name, const Tensor& t, const char* first_name, const Tensor& first) {
  if (t.dtype != first.dtype) {
    throw TypeError(std::string(name) + ": got dtype " + to_string(t.dtype) + ", " + first_name + " has " +
                    to_string(first.dtype) + "; expected the same dtype");
  }
}

// Rows of consecutive elements; on a GPU each at a multiple of 16 bytes.
inline void check_strides(const char* name, const Tensor& t, bool aligned) {
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
inline Bytes bytes_of(const Tensor& t) {
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

inline bool overlap(const Tensor& a, const Tensor& b) {
  Bytes const x = bytes_of(a), y = bytes_of(b);
  if (x.begin == x.end || y.begin == y.end) return false;
  double const apart = static_cast<double>(reinterpret_cast<intptr_t>(b.data) - reinterpret_cast<intptr_t>(a.data));
  return x.begin < apart + y.end && apart + y.begin < x.end;
}

// Whether two different indices of the tensor may name the same element. Exact for axes that nest, which are all that
// slicing and transposing make.
inline bool overlaps_itself(const Tensor& t) {
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

inline void check_target(const char* name, const Tensor& t) {
  if (t.read_only) refuse(name, "is read-only; expected an array that can be written");
  if (!empty(t) && overlaps_itself(t)) {
    refuse(name, "several of its elements share memory (an expanded array); expected an array that can be written");
  }
}

inline void check_apart(const char* name, const Tensor& target, const char* input_name, const Tensor& input) {
  if (input.present() && overlap(target, input)) {
    refuse(name, "its memory overlaps that of " + std::string(input_name) + "; expected memory of its own");
  }
}

// int32 values on the arrays' device, contiguous.
inline void check_lengths(const char* name, const Tensor& t, const Tensor& query, int64_t expected) {
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
inline void check_extent(const char* name, const char* what, int64_t got, const char* other, int64_t expected) {
  if (got != expected) {
    refuse(name, std::string(what) + " is " + std::to_string(got) + ", " + other + "'s is " + std::to_string(expected) +
                     "; expected them to be equal");
  }
}

inline void check_options(const Problem& problem) {
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

inline void check_backend(const Problem& problem) {
  DeviceType const device = problem.query.device.type;
  bool const fits =
      problem.backend == Backend::automatic || (problem.backend == Backend::cpu) == (device == DeviceType::cpu);
  if (!fits) {
    refuse("backend", std::string("got \"") + to_string(problem.backend) + "\" for arrays on " +
                          to_string(problem.query.device) + "; expected " +
                          (device == DeviceType::cpu ? "\"cpu\" or None" : "\"sm80\", \"sm90\" or None"));
  }
}

struct Named {
  const char* name;
  const Tensor& tensor;
};

inline const char* axes_of(Layout layout) {
  return layout == Layout::bshd ? "(batch, sequence, heads, head_dim)" : "(batch, heads, sequence, head_dim)";
}

// Arrays of queries, keys and values: what can be judged of each without the others' extents.
inline void check_inputs(std::span<const Named> inputs, int ndim, const char* axes) {
  const Tensor& query = inputs[0].tensor;
  if (query.device.type == DeviceType::other) {
    refuse("query", "is on " + to_string(query.device) + "; expected an array on the CPU or a CUDA device");
  }
  for (auto const& [name, tensor] : inputs) check_dtype(name, tensor);
  for (auto const& [name, tensor] : inputs) check_same_dtype(name, tensor, "query", query);
  for (auto const& [name, tensor] : inputs) check_ndim(name, tensor, ndim, axes);
  for (auto const& [name, tensor] : inputs) check_device(name, tensor, "query", query);
}

inline void check_head_dim(const Tensor& query) {
  int64_t const head_dim = query.shape[query.ndim - 1];
  bool const gpu = query.device.type == DeviceType::cuda;
  if (head_dim < 1 || head_dim > max_head_dim || (gpu && head_dim % 8 != 0)) {
    refuse("query", "head_dim is " + std::to_string(head_dim) +
                        (gpu ? "; expected a multiple of 8 from 8 to 256 on a GPU" : "; expected 1 to 256"));
  }
}

// Grouped-query attention, and the number of (sequence, head) pairs, which is 32-bit in the kernels.
inline void check_heads(const char* key_name, int64_t batch, int64_t heads_q, int64_t heads_k) {
  if (heads_k == 0 ? heads_q != 0 : heads_q % heads_k != 0) {
    refuse(key_name, "has " + std::to_string(heads_k) + " heads, query " + std::to_string(heads_q) +
                         "; expected a number that divides query's (grouped-query attention)");
  }
  if (batch > max_pairs || heads_q > max_pairs || (heads_q > 0 && batch > max_pairs / heads_q)) {
    refuse("query", "batch " + std::to_string(batch) + " times heads " + std::to_string(heads_q) +
                        " passes 2^31 - 1; expected fewer");
  }
}

// What is written, where present: its shape and place, apart from every input. `out` has query's shape but for the last
// extent, head_dim_v.
inline void check_results(const Tensor& out, const Tensor& lse, const Tensor& query, int64_t head_dim_v,
                          std::span<const int64_t> lse_shape, const char* axes, std::span<const Named> inputs) {
  if (out.present()) {
    check_same_dtype("out", out, "query", query);
    check_ndim("out", out, query.ndim, axes);
    check_device("out", out, "query", query);
    for (int i = 0; i < query.ndim; ++i) {
      if (out.shape[i] != (i == query.ndim - 1 ? head_dim_v : query.shape[i])) {
        refuse("out", "got shape " + shape_of(out) + "; expected " + shape_of(query));
      }
    }
    check_strides("out", out, query.device.type == DeviceType::cuda);
    check_target("out", out);
    for (auto const& [name, tensor] : inputs) check_apart("out", out, name, tensor);
  }
  if (lse.present()) {
    if (lse.dtype != float32) throw TypeError("lse: got dtype " + to_string(lse.dtype) + "; expected float32");
    check_device("lse", lse, "query", query);
    bool right =
        lse.ndim == static_cast<int>(lse_shape.size()) && std::equal(lse_shape.begin(), lse_shape.end(), lse.shape);
    int64_t stride = 1;
    for (int i = lse.ndim - 1; right && i >= 0; stride *= lse.shape[i--])
      right = lse.shape[i] <= 1 || lse.stride[i] == stride;
    if (!right) {
      refuse("lse", "got shape " + shape_of(lse) + "; expected a contiguous " +
                        (lse_shape.size() == 2 ? "(heads, total tokens)" : "(batch, heads, queries)"));
    }
    check_target("lse", lse);
    for (auto const& [name, tensor] : inputs) check_apart("lse", lse, name, tensor);
    check_apart("lse", lse, "out", out);
  }
}

}  // namespace
}  // namespace flashcore

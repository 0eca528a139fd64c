// SPDX-License-Identifier: Apache-2.0
// The merge of partial results, one output row at a time, the parts in their order.
#include <algorithm>

#include "attention/combine.h"
#include "cpu/cpu.h"
#include "cpu/element.h"
#include "cpu/environment.h"
#include "cpu/thread_pool.h"

namespace flashcore::cpu {
namespace {

// A row's place: lse is contiguous in the order (batch, head, token), the arrays are in any.
struct Place {
  int64_t batch, head, token;
};

template <typename T>
T* row_of(const Tensor& array, Layout layout, Place at) {
  T* const data = static_cast<T*>(array.data);
  if (array.ndim == 3) return data + at.token * array.stride[0] + at.head * array.stride[1];
  int const token = layout == Layout::bshd ? 1 : 2;
  return data + at.batch * array.stride[0] + at.token * array.stride[token] + at.head * array.stride[3 - token];
}

template <typename T>
void combine_row(const CombineProblem& problem, int64_t index, Place at) {
  constexpr int chunk = 256;
  int const parts = static_cast<int>(problem.outs.size());
  float weights[CombineProblem::max_parts];
  float largest = minus_infinity();
  for (const Tensor& lse : problem.lses) largest = std::max(largest, static_cast<const float*>(lse.data)[index]);
  float sum = 0.0f;
  for (int i = 0; i < parts; ++i) {
    weights[i] = part_weight(static_cast<const float*>(problem.lses[i].data)[index], largest);
    sum += weights[i];
  }
  float const inverse = sum == 0.0f ? 0.0f : 1.0f / sum;

  T* const out = row_of<T>(problem.out, problem.layout, at);
  int64_t const head_dim = problem.out.shape[problem.out.ndim - 1];
  for (int64_t begin = 0; begin < head_dim; begin += chunk) {
    int const n = static_cast<int>(std::min<int64_t>(chunk, head_dim - begin));
    float total[chunk] = {};
    for (int i = 0; i < parts; ++i) {
      if (weights[i] == 0.0f) continue;  // whatever a part without keys holds
      const T* const from = row_of<const T>(problem.outs[i], problem.layout, at) + begin;
      for (int d = 0; d < n; ++d) total[d] += weights[i] * to_float(from[d]);
    }
    narrow(total, inverse, n, out + begin);
  }
  static_cast<float*>(problem.lse.data)[index] = merged_lse(largest, sum);
}

template <typename T>
void combine_all(const CombineProblem& problem) {
  const Tensor& out = problem.out;
  bool const flat = out.ndim == 3;
  int const token = flat ? 0 : problem.layout == Layout::bshd ? 1 : 2;
  int64_t const tokens = out.shape[token];
  int64_t const heads = out.shape[flat ? 1 : 3 - token];
  int64_t const rows = (flat ? 1 : out.shape[0]) * heads * tokens;
  constexpr int64_t rows_of_task = 64;
  parallel_for((rows + rows_of_task - 1) / rows_of_task, [&](int64_t task) {
    DefaultFloats const environment;
    int64_t const end = std::min(rows, (task + 1) * rows_of_task);
    for (int64_t i = task * rows_of_task; i < end; ++i) {
      combine_row<T>(problem, i, {i / (heads * tokens), i / tokens % heads, i % tokens});
    }
  });
}

}  // namespace

void combine(const CombineProblem& problem) {
  DType const dtype = problem.out.dtype;
  if (dtype == float32) return combine_all<float>(problem);
  if (dtype == float16) return combine_all<Half>(problem);
  combine_all<BFloat>(problem);
}

}  // namespace flashcore::cpu

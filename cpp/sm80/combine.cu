// SPDX-License-Identifier: Apache-2.0
// Merges partial results over disjoint keys: one warp a row (sequence, head, query), the parts in order.
#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include "attention/combine.h"
#include "core/cuda_check.h"
#include "flashcore/error.h"
#include "sm80/sm80.h"

namespace flashcore::sm80 {
namespace {

constexpr int warps = 4;
constexpr int elements = 8;  // a lane: 256 / 32

// The arguments. An array's row (s, h, q) starts at s · batch + h · head + q · row elements.
struct CombineParams {
  struct Part {
    void const* out;   // (batch, queries, heads, head_dim), any strides
    float const* lse;  // (batch, heads, queries), contiguous
    int64_t batch, row, head;
  };
  Part parts[CombineProblem::max_parts];
  void* out;
  float* lse;
  int64_t out_batch, out_row, out_head;
  int64_t rows;  // batch · heads · queries
  int64_t queries;
  int heads, head_dim, count;
};

__device__ float to_float(float x) { return x; }
__device__ float to_float(__half x) { return __half2float(x); }
__device__ float to_float(__nv_bfloat16 x) { return __bfloat162float(x); }
__device__ void from_float(float& to, float x) { to = x; }
__device__ void from_float(__half& to, float x) { to = __float2half_rn(x); }
__device__ void from_float(__nv_bfloat16& to, float x) { to = __float2bfloat16_rn(x); }

template <class Element>
__global__ void __launch_bounds__(32 * warps) combine_kernel(__grid_constant__ CombineParams const p) {
  int const lane = threadIdx.x % 32;
  int64_t const step = int64_t{gridDim.x} * warps;
  for (int64_t row = int64_t{blockIdx.x} * warps + threadIdx.x / 32; row < p.rows; row += step) {
    int64_t const query = row % p.queries, pair = row / p.queries, head = pair % p.heads, sequence = pair / p.heads;

    float max_lse = minus_infinity();
    for (int i = 0; i < p.count; ++i) {
      float const lse = p.parts[i].lse[row];
      max_lse = lse > max_lse || lse != lse ? lse : max_lse;  // a NaN stays
    }
    float total = 0.0f, sum[elements] = {};
    for (int i = 0; i < p.count; ++i) {
      auto const& part = p.parts[i];
      float const weight = part_weight(part.lse[row], max_lse);
      if (weight == 0.0f) continue;  // saw no key: its output counts for nothing, whatever it holds
      total += weight;
      Element const* const out =
          static_cast<Element const*>(part.out) + sequence * part.batch + head * part.head + query * part.row;
#pragma unroll
      for (int e = 0; e < elements; ++e) {
        if (lane + 32 * e < p.head_dim) sum[e] += weight * to_float(out[lane + 32 * e]);
      }
    }
    float const inverse = total == 0.0f ? 0.0f : 1.0f / total;
    Element* const out = static_cast<Element*>(p.out) + sequence * p.out_batch + head * p.out_head + query * p.out_row;
#pragma unroll
    for (int e = 0; e < elements; ++e) {
      if (lane + 32 * e < p.head_dim) from_float(out[lane + 32 * e], sum[e] * inverse);
    }
    if (lane == 0) p.lse[row] = merged_lse(max_lse, total);
  }
}

}  // namespace

void combine(const CombineProblem& problem) {
  Tensor const& first = problem.outs[0];
  bool const varlen = first.ndim == 3;
  int const row_axis = varlen ? 0 : problem.layout == Layout::bshd ? 1 : 2;
  int const head_axis = varlen ? 1 : problem.layout == Layout::bshd ? 2 : 1;
  auto const batch_stride = [&](Tensor const& t) { return varlen ? 0 : t.stride[0]; };

  CombineParams p{};
  p.count = static_cast<int>(problem.outs.size());
  for (int i = 0; i < p.count; ++i) {
    Tensor const& out = problem.outs[i];
    p.parts[i] = {out.data, static_cast<float const*>(problem.lses[i].data), batch_stride(out), out.stride[row_axis],
                  out.stride[head_axis]};
  }
  p.out = problem.out.data;
  p.lse = static_cast<float*>(problem.lse.data);
  p.out_batch = batch_stride(problem.out);
  p.out_row = problem.out.stride[row_axis];
  p.out_head = problem.out.stride[head_axis];
  p.queries = first.shape[row_axis];
  p.heads = static_cast<int>(first.shape[head_axis]);
  p.head_dim = static_cast<int>(first.shape[first.ndim - 1]);
  p.rows = (varlen ? 1 : first.shape[0]) * p.queries * p.heads;
  if (p.rows == 0) return;

  auto const stream = static_cast<cudaStream_t>(problem.stream);
  int64_t const wanted = (p.rows + warps - 1) / warps;
  auto const blocks = static_cast<unsigned>(wanted < 1 << 20 ? wanted : 1 << 20);
  if (first.dtype == float32)
    combine_kernel<float><<<blocks, 32 * warps, 0, stream>>>(p);
  else if (first.dtype == float16)
    combine_kernel<__half><<<blocks, 32 * warps, 0, stream>>>(p);
  else
    combine_kernel<__nv_bfloat16><<<blocks, 32 * warps, 0, stream>>>(p);
  cuda_check(cudaGetLastError(), "launching the combine kernel");
}

}  // namespace flashcore::sm80

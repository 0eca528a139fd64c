// SPDX-License-Identifier: Apache-2.0
// What several rungs share: where a block's arrays lie, elements as float32, reductions, tiles of rows brought to
// shared memory, the launch.
#pragma once

#include <type_traits>

#include "attention/mask.h"
#include "attention/score.h"
#include "attention/softmax.h"
#include "core/cuda_check.h"
#include "core/forward_params.h"
#include "flashcore/tensor.h"
#include "sm80/tensor_core.h"

namespace flashcore::ladder {

using sm80::copy_async, sm80::copy_commit, sm80::copy_wait_all, sm80::load_matrices, sm80::load_matrices_transposed,
    sm80::multiply, sm80::Precision, sm80::SharedTile;

// --- where a block works ---------------------------------------------------------------------------------------------

// Block index -> (sequence, head, tile of queries). The tiles of a head follow one another, so that blocks at work at
// the same time share keys and values in the caches, and the last tile comes first: under a causal mask it is longest.
struct Place {
  int sequence, head, tile;

  static __device__ __forceinline__ Place of(ForwardParams const& p, int tile_q) {
    int block;  // read anew at every call: a kernel short of registers need not keep what is derived from it
    asm volatile("mov.u32 %0, %%ctaid.x;" : "=r"(block));
    int const tiles = ceil_div(p.seqlen_q, tile_q);
    int const pair = block / tiles;
    return {pair / p.heads_q, pair % p.heads_q, tiles - 1 - block % tiles};
  }
};

inline int64_t blocks_of(ForwardParams const& p, int tile_q) {
  return int64_t{p.batch} * p.heads_q * ceil_div(p.seqlen_q, tile_q);
}

// The first row of a head.
template <class Element>
__device__ Element const* rows_of(Rows<void const*> const& array, int sequence, int head) {
  return static_cast<Element const*>(array.data) + sequence * array.batch_stride + head * array.head_stride;
}
template <class Element>
__device__ Element* rows_of(Rows<void*> const& array, int sequence, int head) {
  return static_cast<Element*>(array.data) + sequence * array.batch_stride + head * array.head_stride;
}

__device__ inline Mask mask_of(ForwardParams const& p) {
  return Mask::make(p.seqlen_q, p.seqlen_k, p.window_left, p.window_right);
}

// --- elements --------------------------------------------------------------------------------------------------------

__device__ inline float to_float(__half x) { return __half2float(x); }
__device__ inline float to_float(__nv_bfloat16 x) { return __bfloat162float(x); }

template <class Element>
__device__ Element from_float(float x) {
  if constexpr (std::is_same_v<Element, __half>)
    return __float2half_rn(x);
  else
    return __float2bfloat16_rn(x);
}

// Two elements, and eight of 16 bytes, as float32.
template <class Element>
__device__ __forceinline__ float2 widen(uint32_t packed) {
  if constexpr (std::is_same_v<Element, __half>)
    return __half22float2(reinterpret_cast<__half2 const&>(packed));
  else  // bfloat16 is the upper half of a float32
    return {__uint_as_float(packed << 16), __uint_as_float(packed & 0xffff0000u)};
}
template <class Element>
__device__ __forceinline__ void widen(uint4 const& packed, float (&x)[8]) {
  uint32_t const words[4] = {packed.x, packed.y, packed.z, packed.w};
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    float2 const pair = widen<Element>(words[i]);
    x[2 * i] = pair.x;
    x[2 * i + 1] = pair.y;
  }
}

template <class Element>
__device__ __forceinline__ uint4 narrow(float const (&x)[8]) {
  using P = Precision<Element>;
  return {P::pack(x[0], x[1]), P::pack(x[2], x[3]), P::pack(x[4], x[5]), P::pack(x[6], x[7])};
}

__device__ inline uint4 load16(void const* from) { return *static_cast<uint4 const*>(from); }

// --- reductions ------------------------------------------------------------------------------------------------------

struct Max {
  __device__ float operator()(float a, float b) const { return fmaxf(a, b); }
};
struct Sum {
  __device__ float operator()(float a, float b) const { return a + b; }
};

// Over the lanes whose numbers differ in the bits from `lowest` up to below `end`; every one of them gets the result.
template <int lowest = 1, int end = 32, class Operation>
__device__ __forceinline__ float reduce_lanes(float x, Operation operation) {
#pragma unroll
  for (int bit = lowest; bit < end; bit *= 2) x = operation(x, __shfl_xor_sync(0xffffffffu, x, bit));
  return x;
}

// Over the threads of a block; all get the result. `shared` has room for a float of each warp and is free again only
// after the block's next __syncthreads.
template <int warps, class Operation>
__device__ float reduce_block(float x, float* shared, Operation operation) {
  x = reduce_lanes(x, operation);
  if (threadIdx.x % 32 == 0) shared[threadIdx.x / 32] = x;
  __syncthreads();
  x = shared[0];
#pragma unroll
  for (int w = 1; w < warps; ++w) x = operation(x, shared[w]);
  return x;
}

// --- tiles in shared memory ------------------------------------------------------------------------------------------

// Starts copying `rows` rows of an array, from row `first` on, into a tile. Rows from `end` on are cleared, so that a
// weight of zero meets no NaN there.
template <int head_dim, int rows, int threads, class Element>
__device__ __forceinline__ void load_tile(uint32_t tile, Element const* array, int64_t stride, int first, int end) {
  constexpr int chunks = head_dim / 8;
  static_assert(rows * chunks % threads == 0);
#pragma unroll
  for (int pass = 0; pass < rows * chunks / threads; ++pass) {
    int const index = pass * threads + threadIdx.x;
    int const row = index / chunks, chunk = index % chunks;
    bool const inside = first + row < end;
    copy_async(tile + SharedTile<head_dim>::offset(row, chunk), array + (inside ? first + row : 0) * stride + chunk * 8,
               inside);
  }
}

__device__ inline uint32_t shared_address(void const* p) { return static_cast<uint32_t>(__cvta_generic_to_shared(p)); }

// --- launch ----------------------------------------------------------------------------------------------------------

// Calls run(element, head_dim), both as types: for (float16, 64) run(__half{}, integral_constant<int, 64>{}).
template <class Function>
void instance(DType dtype, int head_dim, Function run) {
  auto const of_element = [&](auto element) {
    if (head_dim == 64)
      run(element, std::integral_constant<int, 64>{});
    else
      run(element, std::integral_constant<int, 128>{});
  };
  if (dtype == float16)
    of_element(__half{});
  else
    of_element(__nv_bfloat16{});
}

// Launches a kernel of (ForwardParams, PlainScore), a block for each tile of `tile_q` queries of each head.
template <class Kernel>
void launch(Kernel kernel, ForwardParams const& p, int tile_q, int threads, int shared_memory, void* stream) {
  cuda_check(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, shared_memory),
             "preparing a kernel of the ladder");
  kernel<<<static_cast<unsigned>(blocks_of(p, tile_q)), threads, shared_memory, static_cast<cudaStream_t>(stream)>>>(
      p, PlainScore::make(p.scale, 0.0f));
  cuda_check(cudaGetLastError(), "launching a kernel of the ladder");
}

}  // namespace flashcore::ladder

// SPDX-License-Identifier: Apache-2.0
// A warp's tensor-core products and how their operands lie in shared memory and registers.
//
// The atom multiplies 16 x 16 by 16 x 8 and adds to 16 x 8 (cute::SM80_16x8x16_…, PTX mma.m16n8k16). Lane l of the warp
// holds
//   of an accumulator   rows l / 4 and l / 4 + 8, columns 2 (l % 4) and the next:  {(r, c), (r, c + 1), (r + 8, c), (r
//   + 8, c + 1)} of a left operand   the same of two accumulators side by side, packed in pairs: four registers of a
//   right operand  two registers of column l / 4.
// So two accumulators of the first product, packed, are one left operand of the second.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cstdint>
#include <cute/arch/mma_sm80.hpp>

namespace flashcore::sm80 {

// Element types of the products: float16 and bfloat16, accumulated in float32.
template <class Element>
struct Precision;

template <>
struct Precision<__half> {
  using Atom = cute::SM80_16x8x16_F32F16F16F32_TN;
  static __device__ uint32_t pack(float low, float high) {
    __half2 const pair = __floats2half2_rn(low, high);
    return reinterpret_cast<uint32_t const&>(pair);
  }
};

template <>
struct Precision<__nv_bfloat16> {
  using Atom = cute::SM80_16x8x16_F32BF16BF16F32_TN;
  static __device__ uint32_t pack(float low, float high) {
    __nv_bfloat162 const pair = __floats2bfloat162_rn(low, high);
    return reinterpret_cast<uint32_t const&>(pair);
  }
};

// accumulator += left · right
template <class Element>
__device__ __forceinline__ void multiply(float (&c)[4], uint32_t const (&a)[4], uint32_t b0, uint32_t b1) {
  Precision<Element>::Atom::fma(c[0], c[1], c[2], c[3], a[0], a[1], a[2], a[3], b0, b1, c[0], c[1], c[2], c[3]);
}

// Four 8 x 8 matrices of 2-byte elements; lane l gives the address of row l % 8 of matrix l / 8.
__device__ __forceinline__ void load_matrices(uint32_t (&r)[4], uint32_t address) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
               : "r"(address));
}
__device__ __forceinline__ void load_matrices_transposed(uint32_t (&r)[4], uint32_t address) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
               : "r"(address));
}

// 16 bytes from global to shared memory, asynchronously; zeros where not `wanted`.
__device__ __forceinline__ void copy_async(uint32_t target, void const* source, bool wanted) {
  asm volatile("cp.async.cg.shared.global.L2::128B [%0], [%1], 16, %2;" ::"r"(target), "l"(source),
               "r"(wanted ? 16 : 0));
}
__device__ __forceinline__ void copy_commit() { asm volatile("cp.async.commit_group;"); }
__device__ __forceinline__ void copy_wait_all() { asm volatile("cp.async.wait_group 0;" ::: "memory"); }

// A tile of rows of `head_dim` 2-byte elements in shared memory, in chunks of 16 bytes. The chunks of a row are
// permuted by an exclusive or with bits of the row's number, so that the same chunk of eight consecutive rows lies in
// eight different sets of banks: rows of a multiple of 128 bytes take the three low bits; rows of 64 or 192 bytes, of
// which every second one starts in the middle of the banks, bits 1 and 2.
template <int head_dim>
struct SharedTile {
  static constexpr int row_bytes = 2 * head_dim;
  static constexpr int group = head_dim % 64 == 0 ? 8 : 4;  // chunks that are permuted among themselves
  static_assert(head_dim % 32 == 0);

  static __device__ __forceinline__ uint32_t offset(int row, int chunk) {
    int const key = group == 8 ? row & 7 : (row >> 1) & 3;
    return row * row_bytes + (chunk ^ key) * 16;
  }

  // The offset that is `slices` slices of 16 columns (two chunks) to the right of `offset`, which lies in the first.
  static __device__ __forceinline__ uint32_t right(uint32_t offset, int slices) {
    constexpr int in_group = group / 2;
    return (offset ^ (32 * (slices % in_group))) + 16 * group * (slices / in_group);
  }
};

}  // namespace flashcore::sm80

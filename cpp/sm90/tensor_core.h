// SPDX-License-Identifier: Apache-2.0
// The Hopper instructions that the kernels use: warpgroup products (wgmma) through CuTe's MMA atoms, and how their
// operands lie in shared memory.
//
// A tile of rows lies in shared memory as TMA writes it with its 128-byte swizzle: panels of 64 columns, each panel
// (rows, 64 elements) with rows of 128 bytes, whose 16-byte chunks are permuted by the row modulo 8. Where 64 does not
// divide the columns, panels have 32 and rows 64 bytes (TMA's 64-byte swizzle, chunks permuted by half the row modulo
// 4), or a quarter of them would be zeros. PTX ISA, "Asynchronous warpgroup-level matrix shared memory layout".
#pragma once

#define CUTE_SM90_EXTENDED_MMA_SHAPES_ENABLED  // every multiple of 8 keys or columns, not only the powers of two
#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cstdint>
#include <cute/arch/mma_sm90.hpp>
#include <utility>

namespace flashcore::sm90 {

constexpr int panel_columns = 64;
constexpr int row_bytes = 2 * panel_columns;

// Columns of a panel of rows of `columns`.
constexpr int panel_columns_of(int columns) { return columns % 64 == 0 ? 64 : 32; }

// Our element types in CUTLASS's names, and their packing.
template <class Element>
struct Precision;
template <>
struct Precision<__half> {
  using Cute = cute::half_t;
  static __device__ __forceinline__ uint32_t pack(float low, float high) {
    __half2 const pair = __floats2half2_rn(low, high);
    return reinterpret_cast<uint32_t const&>(pair);
  }
};
template <>
struct Precision<__nv_bfloat16> {
  using Cute = cute::bfloat16_t;
  static __device__ __forceinline__ uint32_t pack(float low, float high) {
    __nv_bfloat162 const pair = __floats2bfloat162_rn(low, high);
    return reinterpret_cast<uint32_t const&>(pair);
  }
};

// A wgmma descriptor of an operand that begins at `address` (bytes, 1024-aligned but for steps inside a panel's row).
// `panel_stride` (bytes) is the distance of its panels where the product's N runs over the columns (values), and is
// ignored where the product's K does (queries, keys). `row` is the bytes of a panel's row; groups of 8 rows lie
// together.
template <int row = row_bytes>
__device__ __forceinline__ uint64_t operand(uint32_t address, uint32_t panel_stride) {
  static_assert(row == 128 || row == 64);
  constexpr uint64_t swizzle = uint64_t{row == 128 ? 1 : 2} << 62, groups_of_8_rows = uint64_t{8 * row / 16} << 32;
  return swizzle | groups_of_8_rows | uint64_t{panel_stride / 16} << 16 | (address >> 4 & 0x3fff);
}

// The operand that begins `bytes` behind `operand` in the same space; its upper half stays a constant.
__device__ __forceinline__ uint64_t behind(uint64_t operand, int bytes) {
  return (operand & 0xffffffff00000000) | (static_cast<uint32_t>(operand) + bytes / 16);
}

namespace wgmma {
using cute::SM90::GMMA::Major;
using cute::SM90::GMMA::ScaleOut;
template <class Element, int n, Major major>
using Shared =
    decltype(cute::SM90::GMMA::ss_op_selector<typename Precision<Element>::Cute, typename Precision<Element>::Cute,
                                              float, cute::Shape<cute::Int<64>, cute::Int<n>, cute::Int<16>>, Major::K,
                                              major>());
template <class Element, int n, Major major>
using Registers =
    decltype(cute::SM90::GMMA::rs_op_selector<typename Precision<Element>::Cute, typename Precision<Element>::Cute,
                                              float, cute::Shape<cute::Int<64>, cute::Int<n>, cute::Int<16>>, Major::K,
                                              major>());
}  // namespace wgmma

// Keeps the compiler from moving reads and writes of registers that a wgmma in flight uses across this point.
template <int n>
__device__ __forceinline__ void hold(float (&x)[n]) {
#pragma unroll
  for (int i = 0; i < n; ++i) cute::warpgroup_fence_operand(x[i]);
}

// Tells the compiler that what the registers hold is of no use, before a product that sets them: ptxas keeps them apart
// from the last product's (at head dimension 64 it found no registers otherwise, C7511).
template <int n>
__device__ __forceinline__ void forget(float (&x)[n]) {
#pragma unroll
  for (int i = 0; i < n; ++i) asm volatile("" : "=f"(x[i])::"memory");
}

// accumulators (+)= 64 rows of queries × n keys, over 16 columns; both operands' K runs along their rows.
template <class Element, int n>
__device__ __forceinline__ void multiply_keys(float (&s)[n / 2], uint64_t q, uint64_t k, bool add) {
  [&]<int... i>(std::integer_sequence<int, i...>) {
    wgmma::Shared<Element, n, wgmma::Major::K>::fma(q, k, s[i]..., add ? wgmma::ScaleOut::One : wgmma::ScaleOut::Zero);
  }(std::make_integer_sequence<int, n / 2>{});
}

// The same with queries from registers: those of 16 columns.
template <class Element, int n>
__device__ __forceinline__ void multiply_keys(float (&s)[n / 2], uint32_t const* q, uint64_t k, bool add) {
  [&]<int... i>(std::integer_sequence<int, i...>) {
    wgmma::Registers<Element, n, wgmma::Major::K>::fma(q[0], q[1], q[2], q[3], k, s[i]...,
                                                       add ? wgmma::ScaleOut::One : wgmma::ScaleOut::Zero);
  }(std::make_integer_sequence<int, n / 2>{});
}

// Reads a warp's 16 rows × 16 columns of a panel at `panel` as such an operand: this lane brings the address of row
// `row`, 16-byte chunk `chunk` (before the swizzle), which are (lane % 16, lane / 16) past the first ones.
template <int bytes>  // of a panel's row
__device__ __forceinline__ void read_operand(uint32_t* x, uint32_t panel, int row, int chunk) {
  int const swizzled = chunk ^ (bytes == 128 ? row % 8 : row / 2 % 4);
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(x[0]), "=r"(x[1]), "=r"(x[2]), "=r"(x[3])
               : "r"(panel + row * bytes + swizzled * 16)
               : "memory");
}

// accumulators += 64 rows of 16 weights × 16 values of n columns.
template <class Element, int n>
__device__ __forceinline__ void multiply_values(float (&o)[n / 2], uint32_t const* weights, uint64_t v) {
  [&]<int... i>(std::integer_sequence<int, i...>) {
    wgmma::Registers<Element, n, wgmma::Major::MN>::fma(weights[0], weights[1], weights[2], weights[3], v, o[i]...,
                                                        wgmma::ScaleOut::One);
  }(std::make_integer_sequence<int, n / 2>{});
}

// accumulators (+)= 64 rows × n columns over 16, both operands from shared memory: rows of a tile whose rows run along
// the product's K (keys times queries), or its columns, whose K runs over the tile's rows (values times weights).
template <class Element, int n, wgmma::Major major>
__device__ __forceinline__ void multiply_shared(float (&s)[n / 2], uint64_t tile, uint64_t other, bool add) {
  using Atom =
      decltype(cute::SM90::GMMA::ss_op_selector<typename Precision<Element>::Cute, typename Precision<Element>::Cute,
                                                float, cute::Shape<cute::Int<64>, cute::Int<n>, cute::Int<16>>, major,
                                                wgmma::Major::K>());
  [&]<int... i>(std::integer_sequence<int, i...>) {
    Atom::fma(tile, other, s[i]..., add ? wgmma::ScaleOut::One : wgmma::ScaleOut::Zero);
  }(std::make_integer_sequence<int, n / 2>{});
}

}  // namespace flashcore::sm90

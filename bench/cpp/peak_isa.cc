// SPDX-License-Identifier: Apache-2.0
// The loops of peak_isa.h for one instruction set (FLASHCORE_CPU_NAMESPACE names it), on the atoms of the kernels.
// Everything but the entry point has internal linkage, as in cpp/cpu/forward_isa.cc.
#include "peak_isa.h"

#include "cpu/atoms.h"
#if defined(__AMX_BF16__)
#include "cpu/amx.h"
#endif

namespace flashcore::bench {
namespace {

using namespace cpu;

// As many chains as the kernel's register block has: more than the latency of a product asks for.
constexpr int rows = block_rows, vectors = panel_vectors;
static_assert(rows * vectors * lanes <= loop_floats);

// x ↦ step(x) in every register.
template <typename Step>
FLASHCORE_HD void repeat(int64_t repetitions, float* registers, Step step) {
  Vec x[rows][vectors];
#pragma GCC unroll 6
  for (int r = 0; r < rows; ++r) {
#pragma GCC unroll 4
    for (int v = 0; v < vectors; ++v) x[r][v] = load(registers + (r * vectors + v) * lanes);
  }
  for (int64_t i = 0; i < repetitions; ++i) {
#pragma GCC unroll 6
    for (int r = 0; r < rows; ++r) {
#pragma GCC unroll 4
      for (int v = 0; v < vectors; ++v) x[r][v] = step(x[r][v]);
    }
  }
#pragma GCC unroll 6
  for (int r = 0; r < rows; ++r) {
#pragma GCC unroll 4
    for (int v = 0; v < vectors; ++v) store(registers + (r * vectors + v) * lanes, x[r][v]);
  }
}

constexpr double operations = 2.0 * rows * vectors * lanes;  // of one repetition, where a lane is one product

double float32_loop(int64_t repetitions, float* registers) {
  Vec const factor = splat(0.75f), addend = splat(0.25f);
  // The sum is the next product's operand: were it the addend, the product would be the same each time.
  repeat(repetitions, registers, [=](Vec x) { return FloatAtom::multiply_add(x, factor, addend); });
  return operations * static_cast<double>(repetitions);
}

// Dot products of vectors.
double vector_loop([[maybe_unused]] int64_t repetitions, [[maybe_unused]] float* registers) {
#if defined(__AVX512BF16__)
  auto const one = BFloatAtom::splat_wide(0x3f803f80), little = BFloatAtom::splat_wide(0x35803580);  // two 2^-20
  repeat(repetitions, registers, [=](Vec x) { return BFloatAtom::multiply_add(one, little, x); });
  return operations * BFloatAtom::depth * static_cast<double>(repetitions);
#else
  return 0;
#endif
}

#if defined(__AMX_BF16__)
// Products of tiles: four results as in the kernel's block, the operands two tiles of numbers that stay small.
double tile_loop(int64_t repetitions, float* registers) {
  TileRegisters const tiles;
  alignas(64) uint32_t little[tile_elements / 2];
  for (uint32_t& pair : little) pair = 0x2f802f80;  // two 2^-32
  // All rows from the first.
  tile_load<0>(registers, 0);
  tile_load<1>(registers, 0);
  tile_load<2>(registers, 0);
  tile_load<3>(registers, 0);
  tile_load<4>(little, 64);
  tile_load<6>(little, 64);
  for (int64_t i = 0; i < repetitions; ++i) {
    tile_multiply_add<0, 4, 6>();
    tile_multiply_add<1, 4, 6>();
    tile_multiply_add<2, 4, 6>();
    tile_multiply_add<3, 4, 6>();
  }
  tile_store<3>(registers, 0);  // all rows to the first
  return 4 * 2.0 * tile_rows * tile_columns * tile_depth * static_cast<double>(repetitions);
}

constexpr ProductLoop bfloat16_loop = tile_loop, bfloat16_dot_loop = vector_loop;
#else
constexpr ProductLoop bfloat16_loop = vector_loop, bfloat16_dot_loop = nullptr;
#endif

float read_loop(const float* from, int64_t count) {
  constexpr int chains = 8;
  static_assert(1024 % (chains * lanes) == 0);
  Vec sums[chains] = {};
  for (const float* p = from; p < from + count; p += chains * lanes) {
#pragma GCC unroll 8
    for (int i = 0; i < chains; ++i) sums[i] = sums[i] + load(p + i * lanes);
  }
  Vec sum = sums[0];
  for (int i = 1; i < chains; ++i) sum = sum + sums[i];
  return sum_across(sum);
}

}  // namespace

namespace FLASHCORE_CPU_NAMESPACE {

extern const PeakLoops peak_loops;
const PeakLoops peak_loops = {float32_loop, bfloat16_loop, bfloat16_dot_loop, read_loop};

}  // namespace FLASHCORE_CPU_NAMESPACE
}  // namespace flashcore::bench

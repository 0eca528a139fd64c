// SPDX-License-Identifier: Apache-2.0
// Products on the processor's tile registers (Intel AMX): 16 rows by 64 bytes each, and one instruction that adds the
// product of two tiles of bfloat16 to a tile of float32. A multiply of float16 or float32 is several of bfloat16: each
// number is the exact sum of two or three of them, its parts.
#pragma once

#include <immintrin.h>

#include "cpu/element.h"
#include "cpu/tile_rows.h"

namespace flashcore::cpu {
namespace {

constexpr int tile_rows = 16;                          // of a tile register
constexpr int tile_columns = 16;                       // of float32; of bfloat16 pairs
constexpr int tile_depth = 32;                         // elements of the inner dimension that one product takes
constexpr int tile_elements = tile_rows * tile_depth;  // bfloat16 of a tile
constexpr int tile_bytes = 2 * tile_elements;
constexpr int tile_floats = tile_rows * tile_columns;
constexpr int amx_block = 32;  // rows and columns of a block: 2 x 2 tiles of the result

// Rows of each tile register, and bytes of a row.
struct TileShapes {
  uint8_t rows[8];
  uint16_t bytes[8];
};
constexpr TileShapes whole_tiles = {{16, 16, 16, 16, 16, 16, 16, 16}, {64, 64, 64, 64, 64, 64, 64, 64}};

// The registers have these shapes while this lives; none is in use before and after, as the calling convention has it
// (they are nobody's across a call).
class TileRegisters {
 public:
  explicit TileRegisters(const TileShapes& shapes = whole_tiles) {
    struct alignas(64) Configuration {
      uint8_t palette = 1, start_row = 0, reserved[14] = {};
      uint16_t row_bytes[16] = {};
      uint8_t rows[16] = {};
    } configuration;
    for (int i = 0; i < 8; ++i) {
      configuration.row_bytes[i] = shapes.bytes[i];
      configuration.rows[i] = shapes.rows[i];
    }
    asm volatile("ldtilecfg %0" ::"m"(configuration));
  }
  ~TileRegisters() { asm volatile("tilerelease" ::: "memory"); }
  TileRegisters(const TileRegisters&) = delete;
  TileRegisters& operator=(const TileRegisters&) = delete;
};

// The compiler's own intrinsics (GCC 12) do not say that they read memory.
template <int tile>
FLASHCORE_HD void tile_zero() {
  asm volatile("tilezero %%tmm%c0" ::"i"(tile));
}
template <int tile>
FLASHCORE_HD void tile_load(const void* from, int64_t row_bytes) {
  asm volatile("tileloadd (%1,%2,1), %%tmm%c0" ::"i"(tile), "r"(from), "r"(row_bytes) : "memory");
}
// Of a tile that lies together. (The compiler would keep the 64 in a vector register and fetch it from there.)
template <int tile>
FLASHCORE_HD void tile_load(const void* from) {
  int64_t row_bytes;
  asm volatile("movl $64, %k0\n\ttileloadd (%1,%0,1), %%tmm%c2" : "=&r"(row_bytes) : "r"(from), "i"(tile) : "memory");
}
// The same past the first-level cache, where what is in use stays.
template <int tile>
FLASHCORE_HD void tile_stream(const void* from) {
  int64_t row_bytes;
  asm volatile("movl $64, %k0\n\ttileloaddt1 (%1,%0,1), %%tmm%c2" : "=&r"(row_bytes) : "r"(from), "i"(tile) : "memory");
}
template <int tile>
FLASHCORE_HD void tile_stream(const void* from, int64_t row_bytes) {
  asm volatile("tileloaddt1 (%1,%2,1), %%tmm%c0" ::"i"(tile), "r"(from), "r"(row_bytes) : "memory");
}
template <int tile>
FLASHCORE_HD void tile_store(void* to, int64_t row_bytes) {
  asm volatile("tilestored %%tmm%c0, (%1,%2,1)" ::"i"(tile), "r"(to), "r"(row_bytes) : "memory");
}
// c += a · b, b with two elements of the inner dimension side by side.
template <int c, int a, int b>
FLASHCORE_HD void tile_multiply_add() {
  asm volatile("tdpbf16ps %%tmm%c2, %%tmm%c1, %%tmm%c0" ::"i"(c), "i"(a), "i"(b));
}

// Which part of the left operand meets which of the right. Neighbours share one, which is then loaded once.
struct Term {
  int left, right;
};

// What products of parts do not stand for: infinity (a part that is 0 makes NaN of it; NaN stays NaN), and numbers too
// large or too small for their parts.
enum Unfit : unsigned { infinite = 1, out_of_range = 2 };

struct SeenUnfit {
  unsigned unfit = 0;

  FLASHCORE_HD void end_rows() {}
};

// The largest magnitude among bfloat16, which NaN and infinity pass.
struct Largest {
  __m512i magnitude = _mm512_setzero_si512();

  FLASHCORE_HD void see(__m512i bits) {
    magnitude = _mm512_max_epu16(magnitude, _mm512_and_si512(bits, _mm512_set1_epi16(0x7fff)));
  }
  FLASHCORE_HD void end_rows() {}
  bool none_but_zeros() const { return _mm512_test_epi16_mask(magnitude, magnitude) == 0; }
  // Whether one of them is 2^exponent or more.
  FLASHCORE_HD bool reaches(int exponent) const {
    return _mm512_cmpge_epu16_mask(magnitude, _mm512_set1_epi16(static_cast<int16_t>((exponent + 127) << 7))) != 0;
  }
};

// Of numbers in two parts the sums over rows of the second parts' squares, sixteen rows at a time. Those of a row with
// infinity or NaN are NaN.
struct SecondParts {
  Vec squares[sixteen] = {};  // lane by lane
  Vec largest = splat(0.0f);  // of the rows before that are finite
  Vec all = splat(0.0f);      // of all rows before

  FLASHCORE_HD void end_rows() {
    Vec const sums = across_each(squares, [](Vec x, Vec y) { return x + y; });
    largest = larger(sums, largest);
    all = all + sums;
    for (Vec& of_row : squares) of_row = splat(0.0f);
  }
  bool infinite_or_nan() const { return _mm512_cmp_ps_mask((__m512)all, (__m512)all, _CMP_UNORD_Q) != 0; }
};

// How elements are parts of bfloat16: split() 32 elements, those of the mask (the others are zeros), to a vector for
// each part, the i-th element and the 16 + i-th side by side where there are two or three parts, and `seen` takes in
// what matters of them, as the row-th of sixteen; split_weights() those of a panel; join() makes elements of results.
// Where `fixed_point`, weights are mostly made by FixedPoint.
template <typename T>
struct Parts;

// Float32 as the multiple of 2^16 (in its bits) that is nearest, half upwards; what remains is exact.
FLASHCORE_HD __m512 nearest_bfloat(__m512 x) {
  __m512i const up = _mm512_add_epi32(_mm512_castps_si512(x), _mm512_set1_epi32(0x8000));
  return _mm512_castsi512_ps(_mm512_and_si512(up, _mm512_set1_epi32(static_cast<int>(0xffff0000u))));
}
// A vector of these bits that is loaded where it is used: as an integer the compiler would make it by a shuffle.
FLASHCORE_HD __m512i bits_of_all(uint32_t bits) {
  return _mm512_castps_si512(_mm512_set1_ps(__builtin_bit_cast(float, bits)));
}
// The upper halves of both, which are bfloat16: dword i has low[i] and high[i].
FLASHCORE_HD __m512i upper_halves(__m512 low, __m512 high) {
  __m512i const moved = _mm512_srli_epi32(_mm512_castps_si512(low), 16);
  __m512i const upper = bits_of_all(0xffff0000u);
  return _mm512_ternarylogic_epi32(moved, _mm512_castps_si512(high), upper, 0xd8);  // upper ? high : moved
}
FLASHCORE_HD __m512 upper_half(__m512 x) {
  return _mm512_castsi512_ps(_mm512_and_si512(_mm512_castps_si512(x), bits_of_all(0xffff0000u)));
}
// What the upper half leaves, exactly.
FLASHCORE_HD __m512 rest_of(__m512 x) { return _mm512_sub_ps(x, upper_half(x)); }

FLASHCORE_HD __mmask32 mask_of(int present) {
  return present >= 32 ? ~__mmask32{0} : (__mmask32{1} << max_of(present, 0)) - 1;
}

// 2^x as a polynomial of f, x = n + f with n the largest integer up to x, which is what both instructions take: so f
// and the product with 2^n are one each. Nothing is limited.
template <int count, int n>
FLASHCORE_HD void exp2_in_range(const float (&terms)[count], Vec (&x)[n]) {
  constexpr int to_floor = _MM_FROUND_TO_NEG_INF | _MM_FROUND_NO_EXC;
  Vec f[n], p[n];
#pragma GCC unroll 4
  for (int i = 0; i < n; ++i) f[i] = (Vec)_mm512_reduce_ps((__m512)x[i], to_floor);
#pragma GCC unroll 4
  for (int i = 0; i < n; ++i) p[i] = splat(terms[count - 1]) * f[i] + splat(terms[count - 2]);
#pragma GCC unroll 8
  for (int k = count - 3; k >= 0; --k) {
#pragma GCC unroll 4
    for (int i = 0; i < n; ++i) p[i] = p[i] * f[i] + splat(terms[k]);
  }
#pragma GCC unroll 4
  for (int i = 0; i < n; ++i) x[i] = (Vec)_mm512_scalef_ps((__m512)p[i], (__m512)x[i]);
}

// Results of operations that would be subnormal are 0 while this lives: processors take long over them.
class FlushedSubnormals {
 public:
  FlushedSubnormals() : saved_(_mm_getcsr()) { _mm_setcsr(saved_ | _MM_FLUSH_ZERO_ON); }
  ~FlushedSubnormals() { _mm_setcsr(saved_); }
  FlushedSubnormals(const FlushedSubnormals&) = delete;
  FlushedSubnormals& operator=(const FlushedSubnormals&) = delete;

 private:
  unsigned saved_;
};

// 32 columns of an output row in their order, where those of values were split() with i and 16 + i side by side and lie
// in tiles as pack_tile_values() has them.
FLASHCORE_HD void in_order(__m512 first, __m512 second, __m512 (&to)[2]) {
  to[0] = _mm512_shuffle_ps(first, second, _MM_SHUFFLE(2, 0, 2, 0));
  to[1] = _mm512_shuffle_ps(first, second, _MM_SHUFFLE(3, 1, 3, 1));
}

// Bfloat16 as it is.
template <>
struct Parts<BFloat> {
  static constexpr int count = 1;
  static constexpr float exp2_terms[] = {0.99992522f, 0.69583354f, 0.22606716f, 0.07802453f};  // to 7.5e-5
  static constexpr bool fixed_point = true, exact_at_reference = false;
  static constexpr Term scores[] = {{0, 0}};
  static constexpr Term outputs[] = {{0, 0}};
  using Seen = Largest;

  FLASHCORE_HD static void split(const BFloat* from, __mmask32 present, __m512i (&to)[count], Seen& seen, int /*row*/) {
    to[0] = _mm512_maskz_loadu_epi16(present, from);
    seen.see(to[0]);
  }
  FLASHCORE_HD static void split_weights(__m512 low, __m512 high, __m512i (&to)[count]) {
    auto const upper = [](__m512 x) { return _mm512_srli_epi32(_mm512_castps_si512(nearest_bfloat(x)), 16); };
    to[0] = _mm512_packus_epi32(upper(low), upper(high));
  }
  // 32 columns of an output row times `factor`, as they lie in tiles (in_order()).
  FLASHCORE_HD static void join(__m512 first, __m512 second, __m512 factor, BFloat* to, __mmask32 present) {
    __m512i const both = (__m512i)_mm512_cvtne2ps_pbh(_mm512_mul_ps(second, factor), _mm512_mul_ps(first, factor));
    __m512i const in_order = _mm512_permutexvar_epi64(_mm512_setr_epi64(0, 4, 1, 5, 2, 6, 3, 7), both);
    if (present == mask_of(32)) {
      _mm512_storeu_si512(to, in_order);
    } else {
      _mm512_mask_storeu_epi16(to, present, in_order);
    }
  }
};

// 11 bits as 8 and 3, so that scores are sums of exact products. Of weights the first 16 bits, and their products leave
// out 2^-15 of the whole at most, mostly 2^-18.
template <>
struct Parts<Half> {
  static constexpr int count = 2;
  static constexpr float exp2_terms[] = {1.0f, 6.93044845e-1f, 2.41280206e-1f, 5.22424727e-2f, 1.34266849e-2f};
  static constexpr bool fixed_point = false, exact_at_reference = false;
  static constexpr Term scores[] = {{0, 0}, {1, 0}, {1, 1}, {0, 1}};
  // Where the products of second parts come to at most so little of an exponent, which is what the product of their
  // rows' norms says: that is if all are as much and of the same sign, and with D numbers at random √D times less. (A
  // weight that is rounded to float16, as PyTorch's and GPUs' are, is off by up to 2^-11.5 of an exponent.)
  static constexpr Term rough_scores[] = {{1, 0}, {0, 0}, {0, 1}};
  static constexpr float negligible = 0x1p-13f;
  static constexpr Term outputs[] = {{0, 1}, {0, 0}, {1, 0}};
  using Seen = SecondParts;

  FLASHCORE_HD static void split(const Half* from, __mmask32 present, __m512i (&to)[count], Seen& seen, int row) {
    __m512i const bits = _mm512_maskz_loadu_epi16(present, from);
    __m512 const low = _mm512_cvtph_ps(_mm512_castsi512_si256(bits));
    __m512 const high = _mm512_cvtph_ps(_mm512_extracti64x4_epi64(bits, 1));
    __m512 const first_low = nearest_bfloat(low), first_high = nearest_bfloat(high);
    to[0] = upper_halves(first_low, first_high);
    __m512 const second_low = _mm512_sub_ps(low, first_low), second_high = _mm512_sub_ps(high, first_high);
    to[1] = upper_halves(second_low, second_high);
    seen.squares[row] = (Vec)_mm512_fmadd_ps(second_low, second_low,
                                             _mm512_fmadd_ps(second_high, second_high, (__m512)seen.squares[row]));
  }
  FLASHCORE_HD static void split_weights(__m512 low, __m512 high, __m512i (&to)[count]) {
    to[0] = upper_halves(low, high);
    to[1] = upper_halves(rest_of(low), rest_of(high));
  }
  FLASHCORE_HD static void join(__m512 first, __m512 second, __m512 factor, Half* to, __mmask32 present) {
    constexpr int nearest = _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC;
    __m512 x[2];
    in_order(_mm512_mul_ps(first, factor), _mm512_mul_ps(second, factor), x);
    __m512i const both =
        _mm512_inserti64x4(_mm512_castsi256_si512(_mm512_cvtps_ph(x[0], nearest)), _mm512_cvtps_ph(x[1], nearest), 1);
    _mm512_mask_storeu_epi16(to, present, both);
  }
};

// 24 bits as 8, 8 and 8. Left out are products of parts that come to 2^-26 of the whole and less: float32's own
// rounding is 2^-25.
template <>
struct Parts<float> {
  static constexpr int count = 3;
  static constexpr float exp2_terms[] = {1.0f,           6.93147044e-1f, 2.40229305e-1f, 5.5485282e-2f,
                                         9.67544939e-3f, 1.24678617e-3f, 2.16128784e-4f};
  static constexpr bool fixed_point = false, exact_at_reference = true;
  static constexpr Term scores[] = {{0, 2}, {0, 1}, {1, 1}, {1, 0}, {0, 0}, {2, 0}};
  static constexpr Term outputs[] = {{0, 2}, {0, 1}, {1, 1}, {1, 0}, {0, 0}, {2, 0}};

  using Seen = SeenUnfit;

  FLASHCORE_HD static void split(const float* from, __mmask32 present, __m512i (&to)[count], Seen& seen, int /*row*/) {
    __m512 const low = _mm512_maskz_loadu_ps(static_cast<__mmask16>(present), from);
    __m512 const high = _mm512_maskz_loadu_ps(static_cast<__mmask16>(present >> 16), from + tile_columns);
    split(low, high, to);
    seen.unfit |= unfit(low) | unfit(high);
  }
  FLASHCORE_HD static void split(__m512 low, __m512 high, __m512i (&to)[count]) {
    __m512 const first_low = nearest_bfloat(low), first_high = nearest_bfloat(high);
    __m512 const rest_low = _mm512_sub_ps(low, first_low), rest_high = _mm512_sub_ps(high, first_high);
    __m512 const second_low = nearest_bfloat(rest_low), second_high = nearest_bfloat(rest_high);
    to[0] = upper_halves(first_low, first_high);
    to[1] = upper_halves(second_low, second_high);
    to[2] = upper_halves(_mm512_sub_ps(rest_low, second_low), _mm512_sub_ps(rest_high, second_high));
  }
  FLASHCORE_HD static void split_weights(__m512 low, __m512 high, __m512i (&to)[count]) {
    __m512 const rest_low = rest_of(low), rest_high = rest_of(high);
    to[0] = upper_halves(low, high);
    to[1] = upper_halves(rest_low, rest_high);
    to[2] = upper_halves(rest_of(rest_low), rest_of(rest_high));
  }
  FLASHCORE_HD static void join(__m512 first, __m512 second, __m512 factor, float* to, __mmask32 present) {
    __m512 x[2];
    in_order(_mm512_mul_ps(first, factor), _mm512_mul_ps(second, factor), x);
    _mm512_mask_storeu_ps(to, static_cast<__mmask16>(present), x[0]);
    _mm512_mask_storeu_ps(to + lanes, static_cast<__mmask16>(present >> 16), x[1]);
  }

 private:
  // What has parts so small that the products take them for 0, and what is so large that sums overflow with weights of
  // up to 2^24: all finite numbers but 0 and those in [2^-100, 2^100).
  FLASHCORE_HD static unsigned unfit(__m512 x) {
    __m512i const magnitude = _mm512_add_epi32(_mm512_castps_si512(x), _mm512_castps_si512(x));
    __m512i const above = _mm512_sub_epi32(magnitude, _mm512_set1_epi32(27 << 24));
    __mmask16 const suspect = _mm512_mask_cmpge_epu32_mask(_mm512_test_epi32_mask(magnitude, magnitude), above,
                                                           _mm512_set1_epi32((227 - 27) << 24));
    if (suspect == 0) return 0;
    __m512i const infinity = _mm512_set1_epi32(static_cast<int>(0xff000000u));
    return (_mm512_cmpeq_epu32_mask(magnitude, infinity) != 0 ? infinite : Unfit{}) |
           (_mm512_mask_cmplt_epu32_mask(suspect, magnitude, infinity) != 0 ? out_of_range : Unfit{});
  }
};

// A tile of ones.
struct OnesTile {
  alignas(64) uint16_t elements[tile_elements];
  constexpr OnesTile() : elements() {
    for (uint16_t& x : elements) x = 127 << 7;
  }
};
constexpr OnesTile ones_tile;

// One step of the inner dimension for a block of the result, tiles 0 to 3: terms [n, count) of `terms`, the left
// operand's parts in tiles 4 and 5, the right one's in 6 and 7. begin(c) stands before the first product of tile c.
// Calls of `beside` stand among the products: what they do runs meanwhile. With one term they stand after each product,
// not after every fourth: the processor looks ahead only so far.
template <const auto& terms, int row_tiles, int n = 0, typename Begin, typename Beside>
FLASHCORE_HD void tile_step(const char* left, const char* right, Begin begin, Beside& beside) {
  constexpr int count = sizeof(terms) / sizeof(Term);
  if constexpr (n < count) {
    constexpr int i = terms[n].left, j = terms[n].right;
    constexpr int i_before = n == 0 ? -1 : terms[n == 0 ? 0 : n - 1].left;
    constexpr int j_before = n == 0 ? -1 : terms[n == 0 ? 0 : n - 1].right;
    if constexpr (n == 0) begin(Constant<0>{});
    if constexpr (j != j_before) tile_stream<6>(right + (2 * j) * tile_bytes);
    if constexpr (i != i_before) tile_load<4>(left + 2 * i * tile_bytes);
    tile_multiply_add<0, 4, 6>();
    if constexpr (count == 1) beside();
    if constexpr (n == 0) begin(Constant<1>{});
    if constexpr (j != j_before) tile_stream<7>(right + (2 * j + 1) * tile_bytes);
    tile_multiply_add<1, 4, 7>();
    if constexpr (count == 1) beside();
    if constexpr (n == 0) begin(Constant<2>{});
    if constexpr (row_tiles == 2) {
      if constexpr (i != i_before) tile_load<5>(left + (2 * i + 1) * tile_bytes);
      tile_multiply_add<2, 5, 6>();
      if constexpr (count == 1) beside();
    }
    if constexpr (n == 0) begin(Constant<3>{});
    if constexpr (row_tiles == 2) tile_multiply_add<3, 5, 7>();
    beside();
    tile_step<terms, row_tiles, n + 1>(left, right, begin, beside);
  }
}

// How often a step of two row tiles calls `beside`.
template <const auto& terms>
constexpr int calls_of_step = sizeof(terms) / sizeof(Term) == 1 ? 4 : sizeof(terms) / sizeof(Term);

// Nothing beside the products.
struct Nothing {
  FLASHCORE_HD void operator()() {}
};

// A block in memory is [column tile][32 rows][16 columns]: a tile lies together.
constexpr int column_floats = amx_block * tile_columns;
constexpr int block_floats = 2 * column_floats;
constexpr int place_in_block(int c) { return c % 2 * column_floats + c / 2 * tile_floats; }

// Computes blocks one after the other. A block's results go to memory while the next one begins, each tile just before
// it is needed: after its last products, with nothing to do meanwhile, they took 64 clocks more.
class TileBlocks {
 public:
  // result = start + left · right, 16 · row_tiles rows with 32 columns over `steps` (at least one) times 32 elements of
  // the inner dimension, both packed as [step][part][2 tiles]. `start`: a block, or null for zeros. The result will be
  // at `to`.
  template <const auto& terms, int parts, int row_tiles, typename Beside>
  FLASHCORE_HD void multiply(const uint16_t* left, const uint16_t* right, int steps, const float* start, float* to,
                             Beside& beside) {
    constexpr int stride = parts * 2 * tile_bytes;
    const char* l = reinterpret_cast<const char*>(left);
    const char* r = reinterpret_cast<const char*>(right);
    if (start) {
      tile_step<terms, row_tiles>(
          l, r,
          [&](auto c) __attribute__((always_inline)) {
            store(c);
            tile_load<decltype(c)::value>(start + place_in_block(decltype(c)::value));
          },
          beside);
    } else {
      tile_step<terms, row_tiles>(
          l, r,
          [&](auto c) __attribute__((always_inline)) {
            store(c);
            tile_zero<decltype(c)::value>();
          },
          beside);
    }
    for (int s = 1; s < steps; ++s) {
      tile_step<terms, row_tiles>(l + s * stride, r + s * stride, [](auto) __attribute__((always_inline)) {}, beside);
    }
    to_ = to;
  }

  // result = start + sums over the inner dimension of `left`, 32 rows as for multiply() in one part: every column of
  // the first tiles (0 and 2) has those of even steps, of the second ones of odd steps.
  template <typename Beside>
  FLASHCORE_HD void sum(const uint16_t* left, int steps, const float* start, float* to, Beside& beside) {
    store(Constant<0>{});
    store(Constant<1>{});
    store(Constant<2>{});
    store(Constant<3>{});
    if (start) {
      tile_load<0>(start + place_in_block(0));
      tile_load<1>(start + place_in_block(1));
      tile_load<2>(start + place_in_block(2));
      tile_load<3>(start + place_in_block(3));
    } else {
      tile_zero<0>();
      tile_zero<1>();
      tile_zero<2>();
      tile_zero<3>();
    }
    tile_load<6>(ones_tile.elements);
    for (int s = 0; s < steps; s += 2, left += 4 * tile_elements) {
      tile_load<4>(left);
      tile_multiply_add<0, 4, 6>();
      beside();
      tile_load<5>(left + tile_elements);
      tile_multiply_add<2, 5, 6>();
      beside();
      if (s + 1 == steps) break;
      tile_load<4>(left + 2 * tile_elements);
      tile_multiply_add<1, 4, 6>();
      beside();
      tile_load<5>(left + 3 * tile_elements);
      tile_multiply_add<3, 5, 6>();
      beside();
    }
    to_ = to;
  }

  // Brings the last results to memory.
  void finish() {
    store(Constant<0>{});
    store(Constant<1>{});
    store(Constant<2>{});
    store(Constant<3>{});
    to_ = nowhere_;
  }

  // `nowhere`: a block for what tiles hold when there is no result.
  explicit TileBlocks(float* nowhere) : nowhere_(nowhere), to_(nowhere) {}

 private:
  template <typename C>
  FLASHCORE_HD void store(C) {
    tile_store<C::value>(to_ + place_in_block(C::value), 64);
  }

  float* nowhere_;
  float* to_;  // where tiles 0 to 3 go, all four
};

}  // namespace
}  // namespace flashcore::cpu

// SPDX-License-Identifier: Apache-2.0
// Rung 3: Q Kᵀ on the tensor cores, still with one query per block. The atom multiplies 16 rows: the query is one of
// them and fifteen are zero, so 15/16 of the first product's work is thrown away. It is faster all the same: the keys
// go from memory to the tensor cores as they are, without conversion, one instruction for 8 keys and 16 columns.
#include "ladder/ladder.h"
#include "ladder/weighted_values.cuh"

namespace flashcore::ladder {
namespace {

constexpr int warps = 4, threads = 32 * warps;
constexpr int group = 8;  // keys of one atom

// The sum over the columns may run in any order, as long as both operands have the same. Lane 4 r + c of the atom
// holds, of key r, columns 2 c, 2 c + 1, 2 c + 8 and 2 c + 9. We let it load columns 8 c to 8 c + 7 of every 32, which
// are 16 consecutive bytes, and call the first four of them those of one atom and the last four those of the next.
template <class Element, int head_dim>
__global__ void __launch_bounds__(threads)
    single_query_mma_kernel(__grid_constant__ ForwardParams const p, __grid_constant__ PlainScore const score) {
  constexpr int together = 256 / head_dim;  // groups of keys that a warp loads at once
  Place const place = Place::of(p, 1);
  Mask const mask = mask_of(p);
  int const query = place.tile;
  int const first = mask.first_key(query), keys = mask.end_key(query) - first;
  Element const* const k = rows_of<Element>(p.k, place.sequence, place.head / p.group) + first * p.k.row_stride;
  Element const* const v = rows_of<Element>(p.v, place.sequence, place.head / p.group) + first * p.v.row_stride;

  extern __shared__ __align__(16) float weights[];
  __shared__ ValuesShared<head_dim, warps> shared;
  int const warp = threadIdx.x / 32, lane = threadIdx.x % 32;

  // The query is row 0 of the left operand, which lanes 0 to 3 hold; all other rows are zero.
  Element const* const query_row = rows_of<Element>(p.q, place.sequence, place.head) + query * p.q.row_stride;
  uint4 q[head_dim / 32] = {};
#pragma unroll
  for (int d = 0; d < head_dim / 32; ++d) {
    if (lane < 4) q[d] = load16(query_row + d * 32 + lane * 8);
  }

  float top = minus_infinity();
  for (int base = warp * group * together; base < keys; base += warps * group * together) {
    uint4 columns[together][head_dim / 32];
#pragma unroll
    for (int g = 0; g < together; ++g) {
      int const key = min_of(base + g * group + lane / 4, keys - 1);  // past the last: any row; its score is dropped
#pragma unroll
      for (int d = 0; d < head_dim / 32; ++d) {
        columns[g][d] = load16(k + key * p.k.row_stride + d * 32 + lane % 4 * 8);
      }
    }
#pragma unroll
    for (int g = 0; g < together; ++g) {
      float s[4] = {};
#pragma unroll
      for (int d = 0; d < head_dim / 32; ++d) {
        uint32_t const left[2][4] = {{q[d].x, 0, q[d].y, 0}, {q[d].z, 0, q[d].w, 0}};
        multiply<Element>(s, left[0], columns[g][d].x, columns[g][d].y);
        multiply<Element>(s, left[1], columns[g][d].z, columns[g][d].w);
      }
      int const key = base + g * group + 2 * lane;  // row 0 of the accumulator: lanes 0 to 3, two keys each
      if (lane < 4 && key < keys) {
        weights[key] = s[0];
        top = fmaxf(top, s[0]);
        if (key + 1 < keys) {
          weights[key + 1] = s[1];
          top = fmaxf(top, s[1]);
        }
      }
    }
  }
  Element* const out = rows_of<Element>(p.o, place.sequence, place.head) + query * p.o.row_stride;
  softmax_and_values<Element>(weights, keys, top, score.factor, v, p.v.row_stride, out, shared);
}

}  // namespace

void single_query_mma(const ForwardParams& p, DType dtype, void* stream) {
  instance(dtype, p.head_dim, [&](auto element, auto head_dim) {
    launch(single_query_mma_kernel<decltype(element), head_dim>, p, 1, threads, 4 * p.seqlen_k, stream);
  });
}

}  // namespace flashcore::ladder

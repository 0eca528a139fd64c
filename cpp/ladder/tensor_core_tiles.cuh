// SPDX-License-Identifier: Apache-2.0
// What rungs 6 and 7 share: 16 queries per block, both products on the tensor cores, and the score tile between them in
// shared memory. They differ in the softmax alone.
//
// Per tile of 64 keys each of four warps computes the scores of 16 keys for all queries, and then a quarter of the
// output's columns over all keys.
#pragma once

#include "ladder/parts.cuh"

namespace flashcore::ladder {

constexpr int tile_q = 16, tile_k = 64;
constexpr int warps = 4, threads = 32 * warps;

// What the softmax reads and writes. Scores have rows of 288 bytes: stores of accumulators, and reads along a row, meet
// no bank twice.
struct SoftmaxShared {
  float scores[tile_q][tile_k + 8];
  __align__(128) char weights[tile_q * SharedTile<tile_k>::row_bytes];  // of the element type, as left operand
  float ratio[tile_q];                                                  // what the output so far is to be multiplied by
  float offset[tile_q];                                                 // of the exponents
  float inverse[tile_q];                                                // of the sums, at the end
};

// `Softmax` is an object of each thread with these members. Between two calls there is a __syncthreads.
//   void weigh<Element>(SoftmaxShared&, float factor)   scores -> weights, ratio
//   void add(SoftmaxShared&)                            may run beside the second product
//   void finish(SoftmaxShared&)                         -> inverse
template <int head_dim>
struct TilesShared {
  using Tile = SharedTile<head_dim>;
  __align__(128) char q[tile_q * Tile::row_bytes];
  __align__(128) char kv[2][2][tile_k * Tile::row_bytes];  // of each stage: keys, values
  SoftmaxShared softmax;
};

template <class Element, int head_dim, class Softmax>
__global__ void __launch_bounds__(threads)
    tensor_core_tiles_kernel(__grid_constant__ ForwardParams const p, __grid_constant__ PlainScore const score) {
  using Tile = SharedTile<head_dim>;
  using Weights = SharedTile<tile_k>;
  constexpr int columns = head_dim / warps;  // of the output, a warp
  extern __shared__ __align__(128) char memory[];
  auto& shared = *reinterpret_cast<TilesShared<head_dim>*>(memory);
  int const warp = threadIdx.x / 32, lane = threadIdx.x % 32;

  Place const place = Place::of(p, tile_q);
  Mask const mask = mask_of(p);
  int const q_first = place.tile * tile_q, q_end = min_of(q_first + tile_q, p.seqlen_q);
  KeyRange const range = mask.key_range(q_first, q_end, tile_k);
  Element const* const k = rows_of<Element>(p.k, place.sequence, place.head / p.group);
  Element const* const v = rows_of<Element>(p.v, place.sequence, place.head / p.group);
  auto const load = [&](int tile, int stage) {
    load_tile<head_dim, tile_k, threads>(shared_address(shared.kv[stage][0]), k, p.k.row_stride, tile * tile_k,
                                         p.seqlen_k);
    load_tile<head_dim, tile_k, threads>(shared_address(shared.kv[stage][1]), v, p.v.row_stride, tile * tile_k,
                                         p.seqlen_k);
    copy_commit();
  };
  load_tile<head_dim, tile_q, threads>(shared_address(shared.q), rows_of<Element>(p.q, place.sequence, place.head),
                                       p.q.row_stride, q_first, q_end);
  if (range.begin < range.end) load(range.begin, 0);

  // This lane's places in the operands, as in sm80/forward_kernel.cuh; its accumulators are of rows `row` and row + 8.
  int const row = lane / 4, column = lane % 4 * 2;
  uint32_t const from_q = shared_address(shared.q) + Tile::offset(lane % 16, lane / 16);
  uint32_t const from_weights = shared_address(shared.softmax.weights) + Weights::offset(lane % 16, lane / 16);
  uint32_t const k_offset = Tile::offset(warp * 16 + lane % 8 + lane / 16 * 8, lane / 8 % 2);

  Softmax softmax;
  float o[columns / 8][4] = {};
  for (int tile = range.begin; tile < range.end; ++tile) {
    int const stage = (tile - range.begin) % 2;
    copy_wait_all();
    __syncthreads();  // the tile is here, and all warps are done with the one before
    if (tile + 1 < range.end) load(tile + 1, stage ^ 1);

    // Scores of this warp's 16 keys.
    float s[2][4] = {};
#pragma unroll
    for (int d = 0; d < head_dim / 16; ++d) {
      uint32_t left[4], right[4];
      load_matrices(left, Tile::right(from_q, d));
      load_matrices(right, shared_address(shared.kv[stage][0]) + Tile::right(k_offset, d));
      multiply<Element>(s[0], left, right[0], right[1]);
      multiply<Element>(s[1], left, right[2], right[3]);
    }
    bool const masked = tile < range.full_begin || tile >= range.full_end;
#pragma unroll
    for (int n = 0; n < 2; ++n) {
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        int const key = warp * 16 + n * 8 + column, query = row + half * 8;
        if (masked) {
#pragma unroll
          for (int i = 0; i < 2; ++i) {
            if (!mask.visible(q_first + query, tile * tile_k + key + i)) s[n][2 * half + i] = minus_infinity();
          }
        }
        *reinterpret_cast<float2*>(&shared.softmax.scores[query][key]) = {s[n][2 * half], s[n][2 * half + 1]};
      }
    }

    __syncthreads();  // all scores are there
    softmax.template weigh<Element>(shared.softmax, score.factor);
    __syncthreads();  // weights and ratios are there
    softmax.add(shared.softmax);

    // The output's columns of this warp.
    float const ratio[2] = {shared.softmax.ratio[row], shared.softmax.ratio[row + 8]};
#pragma unroll
    for (int n = 0; n < columns / 8; ++n) {
#pragma unroll
      for (int i = 0; i < 4; ++i) o[n][i] *= ratio[i / 2];
    }
#pragma unroll
    for (int n = 0; n < tile_k / 16; ++n) {
      uint32_t weights[4];
      load_matrices(weights, Weights::right(from_weights, n));
#pragma unroll
      for (int c = 0; c < columns / 16; ++c) {
        uint32_t values[4];
        load_matrices_transposed(values,
                                 shared_address(shared.kv[stage][1]) +
                                     Tile::offset(n * 16 + lane % 16, (warp * columns + c * 16) / 8 + lane / 16));
        multiply<Element>(o[2 * c], weights, values[0], values[1]);
        multiply<Element>(o[2 * c + 1], weights, values[2], values[3]);
      }
    }
  }

  softmax.finish(shared.softmax);
  copy_wait_all();  // of a block that sees no key, the queries
  __syncthreads();  // the sums are there
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    int const query = q_first + row + half * 8;
    float const inverse = shared.softmax.inverse[row + half * 8];
    if (query < q_end) {
      Element* const out = rows_of<Element>(p.o, place.sequence, place.head) + query * p.o.row_stride + warp * columns;
#pragma unroll
      for (int n = 0; n < columns / 8; ++n) {
        *reinterpret_cast<uint32_t*>(out + n * 8 + column) =
            Precision<Element>::pack(o[n][2 * half] * inverse, o[n][2 * half + 1] * inverse);
      }
    }
  }
}

}  // namespace flashcore::ladder

// SPDX-License-Identifier: Apache-2.0
// Rung 5: 16 queries per block share each tile of keys and values, which comes to shared memory once for all of them,
// while the tile before it is worked on. Products are scalar. A warp has four of the queries, a lane two of the keys.
#include "ladder/ladder.h"
#include "ladder/parts.cuh"

namespace flashcore::ladder {
namespace {

constexpr int tile_q = 16, tile_k = 64;
constexpr int warps = 4, threads = 32 * warps;
constexpr int queries = tile_q / warps, keys = tile_k / 32;  // of a warp, of a lane
static_assert(queries == 4 && keys == 2);

template <int head_dim>
struct Shared {
  float q[tile_q][head_dim];
  float weights[warps][tile_k][queries];
  __align__(128) char kv[2][2][tile_k * SharedTile<head_dim>::row_bytes];  // of each stage: keys, values
};

template <class Element, int head_dim>
__global__ void __launch_bounds__(threads)
    multi_query_kernel(__grid_constant__ ForwardParams const p, __grid_constant__ PlainScore const score) {
  using Tile = SharedTile<head_dim>;
  constexpr int columns = head_dim / 32;  // of the output, a lane
  extern __shared__ __align__(128) char memory[];
  auto& shared = *reinterpret_cast<Shared<head_dim>*>(memory);
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
  if (range.begin < range.end) load(range.begin, 0);

  Element const* const q = rows_of<Element>(p.q, place.sequence, place.head);
  for (int i = threadIdx.x; i < tile_q * head_dim; i += threads) {
    int const row = q_first + i / head_dim;
    shared.q[i / head_dim][i % head_dim] = row < q_end ? to_float(q[row * p.q.row_stride + i % head_dim]) : 0.0f;
  }

  SoftmaxRow state[queries];  // the sums are this lane's own until the end
  float o[queries][columns] = {};
  for (int tile = range.begin; tile < range.end; ++tile) {
    int const stage = (tile - range.begin) % 2;
    copy_wait_all();
    __syncthreads();  // the tile is here, and all warps are done with the one before
    if (tile + 1 < range.end) load(tile + 1, stage ^ 1);
    char const* const keys_tile = shared.kv[stage][0];
    char const* const values_tile = shared.kv[stage][1];

    float s[queries][keys] = {};
#pragma unroll 2
    for (int d = 0; d < head_dim; d += 8) {
      float x[keys][8];
#pragma unroll
      for (int j = 0; j < keys; ++j) {
        widen<Element>(load16(keys_tile + Tile::offset(lane + 32 * j, d / 8)), x[j]);
      }
#pragma unroll
      for (int i = 0; i < queries; ++i) {
        float const* const row = shared.q[warp * queries + i] + d;
        float4 const low = *reinterpret_cast<float4 const*>(row), high = *reinterpret_cast<float4 const*>(row + 4);
        float const y[8] = {low.x, low.y, low.z, low.w, high.x, high.y, high.z, high.w};
#pragma unroll
        for (int j = 0; j < keys; ++j) {
#pragma unroll
          for (int e = 0; e < 8; ++e) s[i][j] += y[e] * x[j][e];
        }
      }
    }

    bool const masked = tile < range.full_begin || tile >= range.full_end;
#pragma unroll
    for (int i = 0; i < queries; ++i) {
      int const query = q_first + warp * queries + i;
      float top = state[i].max;
#pragma unroll
      for (int j = 0; j < keys; ++j) {
        if (masked && !mask.visible(query, tile * tile_k + lane + 32 * j)) s[i][j] = minus_infinity();
        top = fmaxf(top, s[i][j]);
      }
      float const ratio = state[i].raise(reduce_lanes(top, Max{}), score.factor);
      float const offset = SoftmaxRow::offset(state[i].max, score.factor);
#pragma unroll
      for (int j = 0; j < keys; ++j) {
        s[i][j] = exp2_of(s[i][j] * score.factor - offset);
        state[i].sum += s[i][j];
      }
#pragma unroll
      for (int c = 0; c < columns; ++c) o[i][c] *= ratio;
    }
#pragma unroll
    for (int j = 0; j < keys; ++j) {
      *reinterpret_cast<float4*>(shared.weights[warp][lane + 32 * j]) = {s[0][j], s[1][j], s[2][j], s[3][j]};
    }
    __syncwarp();  // a warp's weights are read by its own lanes alone

#pragma unroll 8
    for (int key = 0; key < tile_k; ++key) {
      float4 const four = *reinterpret_cast<float4 const*>(shared.weights[warp][key]);
      float const weight[queries] = {four.x, four.y, four.z, four.w};
      constexpr int lanes = 8 / columns;  // of a chunk of 16 bytes
      char const* const value = values_tile + Tile::offset(key, lane / lanes) + lane % lanes * columns * 2;
      uint32_t words[columns / 2];
      if constexpr (columns == 2) {
        words[0] = *reinterpret_cast<uint32_t const*>(value);
      } else {
        uint2 const both = *reinterpret_cast<uint2 const*>(value);
        words[0] = both.x;
        words[1] = both.y;
      }
#pragma unroll
      for (int c = 0; c < columns; c += 2) {
        float2 const x = widen<Element>(words[c / 2]);
#pragma unroll
        for (int i = 0; i < queries; ++i) {
          o[i][c] += weight[i] * x.x;
          o[i][c + 1] += weight[i] * x.y;
        }
      }
    }
    __syncwarp();  // and written again in the next tile
  }

#pragma unroll
  for (int i = 0; i < queries; ++i) {
    state[i].sum = reduce_lanes(state[i].sum, Sum{});
    float const inverse = state[i].inverse_sum();
    int const query = q_first + warp * queries + i;
    if (query < q_end) {
      Element* const out = rows_of<Element>(p.o, place.sequence, place.head) + query * p.o.row_stride + lane * columns;
#pragma unroll
      for (int c = 0; c < columns; c += 2) {
        *reinterpret_cast<uint32_t*>(out + c) = Precision<Element>::pack(o[i][c] * inverse, o[i][c + 1] * inverse);
      }
    }
  }
}

}  // namespace

void multi_query(const ForwardParams& p, DType dtype, void* stream) {
  instance(dtype, p.head_dim, [&](auto element, auto head_dim) {
    launch(multi_query_kernel<decltype(element), head_dim>, p, tile_q, threads, sizeof(Shared<head_dim>), stream);
  });
}

}  // namespace flashcore::ladder

// SPDX-License-Identifier: Apache-2.0
// Rung 8: the score tile is never stored. A warp has 16 queries to itself, so that a row of its scores lies in four
// lanes' registers; their weights, packed, are the left operand of the second product as they are. Warps have nothing
// to tell one another between two tiles. A block has eight: where there are queries enough each has its own, else
// several take different keys of the same queries and merge their outputs at the end.
#include "ladder/ladder.h"
#include "ladder/parts.cuh"

namespace flashcore::ladder {
namespace {

constexpr int warps = 8, threads = 32 * warps;

template <int head_dim_, int query_warps_>
struct Config {
  static constexpr int head_dim = head_dim_, query_warps = query_warps_;
  static constexpr int key_warps = warps / query_warps;
  // Of a tile, a warp's keys. Of 32 more are worth their registers only where the warp has the whole tile; 16 keep the
  // tile of head dimension 128 within the shared memory of every GPU.
  static constexpr int warp_keys = key_warps == 1 ? 64 : key_warps == 4 && head_dim == 128 ? 16 : 32;
  static constexpr int tile_q = 16 * query_warps, tile_k = warp_keys * key_warps;
  // The queries' operands stay in registers, except where a second block fits the multiprocessor without them.
  static constexpr bool q_in_registers = head_dim == 128 || key_warps > 1;
};

template <class Config>
struct Shared {
  using Tile = SharedTile<Config::head_dim>;
  struct Operands {
    __align__(128) char q[Config::tile_q * Tile::row_bytes];
    __align__(128) char kv[2][2][Config::tile_k * Tile::row_bytes];  // of each stage: keys, values
  };
  union {
    Operands operands;
    float partial[Config::key_warps][Config::tile_q][Config::head_dim + 8];  // outputs, at the end
  };
  float maxima[Config::key_warps][Config::tile_q], sums[Config::key_warps][Config::tile_q];
};

template <class Element, class Config>
__global__ void __launch_bounds__(threads)
    fused_tiles_kernel(__grid_constant__ ForwardParams const p, __grid_constant__ PlainScore const score) {
  constexpr int head_dim = Config::head_dim, tile_q = Config::tile_q, tile_k = Config::tile_k;
  constexpr int warp_keys = Config::warp_keys, key_warps = Config::key_warps;
  using Tile = SharedTile<head_dim>;
  extern __shared__ __align__(128) char memory[];
  auto& shared = *reinterpret_cast<Shared<Config>*>(memory);
  int const warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  int const q_warp = warp % Config::query_warps, k_warp = warp / Config::query_warps;

  Place place = Place::of(p, tile_q);
  int q_first = place.tile * tile_q, q_end = min_of(q_first + tile_q, p.seqlen_q);
  KeyRange const range = mask_of(p).key_range(q_first, q_end, tile_k);
  Element const* const k = rows_of<Element>(p.k, place.sequence, place.head / p.group);
  Element const* const v = rows_of<Element>(p.v, place.sequence, place.head / p.group);
  auto const load = [&](int tile, int stage) {
    load_tile<head_dim, tile_k, threads>(shared_address(shared.operands.kv[stage][0]), k, p.k.row_stride, tile * tile_k,
                                         p.seqlen_k);
    load_tile<head_dim, tile_k, threads>(shared_address(shared.operands.kv[stage][1]), v, p.v.row_stride, tile * tile_k,
                                         p.seqlen_k);
    copy_commit();
  };
  load_tile<head_dim, tile_q, threads>(shared_address(shared.operands.q),
                                       rows_of<Element>(p.q, place.sequence, place.head), p.q.row_stride, q_first,
                                       q_end);
  if (range.begin < range.end) load(range.begin, 0);

  // This lane's places in the operands, as in sm80/forward_kernel.cuh; its accumulators are of rows `row` and row + 8.
  int const row = q_warp * 16 + lane / 4, column = lane % 4 * 2;
  uint32_t const from_q = shared_address(shared.operands.q) + Tile::offset(q_warp * 16 + lane % 16, lane / 16);
  uint32_t const k_offset = Tile::offset(k_warp * warp_keys + lane % 8 + lane / 16 * 8, lane / 8 % 2);
  uint32_t const v_offset = Tile::offset(k_warp * warp_keys + lane % 16, lane / 16);

  SoftmaxRow state[2];  // of this warp's keys; the sums are this lane's own until the end
  float o[head_dim / 8][4] = {};
  uint32_t q[Config::q_in_registers ? head_dim / 16 : 1][4];
  for (int tile = range.begin; tile < range.end; ++tile) {
    int const stage = (tile - range.begin) % 2;
    copy_wait_all();
    __syncthreads();  // the tile is here, and all warps are done with the one before
    if (tile + 1 < range.end) load(tile + 1, stage ^ 1);

    float s[warp_keys / 8][4] = {};
    uint32_t const from_k = shared_address(shared.operands.kv[stage][0]) + k_offset;
#pragma unroll
    for (int d = 0; d < head_dim / 16; ++d) {
      uint32_t (&left)[4] = q[Config::q_in_registers ? d : 0];
      if (!Config::q_in_registers || tile == range.begin) load_matrices(left, Tile::right(from_q, d));
#pragma unroll
      for (int n = 0; n < warp_keys / 16; ++n) {
        uint32_t right[4];
        load_matrices(right, Tile::right(from_k, d) + n * 16 * Tile::row_bytes);
        multiply<Element>(s[2 * n], left, right[0], right[1]);
        multiply<Element>(s[2 * n + 1], left, right[2], right[3]);
      }
    }

    if (tile < range.full_begin || tile >= range.full_end) {
      Mask const mask = mask_of(p);
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        int const first = tile * tile_k + k_warp * warp_keys + column;
        int const first_key = mask.first_key(q_first + row + half * 8) - first;
        int const end_key = mask.end_key(q_first + row + half * 8) - first;
#pragma unroll
        for (int n = 0; n < warp_keys / 8; ++n) {
#pragma unroll
          for (int i = 0; i < 2; ++i) {
            if (n * 8 + i < first_key || n * 8 + i >= end_key) s[n][2 * half + i] = minus_infinity();
          }
        }
      }
    }

    float ratio[2], offset[2];
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      float top = state[half].max;
#pragma unroll
      for (int n = 0; n < warp_keys / 8; ++n) top = fmaxf(top, fmaxf(s[n][2 * half], s[n][2 * half + 1]));
      ratio[half] = state[half].raise(reduce_lanes<1, 4>(top, Max{}), score.factor);
      offset[half] = SoftmaxRow::offset(state[half].max, score.factor);
    }
    if (__any_sync(0xffffffffu, ratio[0] != 1.0f || ratio[1] != 1.0f)) {
#pragma unroll
      for (int n = 0; n < head_dim / 8; ++n) {
#pragma unroll
        for (int i = 0; i < 4; ++i) o[n][i] *= ratio[i / 2];
      }
    }

    uint32_t const from_v = shared_address(shared.operands.kv[stage][1]) + v_offset;
#pragma unroll
    for (int n = 0; n < warp_keys / 16; ++n) {
#pragma unroll
      for (int i = 0; i < 8; ++i) {
        float& x = s[2 * n + i / 4][i % 4];
        x = exp2_of(x * score.factor - offset[i / 2 % 2]);
        state[i / 2 % 2].sum += x;
      }
      // Two accumulators side by side are one left operand.
      uint32_t weights[4];
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        weights[i] = Precision<Element>::pack(s[2 * n + i / 2][i % 2 * 2], s[2 * n + i / 2][i % 2 * 2 + 1]);
      }
#pragma unroll
      for (int d = 0; d < head_dim / 16; ++d) {
        uint32_t right[4];
        load_matrices_transposed(right, Tile::right(from_v, d) + n * 16 * Tile::row_bytes);
        multiply<Element>(o[2 * d], weights, right[0], right[1]);
        multiply<Element>(o[2 * d + 1], weights, right[2], right[3]);
      }
    }
  }

  // The outputs of the warps that had the same queries, each weighted by how far its maximum is below the largest.
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    state[half].sum = reduce_lanes<1, 4>(state[half].sum, Sum{});
    if (column == 0) {
      shared.maxima[k_warp][row + half * 8] = state[half].max;
      shared.sums[k_warp][row + half * 8] = state[half].sum;
    }
  }
  copy_wait_all();  // of a block that sees no key, the queries
  __syncthreads();  // maxima and sums are there, and all warps are done with the operands
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    int const r = row + half * 8;
    float top = shared.maxima[0][r], total = 0.0f;
#pragma unroll
    for (int w = 1; w < key_warps; ++w) top = fmaxf(top, shared.maxima[w][r]);
    float const offset = SoftmaxRow::offset(top, 1.0f);
#pragma unroll
    for (int w = 0; w < key_warps; ++w)
      total += shared.sums[w][r] * exp2_of((shared.maxima[w][r] - offset) * score.factor);
    float const factor = total == 0.0f ? 0.0f : exp2_of((state[half].max - offset) * score.factor) / total;
#pragma unroll
    for (int n = 0; n < head_dim / 8; ++n) {
      float2 const pair = {o[n][2 * half] * factor, o[n][2 * half + 1] * factor};
      *reinterpret_cast<float2*>(&shared.partial[k_warp][r][n * 8 + column]) = pair;
    }
  }
  __syncthreads();
  place = Place::of(p, tile_q);  // once more: over the loop it would cost registers
  q_first = place.tile * tile_q, q_end = min_of(q_first + tile_q, p.seqlen_q);
  constexpr int chunks = head_dim / 8;
#pragma unroll
  for (int i = 0; i < tile_q * chunks / threads; ++i) {
    int const r = (i * threads + threadIdx.x) / chunks, chunk = (i * threads + threadIdx.x) % chunks;
    float sum[8] = {};
#pragma unroll
    for (int w = 0; w < key_warps; ++w) {
      float4 const* const part = reinterpret_cast<float4 const*>(&shared.partial[w][r][chunk * 8]);
      float4 const low = part[0], high = part[1];
      float const x[8] = {low.x, low.y, low.z, low.w, high.x, high.y, high.z, high.w};
#pragma unroll
      for (int e = 0; e < 8; ++e) sum[e] += x[e];
    }
    if (q_first + r < q_end) {
      Element* const out = rows_of<Element>(p.o, place.sequence, place.head) + (q_first + r) * p.o.row_stride;
      *reinterpret_cast<uint4*>(out + chunk * 8) = narrow<Element>(sum);
    }
  }
}

template <class Element, int head_dim, int query_warps>
void run(const ForwardParams& p, void* stream) {
  using Tiles = Config<head_dim, query_warps>;
  launch(fused_tiles_kernel<Element, Tiles>, p, Tiles::tile_q, threads, sizeof(Shared<Tiles>), stream);
}

}  // namespace

void fused_tiles(const ForwardParams& p, DType dtype, void* stream) {
  int device = 0, multiprocessors = 0;
  cuda_check(cudaGetDevice(&device), "asking for the current CUDA device");
  cuda_check(cudaDeviceGetAttribute(&multiprocessors, cudaDevAttrMultiProcessorCount, device),
             "asking for the number of multiprocessors");
  // The largest tile of queries, which reads keys and values the fewest times, that leaves no more than a quarter of
  // the GPU without a block.
  auto const enough = [&](int tile_q) { return 4 * blocks_of(p, tile_q) >= 3 * multiprocessors; };
  instance(dtype, p.head_dim, [&](auto element, auto head_dim) {
    using Element = decltype(element);
    if (enough(128))
      run<Element, head_dim, 8>(p, stream);
    else if (enough(64))
      run<Element, head_dim, 4>(p, stream);
    else
      run<Element, head_dim, 2>(p, stream);
  });
}

}  // namespace flashcore::ladder

// SPDX-License-Identifier: Apache-2.0
// The warps of sm90_decode that multiply what has come, each 16 keys of every tile, and make one result of theirs.
#pragma once

#include "sm90/decode_config.cuh"
#include "sm90/decode_finish.cuh"
#include "sm90/decode_inputs.cuh"

namespace flashcore::sm90 {

template <class Config>
__device__ __forceinline__ void consume(DecodeArguments const& a, typename Config::Memory const& shared,
                                        typename Config::Work& work, int warp, int lane) {
  using Queries = sm80::SharedTile<Config::head_dim>;
  constexpr int consumers = Config::consumers;
  sm80::DecodeParams const& p = a.p;
  DecodePart const& part = shared.part();

  if (!bring_queries<Config>(a, shared, [](int row, int chunk) { return Queries::offset(row, chunk); })) return;
  consumers_sync(consumers);  // the queries are here

  // This lane's rows of the operands, as in the forward kernel.
  int const slice = warp / Config::key_warps, key_warp = warp % Config::key_warps;
  uint32_t const from_q = shared_address(shared.queries()) + Queries::offset(slice * 16 + lane % 16, lane / 16);
  int const tile_key = key_warp * Config::warp_keys;  // of a tile, this warp's first
  BoxTile const box{128 << a.log_box};
  int const in_tile =
      (tile_key >> a.log_box) * Config::panels * box.panel_bytes + (tile_key & ((1 << a.log_box) - 1)) * 128;
  int const lane_k = in_tile + box.offset(lane % 8 + lane / 16 * 8, lane / 8 % 2);
  int const lane_v = in_tile + box.offset(lane % 16, lane / 16);
  work.start(from_q);
  RingPlace place;
  int const count = part.count;
#pragma unroll 1
  for (int i = 0; i < count; ++i) {
    int const tile = part.first + i * part.step, first = tile * Config::tile_k + tile_key;
    char* const stage_keys = shared.keys(place.number);
    shared.full_keys()[place.number].wait(place.phase);
    bool const here = p.page_table == nullptr || (shared.absent()[place.number] >> (tile_key >> a.log_box) & 1) == 0;
    bool const patched = here && first + Config::warp_keys > part.cached;
    // One slice's warps do it for all, which then come together wherever a tile has such rows for any warp.
    auto const patch_with = [&](Rows<void const*> const& appended, bool clears, char* tile_rows) {
      if (patched && slice == 0) {
        patch<Config>(p, appended, clears, part, first, lane,
                      [&](int row, int chunk) { return tile_rows + in_tile + box.offset(row, chunk); });
        cutlass::arch::fence_view_async_shared();  // before TMA writes there again
      }
      if constexpr (Config::slices == 1) {
        __syncwarp();
      } else {
        consumers_sync(consumers);
      }
    };
    bool const has_edge = Config::slices == 1 ? patched : (tile + 1) * Config::tile_k > part.cached;
    if (has_edge && p.new_tokens > 0) patch_with(p.new_k, false, stage_keys);

    float s[1][2][4];
    uint32_t weights[1][4];
    work.scores(s, from_q, box, shared_address(stage_keys) + lane_k);
    if (!p.plain_score) work.transform(s, p.score);
    if (!here || tile < part.full_begin || tile >= part.full_end) {  // keys that not all queries see
      work.hide(
          s, cache_mask(p, part.keys), first, part.first_row + slice * 16,
          [&](int row) { return a.group.quotient(row); }, here, lane);
    }
    work.softmax(s, weights, p.score.factor);

    shared.full_values()[place.number].wait(place.phase);
    if (has_edge) patch_with(p.new_v, true, shared.values(place.number));
    work.output(weights, box, shared_address(stage_keys) + Config::kv_bytes + lane_v);
    __syncwarp();  // all lanes are done with the stage
    if (lane == 0) shared.empty()[place.number].arrive();
    place.advance(shared.stages);
  }
  if (count <= 0 && part.ahead) {  // a tile was asked for in vain: it is to arrive before its place is used
    shared.full_keys()[0].wait(0);
    shared.full_values()[0].wait(0);
  }
}

// The end of a part: the warps' results become the block's.
template <class Config>
__device__ __forceinline__ void finish(DecodeArguments const& a, typename Config::Memory const& shared,
                                       typename Config::Work& work, int warp, int lane, bool acts) {
  constexpr int head_dim = Config::head_dim, rows = Config::rows;
  constexpr int consumers = Config::consumers, merge_stride = Config::tile.merge_stride();
  DecodePart const& part = shared.part();
  float const factor = a.p.score.factor;
  auto const read = [acts](auto const* from) { return acts ? *from : std::remove_cvref_t<decltype(*from)>{}; };
  int const blocks = 1 << a.log_cluster;

  // The warps' results become one: each scales its own by its weight over the sum of all.
  int const key_warp = warp % Config::key_warps, first_row = warp / Config::key_warps % Config::slices * 16;
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    SoftmaxRow const& state = work.state[0][half];
    float const sum = quad_sum(state.sum);
    int const at = key_warp * rows + first_row + half * 8 + lane / 4;
    if (acts && lane % 4 == 0) shared.maxima()[at] = state.max, shared.sums()[at] = sum;
  }
  if (a.log_cluster > 0) cluster_wait_acquire();  // all blocks run, and may be sent to
  if (acts) consumers_sync(consumers);            // the states are there, and nobody reads the stages any more
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    int const row = first_row + half * 8 + lane / 4;
    if (first_row + half * 8 >= part.valid_rows) continue;
    SoftmaxRow all;
#pragma unroll
    for (int w = 0; w < Config::key_warps; ++w) all.max = fmaxf(all.max, read(shared.maxima() + w * rows + row));
    float const top = all.max == minus_infinity() ? 0.0f : all.max;
#pragma unroll
    for (int w = 0; w < Config::key_warps; ++w) {
      all.sum +=
          exp2_of((read(shared.maxima() + w * rows + row) - top) * factor) * read(shared.sums() + w * rows + row);
    }
    float const weight = exp2_of((work.state[0][half].max - top) * factor) * all.inverse_sum();
    uint32_t const to = shared_address(shared.outputs() + (key_warp * rows + row) * merge_stride + lane % 4 * 2);
#pragma unroll
    for (int n = 0; n < head_dim / 8; ++n) {
      store_shared(acts, to + n * 32, work.o[0][n][2 * half] * weight, work.o[0][n][2 * half + 1] * weight);
    }
    if (key_warp == 0 && row < part.valid_rows) {
      float const lse = all.lse(factor);
      if (a.log_cluster > 0) {
#pragma unroll 1
        for (int block = lane % 4; block < blocks; block += 4) send_lse<Config>(a, shared, row, lse, block, acts);
      } else if (lane % 4 == 0) {
        write_lse(a, part, row, lse, acts);
      }
    }
  }
  if (acts) consumers_sync(consumers);  // the outputs are there
  constexpr int row_pieces = head_dim / 4;
#pragma unroll 1
  for (int i = threadIdx.x % consumers; i < part.valid_rows * row_pieces; i += consumers) {
    int const row = i / row_pieces, column = i % row_pieces * 4;
    float4 sum{0.0f, 0.0f, 0.0f, 0.0f};
#pragma unroll
    for (int w = 0; w < Config::key_warps; ++w) {
      float4 const x =
          read(reinterpret_cast<float4 const*>(shared.outputs() + (w * rows + row) * merge_stride + column));
      sum.x += x.x, sum.y += x.y, sum.z += x.z, sum.w += x.w;
    }
    hand_over<Config>(a, shared, row, column, sum, acts);
  }
  if (a.log_cluster > 0) merge_cluster<Config>(a, shared, acts);
}

}  // namespace flashcore::sm90

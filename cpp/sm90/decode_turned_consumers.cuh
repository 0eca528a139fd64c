// SPDX-License-Identifier: Apache-2.0
// The warps of sm90_decode_turned that multiply what has come, a group of four each 16 keys of every other tile, and
// make one result of theirs.
#pragma once

#include "sm90/decode_finish.cuh"
#include "sm90/decode_inputs.cuh"
#include "sm90/decode_turned_config.cuh"

namespace flashcore::sm90 {

// The consumers of a group meet; group_any says whether `x` is true for any of them. (The number of a barrier is part
// of the instruction.)
template <class Config, int g = 0>
__device__ __forceinline__ void group_sync(int group) {
  if (g + 1 == Config::groups || group == g) {
    asm volatile("barrier.cta.sync.aligned %0, %1;" ::"n"(6 + g), "n"(Config::group_threads) : "memory");
  } else if constexpr (g + 1 < Config::groups) {
    group_sync<Config, g + 1>(group);
  }
}
template <class Config, int g = 0>
__device__ __forceinline__ bool group_any(int group, bool x) {
  if (g + 1 == Config::groups || group == g) {
    int any;
    asm volatile(
        "{\n.reg .pred p, q;\nsetp.ne.b32 p, %1, 0;\nbarrier.cta.red.or.pred.aligned q, %2, %3, p;\n"
        "selp.b32 %0, 1, 0, q;\n}"
        : "=r"(any)
        : "r"(int{x}), "n"(6 + g), "n"(Config::group_threads)
        : "memory");
    return any != 0;
  } else if constexpr (g + 1 < Config::groups) {
    return group_any<Config, g + 1>(group, x);
  }
}

// Raises the rows' references to the largest of a tile's scores, and multiplies sums and output by what that changes.
// `begins`: the tile is the group's first, and the references are its largest scores.
// All consumers of a group come here together.
template <class Config>
__device__ __forceinline__ void raise_references(typename Config::Memory const& shared, typename Config::Work& work,
                                                 float const (&s)[Config::rows / 2], float factor, bool begins,
                                                 int warp, int lane) {
  constexpr int rows_held = Config::Work::rows_held;
  int const group = warp / Config::key_warps;
  float* const states = shared.states(group);  // nobody reads the weights now
#pragma unroll
  for (int r = 0; r < rows_held; ++r) {
    int const x = r / 2 * 4 + r % 2;
    float most = fmaxf(s[x], s[x + 2]) * factor;
#pragma unroll
    for (int step = 4; step < 32; step *= 2) most = fmaxf(most, __shfl_xor_sync(0xffffffffu, most, step));
    if (lane < 4) states[warp % Config::key_warps * Config::rows + Config::Work::row(r, lane)] = most;
  }
  group_sync<Config>(group);
  float ratio[rows_held], raised[rows_held];
#pragma unroll
  for (int r = 0; r < rows_held; ++r) {
    int const row = Config::Work::row(r, lane);
    float const before = begins ? Config::Work::no_reference : shared.references(group)[row];
    float reference = before;
#pragma unroll
    for (int w = 0; w < Config::key_warps; ++w) {
      reference = fmaxf(reference, states[w * Config::rows + row]);
    }
    ratio[r] = exp2_of(before - reference);
    work.sum[r] *= ratio[r];
    raised[r] = reference;
  }
  group_sync<Config>(group);  // all have read both
  if (warp % Config::key_warps == 0 && lane < 4) {
#pragma unroll
    for (int r = 0; r < rows_held; ++r) shared.references(group)[Config::Work::row(r, lane)] = raised[r];
  }
  group_sync<Config>(group);
#pragma unroll
  for (int m = 0; m < Config::panels; ++m) {
#pragma unroll
    for (int x = 0; x < Config::rows / 2; ++x) work.o[m][x] *= ratio[x / 4 * 2 + x % 2];
  }
}

template <class Config>
__device__ __forceinline__ void consume(DecodeArguments const& a, typename Config::Memory const& shared,
                                        typename Config::Work& work, int warp, int lane) {
  using Element = typename Config::Element;
  constexpr int rows = Config::rows;
  sm80::DecodeParams const& p = a.p;
  DecodePart const& part = shared.part();

  if (!bring_queries<Config>(a, shared, [](int row, int chunk) { return panel_offset<rows>(row, chunk); })) return;
  if (threadIdx.x < Config::groups * rows) shared.references(0)[threadIdx.x] = 0.0f;
  cutlass::arch::fence_view_async_shared();
  consumers_sync(Config::consumers);  // the queries are here, for the products, too

  // The groups take the tiles in turn. Of a tile, this warp's first key:
  int const group = warp / Config::key_warps, tile_key = warp % Config::key_warps * Config::warp_keys;
  float const factor = p.score.factor;
  RingPlace place;
  int const count = part.count;
  auto const release = [&] {
    __syncwarp();  // all lanes are done with it
    if (lane == 0) shared.empty(group)[place.number].arrive();
    place.advance(shared.slots());
  };
  auto const patch_with = [&](Rows<void const*> const& appended, bool clears, char* tile, int first, bool here) {
    if (here && first + Config::warp_keys > part.cached) {
      patch<Config>(p, appended, clears, part, first, lane,
                    [&](int row, int chunk) { return tile + panel_offset<Config::tile_k>(tile_key + row, chunk); });
    }
    cutlass::arch::fence_view_async_shared();  // the products read it, and TMA writes there again
    group_sync<Config>(group);
  };

  uint32_t const to = shared_address(shared.weights(group));
  uint64_t const queries = operand(shared_address(shared.queries()), 0),
                 slots = operand(shared_address(shared.slot(group, 0)), 0), weights_operand = operand(to, 0);
  auto const end_products = [&] {
    cute::warpgroup_wait<0>();
#pragma unroll
    for (int m = 0; m < Config::panels; ++m) hold(work.o[m]);
  };
  work.clear();
#pragma unroll 1
  for (int i = group; i < count; i += Config::groups) {
    int const turn = i / Config::groups, tile = part.first + i * part.step, first = tile * Config::tile_k + tile_key;
    shared.full(group)[place.number].wait(place.phase);
    bool const here = p.page_table == nullptr ||
                      (shared.absent(group)[place.number] >> ((tile_key >> a.log_box) * a.column_boxes) & 1) == 0;
    bool const has_edge = (tile + 1) * Config::tile_k > part.cached;
    if (has_edge && p.new_tokens > 0) patch_with(p.new_k, false, shared.slot(group, place.number), first, here);

    float s[rows / 2];
    hold(s);
    cute::warpgroup_arrive();
    uint64_t const keys = behind(slots, place.number * Config::kv_bytes);
#pragma unroll
    for (int d = 0; d < Config::head_dim / 16; ++d) {
      int const panel = d / 4, right = d % 4 * 32;
      multiply_shared<Element, rows, wgmma::Major::K>(s, behind(keys, panel * Config::tile_k * row_bytes + right),
                                                      behind(queries, panel * rows * row_bytes + right), d > 0);
    }
    cute::warpgroup_commit_batch();
    hold(s);
    if (i >= Config::groups) shared.weights_read(group).wait(~turn & 1);
    end_products();
    hold(s);
    release();
    if (!p.plain_score) {
      p.score.transform_all([&](auto transform) {
#pragma unroll
        for (int x = 0; x < rows / 2; ++x) s[x] = transform(s[x]);
      });
    }
    if (!here || tile < part.full_begin || tile >= part.full_end) {  // keys that not all queries see
      Mask const mask = cache_mask(p, part.keys);
      int const key = first + lane / 4;
#pragma unroll
      for (int r = 0; r < Config::Work::rows_held; ++r) {
        int const token = a.group.quotient(part.first_row + Config::Work::row(r, lane));
        int const first_key = mask.first_key(token), end_key = here ? mask.end_key(token) : first_key;
#pragma unroll
        for (int half = 0; half < 2; ++half) {
          if (key + 8 * half < first_key || key + 8 * half >= end_key)
            s[r / 2 * 4 + half * 2 + r % 2] = minus_infinity();
        }
      }
    }

    // The weights, by references that are as they were, 0 at first, unless a weight would exceed what there is room
    // for, or the first tile has some that are too small.
    float sum[Config::Work::rows_held];
    auto const weigh = [&] {
      float most = minus_infinity(), least = 0.0f;
      constexpr int at_once = min_of(rows, 16), eights = at_once / 8;  // rows whose weights one instruction stores
#pragma unroll
      for (int j = 0; j < rows / at_once; ++j) {
        float w[4 * eights];
#pragma unroll
        for (int h = 0; h < eights; ++h) {
          int const held = 4 * j + 2 * h;
          float2 const reference =
              *reinterpret_cast<float2 const*>(shared.references(group) + Config::Work::row(held, lane));
#pragma unroll
          for (int x = 0; x < 4; ++x) {
            float const power = s[8 * j + 4 * h + x] * factor - (x % 2 == 0 ? reference.x : reference.y);
            most = fmaxf(most, power);
            if constexpr (rows <= 16) least = fminf(least, power);
            w[4 * h + x] = exp2_of(power);
          }
          sum[held] = w[4 * h] + w[4 * h + 2];
          sum[held + 1] = w[4 * h + 1] + w[4 * h + 3];
        }
        // This lane's row of the matrices that are stored, each transposed: eight rows' weights of eight keys.
        int const row = j * 16 + lane / 16 * 8 + lane % 8, chunk = tile_key / 8 + lane / 8 % 2;
        uint32_t const at = to + row * row_bytes + ((chunk ^ row) & 7) * 16;
        using P = Precision<Element>;
        if constexpr (eights == 1) {
          asm volatile("stmatrix.sync.aligned.m8n8.x2.trans.shared.b16 [%0], {%1, %2};" ::"r"(at),
                       "r"(P::pack(w[0], w[1])), "r"(P::pack(w[2], w[3]))
                       : "memory");
        } else {
          asm volatile("stmatrix.sync.aligned.m8n8.x4.trans.shared.b16 [%0], {%1, %2, %3, %4};" ::"r"(at),
                       "r"(P::pack(w[0], w[1])), "r"(P::pack(w[2], w[3])), "r"(P::pack(w[4], w[5])),
                       "r"(P::pack(w[6], w[7]))
                       : "memory");
        }
      }
      cutlass::arch::fence_view_async_shared();
      return most > Config::slack || (turn == 0 && (rows > 16 || least < Config::least));
    };
    if (group_any<Config>(group, weigh())) {
      raise_references<Config>(shared, work, s, factor, turn == 0, warp, lane);
      weigh();
      group_sync<Config>(group);
    }
#pragma unroll
    for (int r = 0; r < Config::Work::rows_held; ++r) work.sum[r] += sum[r];

    shared.full(group)[place.number].wait(place.phase);
    if (has_edge) patch_with(p.new_v, true, shared.slot(group, place.number), first, here);
    uint64_t const values = behind(slots, place.number * Config::kv_bytes);
#pragma unroll
    for (int m = 0; m < Config::panels; ++m) hold(work.o[m]);
    cute::warpgroup_arrive();
#pragma unroll
    for (int sixteen = 0; sixteen < Config::tile_k / 16; ++sixteen) {
#pragma unroll
      for (int m = 0; m < Config::panels; ++m) {
        multiply_shared<Element, rows, wgmma::Major::MN>(
            work.o[m], behind(values, (m * Config::tile_k + sixteen * 16) * row_bytes),
            behind(weights_operand, sixteen * 32), true);
      }
    }
    cute::warpgroup_commit_batch();
#pragma unroll
    for (int m = 0; m < Config::panels; ++m) hold(work.o[m]);
    end_products();
    release();
    if (lane == 0) shared.weights_read(group).arrive();
  }
  // All warps of the group are done with its last weights.
  if (int const turns = (count + Config::groups - 1 - group) / Config::groups; count > group) {
    shared.weights_read(group).wait(~turns & 1);
  }
  if (count <= group && part.ahead > group) {  // a tile was asked for in vain: it is to arrive before its place is used
    shared.full(group)[0].wait(0);
    shared.full(group)[1].wait(0);
  }
}

// The end of a part: the groups' results become the block's.
template <class Config>
__device__ __forceinline__ void finish(DecodeArguments const& a, typename Config::Memory const& shared,
                                       typename Config::Work& work, int warp, int lane, bool acts) {
  constexpr int key_warps = Config::key_warps, groups = Config::groups, merge_stride = Config::tile.merge_stride();
  DecodePart const& part = shared.part();
  auto const read = [acts](auto const* from) { return acts ? *from : std::remove_cvref_t<decltype(*from)>{}; };

  // Outputs, and sums of the warps' keys, as they are: each group's warps have read its slots and its weights.
  int const group = warp / key_warps % groups, key_warp = warp % key_warps;
  uint32_t const sums = shared_address(shared.states(group) + key_warp);
  uint32_t const outputs = shared_address(shared.outputs(group) + key_warp * 16 + lane / 4);
#pragma unroll
  for (int r = 0; r < Config::Work::rows_held; ++r) {
    if (r / 2 * 8 >= part.valid_rows) continue;
    int const row = Config::Work::row(r, lane), x = r / 2 * 4 + r % 2;
    float sum = work.sum[r];
#pragma unroll
    for (int step = 4; step < 32; step *= 2) sum += __shfl_xor_sync(0xffffffffu, sum, step);
    store_shared(acts && lane < 4, sums + row * key_warps * 4, sum);
#pragma unroll
    for (int m = 0; m < Config::panels; ++m) {
      store_shared(acts, outputs + (row * merge_stride + m * 64) * 4, work.o[m][x]);
      store_shared(acts, outputs + (row * merge_stride + m * 64 + 8) * 4, work.o[m][x + 2]);
    }
  }
  if (acts) consumers_sync(Config::consumers);
  if (acts && a.log_cluster > 0) cluster_wait_acquire();  // all blocks have read their slots, and may be sent to

  // A thread has four columns of a row, of both groups.
  constexpr int row_pieces = Config::head_dim / 4;
#pragma unroll 1
  for (int i = threadIdx.x % Config::consumers; i < part.valid_rows * row_pieces; i += Config::consumers) {
    int const row = i / row_pieces, piece = i % row_pieces;
    float reference[groups], sum[groups], top = Config::Work::no_reference, total = 0.0f;
    float4 x[groups];
#pragma unroll
    for (int g = 0; g < groups; ++g) {
      static_assert(key_warps == 4);
      float4 const of_warps = read(reinterpret_cast<float4 const*>(shared.states(g) + row * key_warps));
      x[g] = read(reinterpret_cast<float4 const*>(shared.outputs(g) + row * merge_stride + piece * 4));
      sum[g] = (of_warps.x + of_warps.y) + (of_warps.z + of_warps.w);
      reference[g] = sum[g] == 0.0f ? Config::Work::no_reference : read(shared.references(g) + row);
      top = fmaxf(top, reference[g]);
    }
#pragma unroll
    for (int g = 0; g < groups; ++g) {
      reference[g] = exp2_of(reference[g] - top);  // the group's weight
      total += reference[g] * sum[g];
    }
    float const inverse = total == 0.0f ? 0.0f : __fdividef(1.0f, total);
    float4 all{0.0f, 0.0f, 0.0f, 0.0f};
#pragma unroll
    for (int g = 0; g < groups; ++g) {
      float const weight = reference[g] * inverse;
      all.x += weight * x[g].x, all.y += weight * x[g].y, all.z += weight * x[g].z, all.w += weight * x[g].w;
    }
    hand_over<Config>(a, shared, row, piece * 4, all, acts);
    float const lse = total == 0.0f ? minus_infinity() : (top + log2_of(total)) * ln_2;
    if (a.log_cluster > 0) {
      if (piece < 1 << a.log_cluster) send_lse<Config>(a, shared, row, lse, piece, acts);
    } else if (piece == 0) {
      write_lse(a, part, row, lse, acts);
    }
  }
  if (a.log_cluster > 0) merge_cluster<Config>(a, shared, acts);
}

}  // namespace flashcore::sm90

// SPDX-License-Identifier: Apache-2.0
// The warps of sm90_decode_turned that multiply what has come: a group of four each 16 keys of every other tile.
#pragma once

#include "sm90/decode_turned_merge.cuh"

namespace flashcore::sm90 {

// Before the kernel ahead has ended: asks for the block's first tiles and for its queries to be brought into the L2
// cache, which all kernels share. What is read of the page table may be about to change; then what is brought is of no
// use.
template <class Config>
__device__ __forceinline__ void prefetch(TurnedArguments const& a) {
  using Element = typename Config::Element;
  sm80::DecodeParams const& p = a.p;
  TurnedPart part = turned_part<Config>(a);
  int const thread = threadIdx.x;
  int end = p.seqlen_k;
  if constexpr (Config::tile.walks()) {
    if (a.walks) {
      if (blockIdx.x >= HopperDecodeTile::units * Config::blocks_a_unit) return;
      int const team = a.parts.lines.quotient(blockIdx.x), line = blockIdx.x - team * a.parts.lines.divisor;
      FoundSequence const found = find_sequence<true>(p, a.parts, team, -1, thread % 32);
      if (found.sequence < 0) return;
      DecodeParts::Piece const piece = DecodeParts::piece(found.line, found.before, found.range.count(), team);
      part.sequence = found.sequence;
      set_rows<Config>(a, line, part);
      part.first = found.range.begin + piece.first;
      part.step = piece.step;
      end = found.cached;
    }
  }
  auto const line = [](auto const& rows, int64_t at) {
    asm volatile("prefetch.global.L2 [%0];" ::"l"(static_cast<Element const*>(rows.data) + at));
  };
  if (thread == 0 && p.cache_seqlens != nullptr)
    asm volatile("prefetch.global.L2 [%0];" ::"l"(p.cache_seqlens + part.sequence));
  if (thread < part.valid_rows) {
    int64_t const at = row_offset(p.q, part.sequence, row_place(a, part, thread));
    for (int column = 0; column < p.head_dim; column += 64) line(p.q, at + column);
  }
  static_assert(Config::consumers >= 2 * Config::tile_k);
  bool const tiles_known = p.window_left >= unlimited || (Config::tile.walks() && a.walks);
  if (!tiles_known || thread >= 2 * Config::tile_k) return;  // where a window begins is not known
  Rows<void const*> const& rows = thread < Config::tile_k ? p.k : p.v;
#pragma unroll 1
  for (int i = 0; i < a.prefetched; ++i) {
    int const key = (part.first + i * part.step) * Config::tile_k + thread % Config::tile_k;
    if (key >= end) break;
    int block = part.sequence, row = key;
    if (p.page_table != nullptr) {
      int const* const entry = p.page_table + part.sequence * p.page_table_stride + (key >> a.log_page);
      asm volatile("ld.relaxed.gpu.global.b32 %0, [%1];" : "=r"(block) : "l"(entry));  // not into the L1 cache
      if (block < 0 || block >= p.pages) continue;
      row = key & (p.page_size - 1);
    }
    int64_t const at = block * rows.batch_stride + row * rows.row_stride + part.head * rows.head_stride;
    for (int column = 0; column < p.head_dim; column += 64) line(rows, at + column);
  }
}

// Asks for the queries of a part to be brought to shared memory.
template <class Config>
__device__ __forceinline__ void ask_for_queries(TurnedArguments const& a, TurnedMemory<Config> const& shared,
                                                TurnedPart const& part) {
  using Element = typename Config::Element;
  constexpr int chunks = Config::head_dim / 8, consumers = Config::consumers;
  sm80::DecodeParams const& p = a.p;
  uint32_t const shared_q = shared_address(shared.queries());
#pragma unroll 1
  for (int i = threadIdx.x; i < Config::rows * chunks; i += consumers) {
    int const row = i / chunks, chunk = i % chunks;
    Element const* const source =
        static_cast<Element const*>(p.q.data) + row_offset(p.q, part.sequence, row_place(a, part, row)) + chunk * 8;
    sm80::copy_async(shared_q + panel_offset<Config::rows>(row, chunk), source,
                     row < part.valid_rows && chunk * 8 < p.head_dim);
  }
  sm80::copy_commit();
}

// The queries of the block's first part, to shared memory; and the new tokens into the cache. Waits for the kernel
// ahead and until the part is known. The caller waits for the other consumers. False: there is no part.
template <class Config>
__device__ __forceinline__ bool bring_queries(TurnedArguments const& a, TurnedMemory<Config> const& shared) {
  sm80::DecodeParams const& p = a.p;
  bool const walks = Config::tile.walks() && a.walks;
  TurnedPart const part = turned_part<Config>(a);
  wait_for_prerequisites();
  // They are asked for before the keys, too, where the lengths do not say whose.
  if (!walks) ask_for_queries<Config>(a, shared, part);
  wait_for_part<Config>();
  bool const exists = !walks || shared.part(0, 0).sequence >= 0;
  if (walks && exists) ask_for_queries<Config>(a, shared, shared.part(0, 0));
  if (p.new_tokens > 0) sm80::append<typename Config::Element, uint32_t>(p, Config::consumers);
  sm80::copy_wait_all();
  return exists;
}

// Puts rows that TMA has not brought in place of what it has: of the warp's 16 keys, from row `tile_row` of the tile
// on, the `first`-th of the sequence first, those behind the cached ones are new tokens, and what is behind these, of
// values, is cleared.
template <class Config>
__device__ __forceinline__ void patch(sm80::DecodeParams const& p, Rows<void const*> const& appended, bool clears,
                                      char* tile, int tile_row, TurnedPart const& part, int first, int lane) {
  using Element = typename Config::Element;
  constexpr int chunks = Config::head_dim / 8;
  int const begin = clamp_to(part.cached - first, 0, Config::warp_keys);
  int const end = clamp_to(part.keys - first, 0, Config::warp_keys);
#pragma unroll 1
  for (int i = begin * chunks + lane; i < (clears ? Config::warp_keys : end) * chunks; i += 32) {
    int const row = i / chunks, chunk = i % chunks;
    uint4 x{0, 0, 0, 0};
    if (row < end && chunk * 8 < p.head_dim) {
      x = __ldg(reinterpret_cast<uint4 const*>(
          static_cast<Element const*>(appended.data) + part.sequence * appended.batch_stride +
          (first - part.cached + row) * appended.row_stride + part.head * appended.head_stride + chunk * 8));
    }
    *reinterpret_cast<uint4*>(tile + panel_offset<Config::tile_k>(tile_row + row, chunk)) = x;
  }
}

// The consumers of a group meet; group_any says whether `x` is true for any of them. (The number of a barrier is part
// of the instruction.)
template <class Config, int g = 0>
__device__ __forceinline__ void group_sync(int group) {
  if constexpr (g + 1 < Config::groups) {
    if (group != g) return group_sync<Config, g + 1>(group);
  }
  asm volatile("barrier.cta.sync.aligned %0, %1;" ::"n"(4 + g), "n"(Config::group_threads) : "memory");
}
template <class Config, int g = 0>
__device__ __forceinline__ bool group_any(int group, bool x) {
  if constexpr (g + 1 < Config::groups) {
    if (group != g) return group_any<Config, g + 1>(group, x);
  }
  int any;
  asm volatile(
      "{\n.reg .pred p, q;\nsetp.ne.b32 p, %1, 0;\nbarrier.cta.red.or.pred.aligned q, %2, %3, p;\n"
      "selp.b32 %0, 1, 0, q;\n}"
      : "=r"(any)
      : "r"(int{x}), "n"(4 + g), "n"(Config::group_threads)
      : "memory");
  return any != 0;
}

// Two weights as the product gets them.
template <class Element>
__device__ __forceinline__ float2 unpacked(uint32_t pair) {
  if constexpr (std::is_same_v<Element, __half>) {
    return __half22float2(*reinterpret_cast<__half2 const*>(&pair));
  } else {
    return {__uint_as_float(pair << 16), __uint_as_float(pair & 0xffff0000)};
  }
}

// Raises the rows' references to the largest of a tile's scores, and multiplies sums and output by what that changes.
// `begins`: the tile is the group's first, and the references are its largest scores.
// All consumers of a group come here together.
template <class Config>
__device__ __forceinline__ void raise_references(TurnedMemory<Config> const& shared, TurnedWork<Config>& work,
                                                 float const (&s)[Config::rows / 2], float factor, bool begins,
                                                 int warp, int lane) {
  constexpr int rows_held = TurnedWork<Config>::rows_held;
  int const group = warp / Config::key_warps;
  float* const states = shared.states(group);  // nobody reads the weights now
#pragma unroll
  for (int r = 0; r < rows_held; ++r) {
    int const x = r / 2 * 4 + r % 2;
    float most = fmaxf(s[x], s[x + 2]) * factor;
#pragma unroll
    for (int step = 4; step < 32; step *= 2) most = fmaxf(most, __shfl_xor_sync(0xffffffffu, most, step));
    if (lane < 4) states[warp % Config::key_warps * Config::rows + TurnedWork<Config>::row(r, lane)] = most;
  }
  group_sync<Config>(group);
  auto const before = [&](int row) {
    return begins ? TurnedWork<Config>::no_reference : shared.references(group)[row];
  };
  auto const raised = [&](int row) {
    float reference = before(row);
#pragma unroll
    for (int w = 0; w < Config::key_warps; ++w) reference = fmaxf(reference, states[w * Config::rows + row]);
    return reference;
  };
#pragma unroll
  for (int r = 0; r < rows_held; r += 2) {  // a pair of rows at a time, to have registers for 32
    int const row = TurnedWork<Config>::row(r, lane);
    float const ratio[2] = {exp2_of(before(row) - raised(row)), exp2_of(before(row + 1) - raised(row + 1))};
    work.sum[r] *= ratio[0];
    work.sum[r + 1] *= ratio[1];
    if constexpr (!Config::one_sum) work.scale_gap(r / 2, ratio[0], ratio[1]);
#pragma unroll
    for (int m = 0; m < Config::panels; ++m) {
#pragma unroll
      for (int x = 0; x < 4; ++x) work.o[m][2 * r + x] *= ratio[x % 2];
    }
  }
  group_sync<Config>(group);  // all have read both
  if (warp % Config::key_warps == 0 && lane < 4) {
#pragma unroll
    for (int r = 0; r < rows_held; ++r) {
      int const row = TurnedWork<Config>::row(r, lane);
      shared.references(group)[row] = raised(row);
    }
  }
  group_sync<Config>(group);
}

// What a consumer warp goes through its parts with: its place in the ring, and its group's tiles before.
struct TurnedPlace {
  StagePlace stage;
  int turns = 0;
};

// A part's tiles.
template <class Config>
__device__ __forceinline__ void consume(TurnedArguments const& a, TurnedMemory<Config> const& shared, int number,
                                        TurnedWork<Config>& work, TurnedPlace& at, int warp, int lane) {
  using Element = typename Config::Element;
  constexpr int rows = Config::rows;
  sm80::DecodeParams const& p = a.p;
  // The groups take the tiles in turn. Of a tile, this warp's first key:
  int const group = warp / Config::key_warps, tile_key = warp % Config::key_warps * Config::warp_keys;
  float const factor = p.score.factor;
  bool const exact = Config::one_sum && p.lse != nullptr;  // see one_sum
  TurnedPart const& part = shared.part(group, number);
  StagePlace place = at.stage;
  int const count = part.count, turns_before = at.turns;
  auto const release = [&] {
    __syncwarp();  // all lanes are done with it
    if (lane == 0) shared.empty(group)[place.stage].arrive();
    place.advance(shared.slots());
  };
  auto const patch_with = [&](Rows<void const*> const& appended, bool clears, char* tile, int first, bool here) {
    if (here && first + Config::warp_keys > part.cached) {
      patch<Config>(p, appended, clears, tile, tile_key, part, first, lane);
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
  if constexpr (Config::merges) {
    if (part.slot >= 0 && threadIdx.x == 0) {
      open_count(a, part.first_team, blockIdx.x - a.parts.lines.quotient(blockIdx.x) * a.parts.lines.divisor);
    }
  }
#pragma unroll 1
  for (int i = group; i < count; i += Config::groups) {
    int const turn = i / Config::groups, tile = part.first + i * part.step, first = tile * Config::tile_k + tile_key;
    shared.full(group)[place.stage].wait(place.phase);
    bool const here =
        p.page_table == nullptr || (shared.absent(group)[place.stage] >> (tile_key >> a.log_box) & 1) == 0;
    bool const has_edge = (tile + 1) * Config::tile_k > part.cached;
    if (has_edge && p.new_tokens > 0) patch_with(p.new_k, false, shared.slot(group, place.stage), first, here);

    float s[rows / 2];
    hold(s);
    cute::warpgroup_arrive();
    uint64_t const keys = behind(slots, place.stage * Config::kv_bytes);
#pragma unroll
    for (int d = 0; d < Config::head_dim / 16; ++d) {
      int const panel = d / 4, right = d % 4 * 32;
      multiply_shared<Element, rows, wgmma::Major::K>(s, behind(keys, panel * Config::tile_k * row_bytes + right),
                                                      behind(queries, panel * rows * row_bytes + right), d > 0);
    }
    cute::warpgroup_commit_batch();
    hold(s);
    if (i >= Config::groups) shared.weights_read(group).wait(~(turns_before + turn) & 1);
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
      for (int r = 0; r < TurnedWork<Config>::rows_held; ++r) {
        int const token = a.group.quotient(part.first_row + TurnedWork<Config>::row(r, lane));
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
    float sum[TurnedWork<Config>::rows_held];
    uint32_t gap[TurnedWork<Config>::rows_held / 2];                 // as in TurnedWork
    constexpr int at_once = min_of(rows, 16), eights = at_once / 8;  // rows whose weights one instruction stores
    // This lane's row of the matrices that are stored, each transposed: eight rows' weights of eight keys.
    auto const matrices = [&](int j) {
      int const row = j * 16 + lane / 16 * 8 + lane % 8, chunk = tile_key / 8 + lane / 8 % 2;
      return to + row * row_bytes + ((chunk ^ row) & 7) * 16;
    };
    auto const sum_of_pairs = [&](uint32_t const(&packed)[2 * eights], int h) {
      float2 const first = unpacked<Element>(packed[2 * h]), second = unpacked<Element>(packed[2 * h + 1]);
      return float2{first.x + second.x, first.y + second.y};
    };
    // (Of 32 rows, the least is looked for apart: there are no registers for it beside the weights.)
    float most_before = minus_infinity();
    if constexpr (rows > 16) {
      if (turn == 0) {
        float least = exact ? minus_infinity() : 0.0f;
#pragma unroll
        for (int x = 0; x < rows / 2; ++x) least = fminf(least, s[x]);
        if (least * factor < Config::least) most_before = -minus_infinity();
      }
    }
    auto const weigh = [&] {
      float most = most_before, least = 0.0f;
#pragma unroll
      for (int j = 0; j < rows / at_once; ++j) {
        float w[4 * eights];
#pragma unroll
        for (int h = 0; h < eights; ++h) {
          int const held = 4 * j + 2 * h;
          float2 const reference =
              *reinterpret_cast<float2 const*>(shared.references(group) + TurnedWork<Config>::row(held, lane));
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
        uint32_t const at = matrices(j);
        uint32_t packed[2 * eights];
#pragma unroll
        for (int h = 0; h < 2 * eights; ++h) packed[h] = Precision<Element>::pack(w[2 * h], w[2 * h + 1]);
#pragma unroll
        for (int h = 0; h < eights; ++h) {
          float2 const got = sum_of_pairs(packed, h);
          int const held = 4 * j + 2 * h;
          if constexpr (Config::one_sum) {
            if (!exact) sum[held] = got.x, sum[held + 1] = got.y;
          } else {
            gap[held / 2] = Precision<__nv_bfloat16>::pack(got.x - sum[held], got.y - sum[held + 1]);
          }
        }
        if constexpr (eights == 1) {
          asm volatile("stmatrix.sync.aligned.m8n8.x2.trans.shared.b16 [%0], {%1, %2};" ::"r"(at), "r"(packed[0]),
                       "r"(packed[1])
                       : "memory");
        } else {
          asm volatile("stmatrix.sync.aligned.m8n8.x4.trans.shared.b16 [%0], {%1, %2, %3, %4};" ::"r"(at),
                       "r"(packed[0]), "r"(packed[1]), "r"(packed[2]), "r"(packed[3])
                       : "memory");
        }
      }
      cutlass::arch::fence_view_async_shared();
      return most > (exact ? 0.0f : Config::slack) || (turn == 0 && least < Config::least);
    };
    if (group_any<Config>(group, weigh())) {
      raise_references<Config>(shared, work, s, factor, turn == 0, warp, lane);
      weigh();
      group_sync<Config>(group);
    }
#pragma unroll
    for (int r = 0; r < TurnedWork<Config>::rows_held; r += 2) {
      work.sum[r] += sum[r];
      work.sum[r + 1] += sum[r + 1];
      if constexpr (!Config::one_sum) work.add_gap(r / 2, gap[r / 2]);
    }

    shared.full(group)[place.stage].wait(place.phase);
    if (has_edge) patch_with(p.new_v, true, shared.slot(group, place.stage), first, here);
    uint64_t const values = behind(slots, place.stage * Config::kv_bytes);
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
    shared.weights_read(group).wait(~(turns_before + turns) & 1);
    at.turns = turns_before + turns;
  }
  if (count <= group && part.ahead > group) {  // a tile was asked for in vain: it is to arrive before its place is used
    shared.full(group)[0].wait(0);
    shared.full(group)[1].wait(0);
  }
  at.stage = place;
}

}  // namespace flashcore::sm90

// SPDX-License-Identifier: Apache-2.0
// The warps of the Hopper decode kernel that multiply what has come, each 16 keys of every tile.
#pragma once

#include "sm90/decode_block.cuh"

namespace flashcore::sm90 {

// Puts rows that TMA has not brought in place of what it has: of the warp's 16, rows begin to end are new tokens, row r
// being token first_token + r, and the rest, of values, is cleared.
template <class Config>
__device__ __forceinline__ void patch(sm80::DecodeParams const& p, Rows<void const*> const& appended, bool clears,
                                      BoxTile const& tile, char* rows, DecodePart const& part, int begin, int end,
                                      int first_token, int lane) {
  using Element = typename Config::Element;
  constexpr int chunks = Config::head_dim / 8;
#pragma unroll 1
  for (int i = begin * chunks + lane; i < (clears ? Config::warp_keys : end) * chunks; i += 32) {
    int const row = i / chunks, chunk = i % chunks;
    uint4 x{0, 0, 0, 0};
    if (row < end && chunk * 8 < p.head_dim) {
      x = __ldg(reinterpret_cast<uint4 const*>(
          static_cast<Element const*>(appended.data) + part.sequence * appended.batch_stride +
          (first_token + row) * appended.row_stride + part.head * appended.head_stride + chunk * 8));
    }
    *reinterpret_cast<uint4*>(rows + tile.offset(row, chunk)) = x;
  }
}

// Before the kernel ahead has ended: asks for the block's first tiles and for its queries to be brought into the L2
// cache, which all kernels share. What is read of lengths and page table may be about to change; then what is brought
// is of no use. Only the blocks that run at once do so: the others find the kernel ahead done.
template <class Config>
__device__ __forceinline__ void prefetch(DecodeArguments const& a) {
  using Element = typename Config::Element;
  sm80::DecodeParams const& p = a.p;
  int const number = blockIdx.x >> a.log_cluster, rank = blockIdx.x - (number << a.log_cluster);
  int const thread = threadIdx.x;
  DecodePart part;
  // Of the part's item: the first tile that counts, the end of the keys, and how many parts it has, this the
  // `index`-th.
  int begin = 0, end = p.seqlen_k, parts = a.even.divisor, index;
  bool tiles_known = true;
  if (a.even.divisor > 0) {
    part = even_part<Config>(a, index);
    tiles_known = p.window_left >= unlimited;
  } else {
    if (blockIdx.x >= Config::tile.units * Config::blocks_a_unit) return;
    bool const walks = a.parts.most_parts == 0;
    int const team = a.parts.lines.quotient(number);
    FoundSequence const found = find_sequence<true>(p, a.parts, walks ? team : number, -1, thread % 32);
    if (found.sequence < 0) return;
    int const in_sequence = walks ? number - team * a.parts.lines.divisor : number - found.before;
    index = walks ? 0 : a.parts.lines.quotient(in_sequence);
    part = part_of_line<Config>(a, found.sequence, in_sequence - index * a.parts.lines.divisor);
    begin = found.range.begin;
    end = found.cached;
    parts = found.parts;
    if (walks) {
      DecodeParts::Piece const piece = DecodeParts::piece(found.line, found.before, found.range.count(), team);
      begin += piece.first;
      parts = piece.step;
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
  if (!tiles_known) return;
  int const way = begin + (index << a.log_shares | rank);
  static_assert(Config::consumers >= 2 * Config::tile_k);
  if (thread >= 2 * Config::tile_k) return;
  Rows<void const*> const& rows = thread < Config::tile_k ? p.k : p.v;
#pragma unroll 1
  for (int i = 0; i < a.prefetched; ++i) {
    int const key = (way + i * (parts << a.log_shares)) * Config::tile_k + thread % Config::tile_k;
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

// Asks for a part's queries to be brought to shared memory.
template <class Config>
__device__ __forceinline__ void ask_for_queries(DecodeArguments const& a, DecodeMemory<Config> const& shared,
                                                DecodePart const& part) {
  using Element = typename Config::Element;
  using Queries = sm80::SharedTile<Config::head_dim>;
  constexpr int rows = Config::rows, chunks = Config::head_dim / 8, consumers = Config::consumers;
  sm80::DecodeParams const& p = a.p;
  uint32_t const shared_q = shared_address(shared.queries());
#pragma unroll 1
  for (int i = threadIdx.x; i < rows * chunks; i += consumers) {
    int const row = i / chunks, chunk = i % chunks;
    Element const* const source =
        static_cast<Element const*>(p.q.data) + row_offset(p.q, part.sequence, row_place(a, part, row)) + chunk * 8;
    sm80::copy_async(shared_q + Queries::offset(row, chunk), source, row < part.valid_rows && chunk * 8 < p.head_dim);
  }
  sm80::copy_commit();
}

// Waits for the part and for its queries.
template <class Config>
__device__ __forceinline__ void start_consumer(DecodeArguments const& a, DecodeMemory<Config> const& shared) {
  using Element = typename Config::Element;
  constexpr int consumers = Config::consumers;
  sm80::DecodeParams const& p = a.p;
  DecodePart const& part = shared.part(0);

  // The queries are asked for before the keys, too, where the lengths do not say whose.
  bool const known = a.even.divisor > 0;
  DecodePart place_of_q;
  int index;
  if (known) place_of_q = even_part<Config>(a, index);
  wait_for_prerequisites();
  if (!known) {
    wait_for_part<Config>();
    place_of_q = part;
    if (part.sequence < 0) {
      if (p.new_tokens > 0) sm80::append<Element, uint32_t>(p, consumers);
      return;
    }
  }
  ask_for_queries<Config>(a, shared, place_of_q);
  if (known) wait_for_part<Config>();
  if (p.new_tokens > 0) sm80::append<Element, uint32_t>(p, consumers);
  sm80::copy_wait_all();
  consumers_sync(consumers);  // the queries are here
}

// A part's tiles.
template <class Config>
__device__ __forceinline__ void consume(DecodeArguments const& a, DecodeMemory<Config> const& shared,
                                        DecodePart const& part, Work<Config>& work, StagePlace& place, int warp,
                                        int lane) {
  constexpr int consumers = Config::consumers;
  sm80::DecodeParams const& p = a.p;
  int const slice = warp / Config::key_warps, tile_key = warp % Config::key_warps * Config::warp_keys;
  // This lane's rows of the operands, as in the forward kernel: in the queries, and in a tile, where the warp's keys,
  // and its own places of keys and of values are.
  using Queries = sm80::SharedTile<Config::head_dim>;
  uint32_t const from_q = shared_address(shared.queries()) + Queries::offset(slice * 16 + lane % 16, lane / 16);
  BoxTile const box{128 << a.log_box};
  int const in_tile =
      (tile_key >> a.log_box) * Config::panels * box.panel_bytes + (tile_key & ((1 << a.log_box) - 1)) * 128;
  int const lane_k = in_tile + box.offset(lane % 8 + lane / 16 * 8, lane / 8 % 2);
  int const lane_v = in_tile + box.offset(lane % 16, lane / 16);
  work.start(from_q);
  int const count = part.count();
#pragma unroll 1
  for (int i = 0; i < count; ++i) {
    int const tile = part.first + i * part.step, first = tile * Config::tile_k + tile_key;
    char* const stage_keys = shared.keys(place.stage);
    shared.full_keys()[place.stage].wait(place.phase);
    bool const here = p.page_table == nullptr || (shared.absent()[place.stage] >> (tile_key >> a.log_box) & 1) == 0;
    bool const patched = here && first + Config::warp_keys > part.cached;
    // One slice's warps do it for all, which then come together wherever a tile has such rows for any warp.
    auto const patch_with = [&](Rows<void const*> const& appended, bool clears, char* tile_rows) {
      if (patched && slice == 0) {
        patch<Config>(p, appended, clears, box, tile_rows + in_tile, part,
                      clamp_to(part.cached - first, 0, Config::warp_keys),
                      clamp_to(part.keys - first, 0, Config::warp_keys), first - part.cached, lane);
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

    shared.full_values()[place.stage].wait(place.phase);
    if (has_edge) patch_with(p.new_v, true, shared.values(place.stage));
    work.output(weights, box, shared_address(stage_keys) + Config::kv_bytes + lane_v);
    __syncwarp();  // all lanes are done with the stage
    if (lane == 0) shared.empty()[place.stage].arrive();
    place.advance(shared.stages);
  }
  if (count <= 0 && part.ahead) {  // a tile was asked for in vain: nothing is to come behind
    shared.full_keys()[0].wait(0);
    shared.full_values()[0].wait(0);
    __syncwarp();
    if (lane == 0) shared.empty()[0].arrive();
    place.advance(shared.stages);
  }
}

}  // namespace flashcore::sm90

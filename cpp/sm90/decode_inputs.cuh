// SPDX-License-Identifier: Apache-2.0
// What the consumers of the Hopper decode kernels bring themselves: queries, new tokens, and into the L2 cache what the
// block will ask for first.
#pragma once

#include "sm90/decode_block.cuh"

namespace flashcore::sm90 {

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
    FoundSequence const found = find_sequence<true>(p, a.parts, number, -1, thread % 32);
    if (found.sequence < 0) return;
    int const in_sequence = number - found.before;
    index = a.parts.lines.quotient(in_sequence);
    part = part_of_line<Config>(a, found.sequence, in_sequence - index * a.parts.lines.divisor);
    begin = found.range.begin;
    end = found.cached;
    parts = found.parts;
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
  int const way = begin + (index << a.log_cluster | rank);
  static_assert(Config::consumers >= 2 * Config::tile_k);
  if (thread >= 2 * Config::tile_k) return;
  Rows<void const*> const& rows = thread < Config::tile_k ? p.k : p.v;
#pragma unroll 1
  for (int i = 0; i < a.prefetched; ++i) {
    int const key = (way + i * (parts << a.log_cluster)) * Config::tile_k + thread % Config::tile_k;
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

// Puts rows that TMA has not brought in place of what it has: of a warp's 16 keys, of which the `first`-th of the
// sequence is the first, those behind the cached ones are new tokens, and what is behind these, of values, is cleared.
// `place(row, chunk)` is where 16 bytes of a row lie.
template <class Config, class Place>
__device__ __forceinline__ void patch(sm80::DecodeParams const& p, Rows<void const*> const& appended, bool clears,
                                      DecodePart const& part, int first, int lane, Place place) {
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
    *reinterpret_cast<uint4*>(place(row, chunk)) = x;
  }
}

// The queries of the block's part, to shared memory, 16 bytes to each `place(row, chunk)`; and the new tokens into the
// cache. Waits for the kernel ahead and until the part is known; false where there is none. The caller waits for the
// other consumers.
template <class Config, class Place>
__device__ __forceinline__ bool bring_queries(DecodeArguments const& a, typename Config::Memory const& shared,
                                              Place place) {
  using Element = typename Config::Element;
  constexpr int chunks = Config::head_dim / 8, consumers = Config::consumers;
  sm80::DecodeParams const& p = a.p;
  DecodePart const& part = shared.part();
  // They are asked for before the keys, too, where the lengths do not say whose.
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
      return false;
    }
  }
  uint32_t const shared_q = shared_address(shared.queries());
#pragma unroll 1
  for (int i = threadIdx.x; i < Config::rows * chunks; i += consumers) {
    int const row = i / chunks, chunk = i % chunks;
    Element const* const source = static_cast<Element const*>(p.q.data) +
                                  row_offset(p.q, place_of_q.sequence, row_place(a, place_of_q, row)) + chunk * 8;
    sm80::copy_async(shared_q + place(row, chunk), source, row < place_of_q.valid_rows && chunk * 8 < p.head_dim);
  }
  sm80::copy_commit();
  if (known) wait_for_part<Config>();
  if (p.new_tokens > 0) sm80::append<Element, uint32_t>(p, consumers);
  sm80::copy_wait_all();
  return true;
}

}  // namespace flashcore::sm90

// SPDX-License-Identifier: Apache-2.0
// The warps of sm90_decode_turned that find out how many tiles the block's part has and ask TMA for them.
#pragma once

#include "sm90/decode_turned_block.cuh"

namespace flashcore::sm90 {

// A team's way along its share of the line of all sequences' tiles (attention/decode_parts.h), as a block of it goes.
struct TeamWalk {
  DecodeParts::Line line;
  int team, item_line, at, end;

  // The first part; its sequence is -1 if there is none.
  template <class Config>
  __device__ __forceinline__ TurnedPart start(TurnedArguments const& a, int lane) {
    team = a.parts.lines.quotient(blockIdx.x);
    item_line = blockIdx.x - team * a.parts.lines.divisor;
    FoundSequence const found = find_sequence(a.p, a.parts, team, -1, lane);
    line = found.line;
    at = found.before;
    end = min_of((team + 1) * line.share, found.total);
    TurnedPart part{};
    part.sequence = found.sequence;
    set_rows<Config>(a, item_line, part);
    part.cached = found.cached;
    take(a, part, found.range);
    return part;
  }

  // The part behind `part`.
  template <class Config>
  __device__ __forceinline__ void go_on(TurnedArguments const& a, TurnedPart& part) {
    part.cached = cached_keys(a.p, ++part.sequence);
    take(a, part, a.parts.range(a.p, part.cached + a.p.new_tokens));
  }

 private:
  __device__ __forceinline__ void take(TurnedArguments const& a, TurnedPart& part, KeyRange const& range) {
    DecodeParts::Piece const piece = DecodeParts::piece(line, at, range.count(), team);
    part.keys = part.cached + a.p.new_tokens;
    part.full_begin = range.full_begin;
    part.full_end = range.full_end;
    part.first = range.begin + piece.first;
    part.count = piece.first < piece.end ? parts_of(piece.end - piece.first, piece.step) : 0;
    part.step = piece.step;
    part.parts = piece.parts;
    part.slot = piece.parts == 1 ? -1 : DecodeParts::slot(team, piece.index) * a.parts.lines.divisor + item_line;
    part.first_team = team - piece.index;
    at += line.room(range.count());
    part.last = at >= end;
  }
};

// One warp, the `group`-th of the block's producers, which take its tiles in turn: finds out what the block's part is,
// leaves it to the consumers, and asks for its tiles as its ring's places empty.
template <class Config>
__device__ __forceinline__ void produce(TurnedArguments const& a, TurnedMemory<Config> const& shared, int group,
                                        int lane) {
  constexpr int groups = Config::groups, log_tile = 6;
  static_assert(Config::tile_k == 1 << log_tile);
  sm80::DecodeParams const& p = a.p;
  TurnedRing<Config> ring{a, shared, group};
  int const box_rows = 1 << a.log_box, log_boxes = log_tile - a.log_box, boxes = 1 << log_boxes;
  bool const paged = p.page_table != nullptr;
  // Where all of a tile's boxes begin in their pages: a page has a tile, or all of a box.
  auto const row_in_page = [&](int key) { return key & (p.page_size - 1); };

  // What the page table says of 32 boxes of the producer's tiles, one a lane, where they begin before key `end`.
  // Nothing looks at it before it is needed, or the warp would wait for it.
  auto const pages_from = [&](TurnedPart const& part, int box, int end) {
    box += lane;
    int const i = box >> log_boxes, tile = part.first + (i * groups + group) * part.step;
    int const key = tile * Config::tile_k + (box - (i << log_boxes)) * box_rows;
    int const* const entry = p.page_table + part.sequence * p.page_table_stride + (key >> a.log_page);
    int page = -1;
    asm volatile("{\n.reg .pred p;\nsetp.lt.s32 p, %2, %3;\n@p ld.relaxed.gpu.global.b32 %0, [%1];\n}"
                 : "+r"(page)
                 : "l"(entry), "r"(key), "r"(end)
                 : "memory");
    return page;
  };
  auto const existing = [&](int page) { return page >= 0 && page < p.pages ? page : -1; };
  int next_pages = -1;

  // The blocks of all of an item's parts take its tiles in turn: what is read at the same time lies side by side.
  TurnedPart part = turned_part<Config>(a);
  int const way = part.first, first_tile = way + group * part.step;
  bool const walks = Config::tile.walks() && a.walks;
  TeamWalk walk;
  // The producers know their first tiles without the length, unless a window says where they are.
#pragma unroll
  for (int g = 0; g < groups; ++g) {
    bool const exists = (way + g * part.step) * Config::tile_k < p.seqlen_k;
    part.ahead += p.window_left >= unlimited && exists && !walks;
  }
  bool const ahead = group < part.ahead, may_be_wrong = ahead && paged;
  if (group > 0 && !may_be_wrong) tell_part<Config>();
  // Of its pages, the table may say something else when the kernel ahead has ended. That is found out when the tile has
  // been asked for. (32,768 keys in pages of 64 in order, read behind that end / before, us: 45.6 / 44.9.)
  int pages_before = -1;
  TurnedBoxes<Config> first{};
  auto const first_boxes = [&](int page) {
    int const row = first_tile * Config::tile_k;
    return ring.tile(paged ? row_in_page(row) : row, part.head, paged ? existing(page) : part.sequence);
  };
  if (ahead) {
    part.first = way;
    if (paged) pages_before = pages_from(part, 0, p.seqlen_k);
    first = first_boxes(pages_before);
    ring.expect_first(first);
  }
  // Then the warp goes through here twice, the first time for the instructions, while the kernel ahead still runs.
#pragma unroll 1
  for (int pass = walks ? 1 : 0; pass < 2; ++pass) {
    bool const acts = pass == 1;
    if (acts) {
      wait_for_prerequisites();
      if (a.prefetched == 0) launch_dependents();
    }
    // The length is asked for first: behind the keys it would wait for them. The first tile comes while it does.
    int length = p.seqlen_k;
    if (walks) {
      if constexpr (Config::tile.walks()) part = walk.template start<Config>(a, lane);
    } else if (acts && p.cache_seqlens != nullptr)
      asm volatile("ld.global.b32 %0, [%1];" : "=r"(length) : "l"(p.cache_seqlens + part.sequence));
    if (ahead && paged) {
      part.first = way;
      next_pages = pages_from(part, 0, acts ? p.seqlen_k : 0);
    }
    if (ahead) ring.load_first(first, acts);
    if (!walks) {
      part.cached = clamp_to(length, 0, p.seqlen_k - p.new_tokens);
      part.keys = part.cached + p.new_tokens;
      KeyRange const range = a.parts.range(p, part.keys);
      part.first = range.begin + way;
      part.count = a.even.quotient((max_of(range.count() - way, 0) + part.step - 1) >> a.log_cluster);
      part.full_begin = range.full_begin;
      part.full_end = range.full_end;
      part.last = 1;
    }
    if (acts && may_be_wrong) {
      bool const other = lane < boxes && existing(next_pages) != existing(pages_before);
      if (__any_sync(0xffffffffu, other)) {
        ring.forget_first();
        ring.load(first_boxes(next_pages));
      }
    }
    if (acts && lane == 0 && group == 0) {
#pragma unroll
      for (int g = 0; g < (Config::tile.walks() ? groups : 1); ++g) shared.part(g, 0) = part;
      if (a.log_cluster > 0) {  // what the cluster's blocks will send
        shared.received_all()->arrive_and_expect_tx(4 * part.valid_rows * (Config::head_dim + (1 << a.log_cluster)));
      }
    }
  }
  __syncwarp();
  if (group == 0 || may_be_wrong) tell_part<Config>();
  if (group == 0) tell_producers<Config>();

  auto const let_next = [&] {
    if (a.prefetched > 0 && group == groups - 1) launch_dependents();
  };
#pragma unroll 1
  for (int of_block = 1; part.sequence >= 0; ++of_block) {
    // The pages of 32 boxes at a time, one a lane, and those of the next 32 meanwhile.
    int pages = -1;
    bool const has_first = of_block == 1 && ahead;
    if (paged && !has_first) next_pages = pages_from(part, 0, part.keys);
#pragma unroll 1
    for (int i = group, box = 0; i < part.count; i += groups, box += boxes) {
      int block = part.sequence, row = (part.first + i * part.step) * Config::tile_k;
      if (paged) {
        if (box % 32 == 0) {
          pages = existing(next_pages);
          next_pages = pages_from(part, box + 32, part.keys);
        }
        block = __shfl_sync(0xffffffffu, pages, (box + lane) % 32);
        row = row_in_page(row);
      }
      // The next call's blocks may come when the last tile is about to be asked for: 32,768 keys 44.4 us in every
      // round. When it has been, 45 to 55, by where the blocks find room, it seems; when the last two are about to be,
      // 45.2.
      if (i + groups >= part.count && part.last) let_next();
      if (i > group || !has_first) ring.load(ring.tile(row, part.head, block));
    }
    if (part.last) break;
    if constexpr (Config::tile.walks()) {
      walk.template go_on<Config>(a, part);
      // A slot without keys, where the group's output lies meanwhile; with it comes what the next part is.
      if (lane == 0) {
        shared.empty(group)[ring.place.stage].wait(ring.place.phase ^ 1);
        shared.part(group, of_block) = part;
        shared.full(group)[ring.place.stage].arrive();
      }
      __syncwarp();
      ring.place.advance(shared.slots());
    }
  }
  if (part.sequence < 0 || part.count <= group) let_next();
  if (group > 0) wait_as_producer<Config>();
}

}  // namespace flashcore::sm90

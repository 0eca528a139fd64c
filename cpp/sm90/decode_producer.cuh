// SPDX-License-Identifier: Apache-2.0
// The warp of the Hopper decode kernel that finds out what the block's part is and asks TMA for its tiles.
#pragma once

#include <cute/arch/copy_sm90_tma.hpp>

#include "sm90/decode_block.cuh"

namespace flashcore::sm90 {

// What TMA tells the L2 cache: nobody reads keys and values again.
constexpr uint64_t read_once = 0x12f0000000000000;

// One warp: finds out what the block's part is, leaves it to the consumers, and asks for its tiles as the stages empty,
// each box by a lane.
template <class Config>
__device__ __forceinline__ void produce(DecodeArguments const& a, DecodeMemory<Config> const& shared, int lane) {
  sm80::DecodeParams const& p = a.p;
  StagePlace place;
  constexpr int log_tile = 6;
  static_assert(Config::tile_k == 1 << log_tile);
  int const box_rows = 1 << a.log_box, log_boxes = log_tile - a.log_box, boxes = 1 << log_boxes;
  // A box that is not there comes as zeros from behind the last page.
  int const nowhere = max_of(p.pages, 1);
  auto const load = [&](int row, int head, int block, bool acts) {
    if (acts) shared.empty()[place.stage].wait(place.phase ^ 1);
    uint32_t const absent = __ballot_sync(0xffffffffu, lane < boxes && block < 0);
    DecodeBarrier &full_keys = shared.full_keys()[place.stage], &full_values = shared.full_values()[place.stage];
    if (acts && lane == 0) {
      if (p.page_table != nullptr) shared.absent()[place.stage] = absent;
      full_keys.arrive_and_expect_tx(Config::kv_bytes);
      full_values.arrive_and_expect_tx(Config::kv_bytes);
    }
    __syncwarp();
    if (acts && lane < boxes) {
      int const at = block < 0 ? nowhere : block;
#pragma unroll 1
      for (int i = 0; i < 2; ++i) {
        char* to =
            (i == 0 ? shared.keys(place.stage) : shared.values(place.stage)) + lane * (Config::kv_bytes >> log_boxes);
#pragma unroll 1
        for (int panel = 0; panel < a.column_boxes; ++panel) {
          cute::SM90_TMA_LOAD_5D::copy(i == 0 ? &a.k : &a.v,
                                       reinterpret_cast<uint64_t*>(i == 0 ? &full_keys : &full_values), read_once, to,
                                       panel * 64, row, 0, head, at);
          to += box_rows * 128;
        }
      }
    }
    __syncwarp();
    if (acts) place.advance(shared.stages);
  };

  // What the page table says of 32 boxes of the part, one a lane, where they begin before key `end`. Nothing looks at
  // it before it is needed, or the warp would wait for it.
  auto const pages_from = [&](DecodePart const& part, int box, int end) {
    box += lane;
    int const i = box >> log_boxes;
    int const key = (part.first + i * part.step) * Config::tile_k + (box - (i << log_boxes)) * box_rows;
    return key < end ? p.page_table[part.sequence * p.page_table_stride + (key >> a.log_page)] : -1;
  };
  auto const existing = [&](int page) { return page >= 0 && page < p.pages ? page : -1; };
  int next_pages = -1;

  DecodePart part;
  KeyRange range;
  part.ahead = false;
  // The blocks of all of an item's parts take its tiles in turn: what is read at the same time lies side by side.
  int const number = blockIdx.x >> a.log_cluster, rank = blockIdx.x - (number << a.log_cluster);
  int parts, way;
  // A team's walk along its share of the line.
  int const team = a.parts.lines.quotient(number), line = number - team * a.parts.lines.divisor;
  DecodeParts::Line shares_of_line{1, 0};
  int line_at = 0, line_end = 0;
  auto const take_piece = [&] {
    int const tiles = range.count();
    DecodeParts::Piece const piece = DecodeParts::piece(shares_of_line, line_at, tiles, team);
    part.first = range.begin + piece.first;
    part.end = range.begin + piece.end;
    part.step = piece.step;
    part.slot = piece.parts == 1 ? -1 : DecodeParts::slot(team, piece.index) * a.parts.lines.divisor + line;
    line_at += shares_of_line.room(tiles);
    part.last = line_at >= line_end;
  };
  auto const tell_keys = [&] {
    part.keys = part.cached + p.new_tokens;
    part.full_begin = range.full_begin;
    part.full_end = range.full_end;
  };
  int const shares = shares_of<Config>(a);
  // Where the lengths do not matter, the warp goes through here twice, the first time for the instructions, while the
  // kernel ahead still runs.
#pragma unroll 1
  for (int pass = a.even.divisor > 0 ? 0 : 1; pass < 2; ++pass) {
    bool const acts = pass == 1;
    if (acts) {
      wait_for_prerequisites();
      if (!a.late) launch_dependents();
    }
    bool walks = false;
    if (a.even.divisor > 0) {
      int index;
      part = even_part<Config>(a, index);
      parts = a.even.divisor;
      way = index << a.log_shares | rank;
      // The length is asked for first: behind the keys it would wait for them.
      int length = p.seqlen_k;
      if (acts && p.cache_seqlens != nullptr)
        asm volatile("ld.global.b32 %0, [%1];" : "=r"(length) : "l"(p.cache_seqlens + part.sequence));
      // The block knows its first tile without the length, unless a window says where it is: asked for ahead, it comes
      // while the length does.
      part.ahead = p.window_left >= unlimited && way * Config::tile_k < p.seqlen_k;
      part.first = way;
      part.step = parts << a.log_shares;
      int block = part.sequence, row = way * Config::tile_k;
      if (p.page_table != nullptr && part.ahead) {
        if (acts) next_pages = pages_from(part, 0, p.seqlen_k);
        block = existing(next_pages);
        row = (row + (lane < boxes ? lane : 0) * box_rows) & (p.page_size - 1);
      }
      if (part.ahead) load(row, part.head, block, acts);
      part.cached = clamp_to(length, 0, p.seqlen_k - p.new_tokens);
      range = a.parts.range(p, part.cached + p.new_tokens);
    } else {
      walks = a.parts.most_parts == 0;
      FoundSequence const found = find_sequence(p, a.parts, walks ? team : number, -1, lane);
      int index = 0, item_line = line;
      if (!walks) {
        int const in_sequence = number - found.before;
        index = a.parts.lines.quotient(in_sequence);
        item_line = in_sequence - index * a.parts.lines.divisor;
      }
      part = part_of_line<Config>(a, found.sequence, item_line);
      part.ahead = false;
      part.cached = found.cached;
      range = found.range;
      parts = found.parts;
      way = index << a.log_shares | rank;
      shares_of_line = found.line;
      line_at = found.before;
      line_end = min_of((team + 1) * found.line.share, found.total);
    }
    part.share = 0;
    tell_keys();
    if (walks) {
      take_piece();
    } else {
      part.step = parts << a.log_shares;
      part.first = range.begin + way;
      part.end = range.end;
      part.slot = parts == 1 ? -1 : number;
      part.last = shares == 1;
    }
    if (acts && lane == 0) {
      shared.part(0) = part;
      if (a.log_cluster > 0 && part.sequence >= 0) {  // what the cluster's blocks will send
        int const columns = Config::head_dim >> a.log_cluster;
        shared.received_all()->arrive_and_expect_tx((4 * part.valid_rows * (columns + 1)) << a.log_shares);
      }
    }
  }
  __syncwarp();
  tell_part<Config>();
  if (part.sequence < 0) return;

#pragma unroll 1
  for (int of_block = 1;; ++of_block) {
    // The pages of 32 boxes at a time, one a lane, and those of the next 32 meanwhile.
    int pages = -1;
    if (p.page_table != nullptr && !part.ahead) next_pages = pages_from(part, 0, part.keys);
    int const count = part.count();
#pragma unroll 1
    for (int i = 0, box = 0; i < count; ++i, box += boxes) {
      int block = part.sequence, row = (part.first + i * part.step) * Config::tile_k;
      if (p.page_table != nullptr) {
        if (box % 32 == 0) {
          pages = existing(next_pages);
          next_pages = pages_from(part, box + 32, part.keys);
        }
        block = __shfl_sync(0xffffffffu, pages, (box + lane) % 32);
        row = (row + (lane < boxes ? lane : 0) * box_rows) & (p.page_size - 1);
      }
      if (i > 0 || !part.ahead) load(row, part.head, block, true);
    }
    if (part.last) break;
    part.ahead = false;
    if (shares > 1) {
      part.first += 1 << a.log_cluster;
      part.last = ++part.share == shares - 1;
    } else {
      part.cached = cached_keys(p, ++part.sequence);
      range = a.parts.range(p, part.cached + p.new_tokens);
      tell_keys();
      take_piece();
    }
    // Stages without keys, where the consumers bring the part's result together while the others fill; with them comes
    // what the next part is.
#pragma unroll 1
    for (int gap = gap_stages<Config>(place, shared.stages); gap > 0; --gap) {
      if (lane == 0) {
        shared.empty()[place.stage].wait(place.phase ^ 1);
        if (gap == 1) shared.part(of_block) = part;
        shared.full_keys()[place.stage].arrive();
        shared.full_values()[place.stage].arrive();
      }
      __syncwarp();
      place.advance(shared.stages);
    }
  }
  if (a.late) launch_dependents();
}

}  // namespace flashcore::sm90

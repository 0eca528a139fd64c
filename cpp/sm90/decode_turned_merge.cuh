// SPDX-License-Identifier: Apache-2.0
// The merge of a sequence's parts in sm90_decode_turned's blocks that stay: each leaves its part's result in the
// workspace, and the last one to do so merges all of them, in the order of their keys, whoever that is. A block's two
// results are counted at its end only, where it waits for the answer once.
//
// They are counted in a word of the workspace, which may hold any bits when a call begins, as nobody clears it: so a
// word counts for one launch, whose own number its upper bits are. Where there is another one, nobody has counted yet.
// The last block leaves 0, for a graph's next replay has the same number.
#pragma once

#include "attention/combine.h"
#include "sm90/decode_turned_block.cuh"

namespace flashcore::sm90 {

constexpr int count_bits = launch_number_shift;

__device__ __forceinline__ unsigned long long* count_of(TurnedArguments const& a, int first_team, int line) {
  return a.counts + first_team * a.parts.lines.divisor + line;
}

// Takes the word for this launch: what every block does that has a part of the item, before its result is there.
__device__ __forceinline__ void open_count(TurnedArguments const& a, int first_team, int line) {
  unsigned long long* const word = count_of(a, first_team, line);
  unsigned long long expected = 0;  // as it mostly is
#pragma unroll 1
  for (;;) {
    unsigned long long const found = atomicCAS(word, expected, a.launch);
    if (found == expected || (found ^ a.launch) >> count_bits == 0) return;
    expected = found;
  }
}

// Whether this block is the last of `blocks` to have left its result. What a block's threads have written before they
// met and one of them came here is seen by those of the last block that meet this one afterwards.
__device__ __forceinline__ bool count_in(TurnedArguments const& a, int first_team, int line, int blocks) {
  unsigned long long* const word = count_of(a, first_team, line);
  unsigned long long before;
  asm volatile("atom.acq_rel.gpu.global.add.u64 %0, [%1], 1;" : "=l"(before) : "l"(word) : "memory");
  bool const last = static_cast<int>(before & ((1 << count_bits) - 1)) + 1 == blocks;
  if (last) *word = 0;
  return last;
}

// Says what the block's divided items are, when it has finished `part`. The thread that does so has cleared what is
// told of the first one when the block began.
__device__ __forceinline__ void tell_item(DividedItem* items, TurnedPart const& part, bool last) {
  if (part.slot >= 0) {
    items[last] = {part.sequence, part.first_team, part.parts};
  } else if (last) {
    items[1].parts = 0;
  }
}

// What another block has written, if there is any; else `x` stays. Without a branch, so that loads that follow each
// other are all on their way at once, and not from the L1 cache.
__device__ __forceinline__ void load_if(bool exists, float const* from, float4& x) {
  asm volatile("{\n.reg .pred p;\nsetp.ne.b32 p, %5, 0;\n@p ld.global.cg.v4.f32 {%0, %1, %2, %3}, [%4];\n}"
               : "+f"(x.x), "+f"(x.y), "+f"(x.z), "+f"(x.w)
               : "l"(from), "r"(int{exists})
               : "memory");
}
__device__ __forceinline__ void load_if(bool exists, float const* from, float& x) {
  asm volatile("{\n.reg .pred p;\nsetp.ne.b32 p, %2, 0;\n@p ld.global.cg.f32 %0, [%1];\n}"
               : "+f"(x)
               : "l"(from), "r"(int{exists})
               : "memory");
}

// The rows of an item from its parts' results. A thread has four columns of a row; where that leaves others without
// work and there are many parts, lanes side by side take these in turn and come together in a tree. write(row, column,
// x, lse) takes four columns. `acts`: as in finish().
template <class Config, class Write>
__device__ __forceinline__ void merge_item(TurnedArguments const& a, DividedItem const& item, int line, int rows,
                                           bool acts, Write const& write) {
  constexpr int row_pieces = Config::head_dim / 4;
  constexpr int at_once = 4;  // parts on their way to a thread; with eight all took longer
  sm80::DecodeParams const& p = a.p;
  int const count = acts ? item.parts : 0, pieces = rows * row_pieces, lines = a.parts.lines.divisor;
  // The rows of all parts' results lie in one array. Those of the second part and all behind it are as far apart.
  int const first_team = acts ? item.first_team : 0, stride = 2 * lines * p.part_rows;
  int const first_part = (DecodeParts::slot(first_team, 0) * lines + line) * p.part_rows;
  int const second_part = (DecodeParts::slot(first_team + 1, 1) * lines + line) * p.part_rows;
  int log_lanes = 0;
#pragma unroll 1
  while (log_lanes < 4 && pieces << (log_lanes + 1) <= Config::consumers && at_once << log_lanes < count) ++log_lanes;
  int const lanes = 1 << log_lanes;
#pragma unroll 1
  for (int first = threadIdx.x / 32 * 32 % Config::consumers; first < pieces << log_lanes; first += Config::consumers) {
    int const i = (first + threadIdx.x % 32) >> log_lanes, lane = threadIdx.x & (lanes - 1);
    int const row = i / row_pieces, column = i % row_pieces * 4;
    bool const exists = i < pieces, has_column = exists && column < p.head_dim;
    float top = minus_infinity(), total = 0.0f;
    float4 sum{0.0f, 0.0f, 0.0f, 0.0f};
    auto const shrink = [&](float by) { total *= by, sum.x *= by, sum.y *= by, sum.z *= by, sum.w *= by; };
    auto const take = [&](float y) { top = y > top || y != y ? y : top; };  // a NaN stays
#pragma unroll 1
    for (int base = lane; base == lane || base < count; base += at_once * lanes) {
      float lse[at_once];
      float4 x[at_once];
      float const before = top;
#pragma unroll
      for (int j = 0; j < at_once; ++j) {
        lse[j] = minus_infinity(), x[j] = {0.0f, 0.0f, 0.0f, 0.0f};
        int const part = base + j * lanes, at = row + (part == 0 ? first_part : second_part + (part - 1) * stride);
        load_if(exists && part < count, p.part_lse + at, lse[j]);
        load_if(has_column && part < count, p.part_out + at * p.head_dim + column, x[j]);
      }
#pragma unroll
      for (int j = 0; j < at_once; ++j) take(lse[j]);
      shrink(part_weight(before, top));
#pragma unroll
      for (int j = 0; j < at_once; ++j) {
        float const weight = part_weight(lse[j], top);
        total += weight;
        sum.x += weight * x[j].x, sum.y += weight * x[j].y, sum.z += weight * x[j].z, sum.w += weight * x[j].w;
      }
    }
#pragma unroll 1
    for (int step = 1; step < lanes; step *= 2) {
      auto const of_other = [step](float y) { return __shfl_xor_sync(0xffffffffu, y, step); };
      float const before = top;
      take(of_other(top));
      shrink(part_weight(before, top));
      total += of_other(total);
      sum.x += of_other(sum.x), sum.y += of_other(sum.y), sum.z += of_other(sum.z), sum.w += of_other(sum.w);
    }
    float const lse = merged_lse(top, total);
    shrink(total == 0.0f ? 0.0f : __fdividef(1.0f, total));
    if (exists && lane == 0) write(row, column, sum, lse);
  }
}

// For how many consumers, which meet here, x is true.
template <class Config>
__device__ __forceinline__ int count_consumers(bool x) {
  int count;
  asm volatile("{\n.reg .pred p;\nsetp.ne.b32 p, %1, 0;\nbarrier.cta.red.popc.aligned.u32 %0, 1, %2, p;\n}"
               : "=r"(count)
               : "r"(int{x}), "n"(Config::consumers)
               : "memory");
  return count;
}

// The end of a block: it has a part of at most two divided items, the first it had and the last. All consumers come
// here. write(sequence, row, column, x, lse) takes four columns of an item's row.
template <class Config, class Write>
__device__ __forceinline__ void merge_items(TurnedArguments const& a, DividedItem* items, int rows, bool acts,
                                            Write const& write) {
  int const line = blockIdx.x - a.parts.lines.quotient(blockIdx.x) * a.parts.lines.divisor;
  int votes = 0;
  if (acts) {
    consumers_sync(Config::consumers);  // the results are written, and what the items are
    bool last = false;
    if (threadIdx.x < 2) {
      DividedItem const& item = items[threadIdx.x];
      last = item.parts > 0 && count_in(a, item.first_team, line, item.parts);
    }
    // One thread votes for the first item, two for the second.
    unsigned const lasts = __ballot_sync(0xffffffffu, last);
    votes = count_consumers<Config>(threadIdx.x == 0 ? lasts & 1 : threadIdx.x < 3 && (lasts & 2) != 0);
  }
#pragma unroll 1
  for (int i = 0; i < 2; ++i) {
    if (acts && (votes >> i & 1) == 0) continue;
    int const sequence = acts ? items[i].sequence : 0;
    merge_item<Config>(a, items[i], line, rows, acts,
                       [&](int row, int column, float4 x, float lse) { write(sequence, row, column, x, lse); });
  }
}

}  // namespace flashcore::sm90

// SPDX-License-Identifier: Apache-2.0
// The merge of an item's parts in the Hopper decode kernels: every block leaves its part's result in the workspace, and
// the last one to do so merges them all, in the order of their keys, whoever that is.
//
// Who is last is counted in a word of the workspace, which may hold any bits when a call begins: nobody clears it
// beforehand. So a word counts for one launch only: its upper bits are the launch's own number, and what has another
// one there has not been counted in yet. The last block leaves 0, as a graph's next replay has the same number.
#pragma once

#include "attention/combine.h"
#include "sm90/decode_block.cuh"

namespace flashcore::sm90 {

// What blocks do where they have a divided item's part, before its result is there: takes the word for this launch.
__device__ __forceinline__ void open_count(MergeArguments const& merge, int first_slot) {
  unsigned long long* const word = merge.counts + first_slot;
  unsigned long long expected = 0;  // as the last launch has left it, where there was one
#pragma unroll 1
  for (;;) {
    unsigned long long const found = atomicCAS(word, expected, merge.launch);
    if (found == expected || (found ^ merge.launch) >> MergeArguments::count_bits == 0) return;
    expected = found;
  }
}

// Whether this block is the last of `blocks` to have left its result. What the block's threads have written before they
// met is seen by those of the last block after they do.
__device__ __forceinline__ bool count_in(MergeArguments const& merge, int first_slot, int blocks) {
  unsigned long long* const word = merge.counts + first_slot;
  unsigned long long before;
  __threadfence();
  asm volatile("atom.acq_rel.gpu.global.add.u64 %0, [%1], 1;" : "=l"(before) : "l"(word) : "memory");
  bool const last = static_cast<int>(before & ((1 << MergeArguments::count_bits) - 1)) + 1 == blocks;
  if (last) *word = 0;
  return last;
}

// Says what the block's divided items are, when it has finished `part`. One thread does so, from `items` as it begins.
template <class Arguments, class Part>
__device__ __forceinline__ void tell_item(Arguments const& a, DividedItem* items, Part const& part, bool last,
                                          bool acts) {
  if (!acts || threadIdx.x != 0 || a.merge.counts == nullptr) return;
  if (part.slot >= 0) {
    items[last] = {part.sequence, part.first_slot, part.parts, 0};
  } else if (last) {
    items[1].parts = 0;
  }
}

// The rows of an item from its parts' results. A thread has four columns of a row; where that leaves threads without
// work and there are many parts, lanes side by side take these in turn and come together in a tree. `acts`: as in
// finish().
template <class Config, class Arguments, class Write>
__device__ __forceinline__ void merge_item(Arguments const& a, DividedItem const& item, int rows, bool acts,
                                           Write const& write) {
  // What a thread has on its way at once. (The turned kernel has no registers for more.)
  constexpr int row_pieces = Config::head_dim / 4, at_once = Config::consumers == 256 && Config::rows > 8 ? 4 : 8;
  sm80::DecodeParams const& p = a.p;
  int const count = acts ? item.parts : 0, pieces = rows * row_pieces;
  int log_lanes = 0;
#pragma unroll 1
  while (log_lanes < 4 && pieces << (log_lanes + 1) <= Config::consumers && at_once << log_lanes < count) ++log_lanes;
  int const lanes = 1 << log_lanes, threads = pieces << log_lanes;
#pragma unroll 1
  for (int first = threadIdx.x / 32 * 32 % Config::consumers; first < threads; first += Config::consumers) {
    int const i = (first + threadIdx.x % 32) >> log_lanes, lane = threadIdx.x & (lanes - 1);
    int const row = i / row_pieces, column = i % row_pieces * 4;
    bool const exists = i < pieces;
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
        int const number = base + j * lanes;
        if (!exists || number >= count) continue;
        int64_t const at = int64_t{a.merge.slot_of(item.first_slot, number)} * p.part_rows + row;
        lse[j] = __ldcg(p.part_lse + at);
        if (column < p.head_dim) x[j] = __ldcg(reinterpret_cast<float4 const*>(p.part_out + at * p.head_dim + column));
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
    shrink(total == 0.0f ? 0.0f : 1.0f / total);
    if (exists && lane == 0) write(row, column, sum, lse);
  }
}

// The end of a block: it has a part of at most two divided items, the first it had and the last, `items` in shared
// memory. All consumers come here. write(sequence, row, column, x, lse) takes four columns of an item's row.
template <class Config, class Arguments, class Write>
__device__ __forceinline__ void merge_items(Arguments const& a, DividedItem* items, int rows, bool acts,
                                            Write const& write) {
  if (acts) {
    consumers_sync(Config::consumers);  // all results are written, and what the items are
    if (threadIdx.x < 2) {
      DividedItem& item = items[threadIdx.x];
      item.merges = item.parts > 0 && count_in(a.merge, item.first_slot, item.parts << a.log_cluster);
    }
    consumers_sync(Config::consumers);
  }
#pragma unroll 1
  for (int i = 0; i < 2; ++i) {
    if (acts && !items[i].merges) continue;
    int const sequence = acts ? items[i].sequence : 0;
    merge_item<Config>(a, items[i], rows, acts, [&](int row, int column, float4 x, float lse) {
      write(sequence, row, column, x, lse);
    });
  }
}

}  // namespace flashcore::sm90

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

// The rows of an item from its parts' results, as many at once as there are threads. `acts`: as in finish().
template <class Config, class Arguments, class Write>
__device__ __forceinline__ void merge_item(Arguments const& a, DividedItem const& item, int rows, bool acts,
                                           Write const& write) {
  constexpr int row_pieces = Config::head_dim / 4, at_once = 8;
  sm80::DecodeParams const& p = a.p;
  int const count = acts ? item.parts : 0;
#pragma unroll 1
  for (int i = threadIdx.x % Config::consumers; i < rows * row_pieces; i += Config::consumers) {
    int const row = i / row_pieces, column = i % row_pieces * 4;
    float top = minus_infinity(), total = 0.0f;
    float4 sum{0.0f, 0.0f, 0.0f, 0.0f};
#pragma unroll 1
    for (int base = 0; base == 0 || base < count; base += at_once) {
      float lse[at_once];
      float4 x[at_once];
      float const before = top;
#pragma unroll
      for (int j = 0; j < at_once; ++j) {
        lse[j] = minus_infinity(), x[j] = {0.0f, 0.0f, 0.0f, 0.0f};
        if (base + j >= count) continue;
        int64_t const at = int64_t{a.merge.slot_of(item.first_slot, base + j)} * p.part_rows + row;
        lse[j] = __ldcg(p.part_lse + at);
        if (column < p.head_dim) x[j] = __ldcg(reinterpret_cast<float4 const*>(p.part_out + at * p.head_dim + column));
      }
#pragma unroll
      for (int j = 0; j < at_once; ++j) top = lse[j] > top || lse[j] != lse[j] ? lse[j] : top;  // a NaN stays
      float const shrunk = part_weight(before, top);
      total *= shrunk;
      sum.x *= shrunk, sum.y *= shrunk, sum.z *= shrunk, sum.w *= shrunk;
#pragma unroll
      for (int j = 0; j < at_once; ++j) {
        float const weight = part_weight(lse[j], top);
        total += weight;
        sum.x += weight * x[j].x, sum.y += weight * x[j].y, sum.z += weight * x[j].z, sum.w += weight * x[j].w;
      }
    }
    float const inverse = total == 0.0f ? 0.0f : 1.0f / total;
    sum.x *= inverse, sum.y *= inverse, sum.z *= inverse, sum.w *= inverse;
    write(row, column, sum, merged_lse(top, total));
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

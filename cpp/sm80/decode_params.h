// SPDX-License-Identifier: Apache-2.0
// What the decode kernel and the merge of its parts share: their arguments, and how a warp finds its place in the line
// of work.
#pragma once

#include <cuda_runtime_api.h>

#include "attention/cache.h"
#include "attention/decode_schedule.h"
#include "attention/decode_tile.h"
#include "attention/score.h"
#include "flashcore/plan.h"

namespace flashcore::sm80 {

struct DecodeParams : KvCacheParams {
  DecodeSchedule schedule;
  int32_t rows;       // of a key head: tokens times query heads of its group, row r being token r / group
  int32_t row_tiles;  // that they fill, of tile_rows each
  int32_t tile_rows;
  int32_t stages;
  CappedScore score;
  bool plain_score;  // then score's factor is PlainScore's, and the rest is not used
  // Parts of items, by slot: outputs divided by their sums, and their log-sum-exp.
  int32_t part_rows;  // rows of a slot: min(rows, tile_rows)
  float* part_out;    // (slots, part_rows, head_dim)
  float* part_lse;    // (slots, part_rows)
};

// The arguments of a plan's kernel, but for the stages.
DecodeParams decode_params(const KvCacheParams& params, const Plan& plan, void* workspace);

// Merges the parts of items that the decode kernel launched before has left in part_out and part_lse. Asynchronous.
void merge_parts(DecodeParams const& params, DType dtype, cudaStream_t stream);

// The units of all sequences, each lane of a warp having summed those of consecutive ones. All lanes call every member.
struct LineScan {
  int lane, sequences;  // of a lane
  int64_t before;       // units of the sequences before this lane's
  int64_t own, all;     // of this lane's; of all

  __device__ LineScan(DecodeParams const& p, int lane) : lane(lane), sequences(ceil_div(p.batch, 32)), own(0) {
    for (int64_t b = first(); b < first() + sequences && b < p.batch; ++b) own += units(p, b);
    int64_t inclusive = own;
#pragma unroll
    for (int step = 1; step < 32; step *= 2) {
      int64_t const other = __shfl_up_sync(0xffffffffu, inclusive, step);
      if (lane >= step) inclusive += other;
    }
    before = inclusive - own;
    all = __shfl_sync(0xffffffffu, inclusive, 31);
  }

  // Of the line.
  __device__ int64_t total(DecodeParams const& p) const { return all * p.schedule.lines; }

  // The sequence with unit `u`, counted as if every sequence had one item, and the units before it.
  struct Found {
    int sequence;
    int64_t before;
  };
  __device__ Found find(DecodeParams const& p, int64_t u) const {
    bool const mine = u >= before && u < before + own;
    Found found{static_cast<int>(first()), before};
    if (mine) {
      for (int64_t next = units(p, found.sequence); u >= found.before + next; next = units(p, found.sequence)) {
        found.before += next;
        ++found.sequence;
      }
    }
    int const source = __ffs(__ballot_sync(0xffffffffu, mine)) - 1;
    return {__shfl_sync(0xffffffffu, found.sequence, source), __shfl_sync(0xffffffffu, found.before, source)};
  }

  // The units before sequence `b`, counted so.
  __device__ int64_t units_before(DecodeParams const& p, int b) const {
    int const source = b / sequences;
    int64_t sum = before;
    if (lane == source) {
      for (int i = static_cast<int>(first()); i < b; ++i) sum += units(p, i);
    }
    return __shfl_sync(0xffffffffu, sum, source);
  }

 private:
  __device__ int64_t first() const { return int64_t{lane} * sequences; }
  __device__ static int units(DecodeParams const& p, int64_t b) {
    return p.schedule.item(p, static_cast<int>(b)).units;
  }
};

}  // namespace flashcore::sm80

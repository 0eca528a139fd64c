// SPDX-License-Identifier: Apache-2.0
// From a plan to an instance of the Hopper decode kernels, and the merge of the parts.
#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <atomic>
#include <chrono>
#include <cstdint>
#include <string_view>

#include "flashcore/error.h"
#include "sm80/decode_merge.cuh"
#include "sm90/decode_parts.cuh"
#include "sm90/decode_tile.h"
#include "sm90/decode_turned_tile.h"
#include "sm90/sm90.h"

namespace flashcore::sm90 {

// Instantiated in the files that cmake/KernelInstances.cmake makes.
template <class Element, int head_dim, int slices>
struct DecodeConfig;
template <class Config>
void run_decode(DecodeParams const& params, Plan const& plan, cudaStream_t stream);
template <class Element, int head_dim, int rows, bool merges>
struct TurnedConfig;
template <class Config>
void run_decode_turned(DecodeParams const& params, Plan const& plan, cudaStream_t stream);

namespace {

bool is_turned(Plan const& plan) { return std::string_view(plan.kernel) == "sm90_decode_turned"; }

template <class Element>
bool run(DecodeParams const& params, Plan const& plan, cudaStream_t stream) {
#define FLASHCORE_SM90_DECODE_TURNED(D, rows)                                       \
  if (is_turned(plan) && plan.head_dim == D && plan.tile_q == rows) {               \
    run_decode_turned<TurnedConfig<Element, D, rows, false>>(params, plan, stream); \
    return true;                                                                    \
  }
#include "sm90/decode_turned_tiles.inc"
#undef FLASHCORE_SM90_DECODE_TURNED
#define FLASHCORE_SM90_DECODE(D, slices)                                      \
  if (!is_turned(plan) && plan.head_dim == D && plan.tile_q == 16 * slices) { \
    run_decode<DecodeConfig<Element, D, slices>>(params, plan, stream);       \
    return true;                                                              \
  }
#include "sm90/decode_tiles.inc"
#undef FLASHCORE_SM90_DECODE
  return false;
}

// The parts of an item, by its own length or by the teams' shares.
struct FindParts {
  DecodeParts parts;

  struct List {
    int first, count, lines, of_first;
    __device__ __forceinline__ int64_t slot_of(int i) const { return i == 0 ? of_first : first + i * lines; }
  };
  __device__ __forceinline__ List operator()(sm80::DecodeParams const& p, int sequence, int line, int lane) const {
    FoundSequence const found = find_sequence(p, parts, 0, sequence, lane);
    int const lines = parts.lines.divisor;
    if (parts.most_parts > 0) return {found.before + line, found.parts, lines, found.before + line};
    int const team = found.before / found.line.share;
    int const count = DecodeParts::piece(found.line, found.before, found.range.count(), team).parts;
    return {DecodeParts::slot(team, 1) * lines + line, count, 2 * lines, DecodeParts::slot(team, 0) * lines + line};
  }
};

// The same where every item has as many, in its order.
struct FindEven {
  int parts;

  struct List {
    int first, count;
    __device__ __forceinline__ int64_t slot_of(int i) const { return first + i; }
  };
  __device__ __forceinline__ List operator()(sm80::DecodeParams const& p, int sequence, int line, int /*lane*/) const {
    return {(sequence * p.heads_k * p.row_tiles + line) * parts, parts};
  }
};

// Whether blocks merge what they have divided among themselves.
bool merges_itself(Plan const& plan, int batch) {
  return is_turned(plan) && TurnedDecodeTile{plan.head_dim, plan.tile_q}.merges(plan.teams, batch);
}

// A launch's own number, by which those blocks know what another one has left (decode_turned_merge.cuh). The first one
// is made of the time and of where this process lies, so that data are not likely to look like it. (Not by
// std::random_device, for which the library would need glibc 2.36.)
unsigned long long launch_number() {
  static std::atomic<unsigned long long> next{[] {
    static char const here = 0;
    auto const now = std::chrono::system_clock::now().time_since_epoch().count();
    uint64_t const seed = static_cast<uint64_t>(now) ^ reinterpret_cast<uintptr_t>(&here);
    return (seed * 0x9e3779b97f4a7c15u) >> launch_number_shift << launch_number_shift;  // the product's upper bits
  }()};
  return next.fetch_add(1ULL << launch_number_shift, std::memory_order_relaxed);
}

template <class Element>
void merge(DecodeParams const& p, cudaStream_t stream) {
  if (p.even > 0) {
    sm80::launch_merge<Element>(p, FindEven{p.even}, true, stream);
  } else {
    sm80::launch_merge<Element>(p, FindParts{p.parts}, true, stream);
  }
}

}  // namespace

void decode(const KvCacheParams& params, DType dtype, const Plan& plan, void* workspace, void* stream) {
  DecodeParams p{};
  static_cast<sm80::DecodeParams&>(p) = sm80::decode_params(params, plan, workspace);
  HopperDecodeTile const tile{plan.head_dim, plan.tile_q / 16};
  int const cluster_rows = plan.shares > 1 ? p.part_rows * (plan.shares / plan.cluster) : 0;
  p.stages = is_turned(plan) ? TurnedDecodeTile{plan.head_dim, plan.tile_q}.stages_of(plan.shared_memory)
                             : tile.stages_of(plan.shared_memory, cluster_rows);
  int const most = plan.even_parts == 0 && plan.teams == 0 ? plan.splits : 0;
  p.parts = DecodeParts::of(p.heads_k * p.row_tiles, p.batch, most, plan.teams);
  // Where lengths change nothing, parts need no search: a single sequence is as long as itself, and one part is all of
  // it.
  p.even = most > 0 ? most == 1 : plan.even_parts;
  bool const by_itself = merges_itself(plan, p.batch);
  if (plan.workspace > 0 && by_itself) {
    int64_t const slots = 2 * plan.blocks;
    p.part_lse = p.part_out + slots * p.part_rows * p.head_dim;
    p.counts = reinterpret_cast<unsigned long long*>(p.part_lse + slots * p.part_rows);
    p.launch = launch_number();
  }
  auto const s = static_cast<cudaStream_t>(stream);
  bool const found = dtype == float16 ? run<__half>(p, plan, s) : run<__nv_bfloat16>(p, plan, s);
  if (!found) throw RuntimeError("the plan names no decode kernel of this build; plan() makes plans that do");
  if (plan.workspace > 0 && !by_itself) dtype == float16 ? merge<__half>(p, s) : merge<__nv_bfloat16>(p, s);
}

}  // namespace flashcore::sm90

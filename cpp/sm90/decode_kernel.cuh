// SPDX-License-Identifier: Apache-2.0
// The decode kernel for compute capability 9.0: a few queries a sequence over a long cache, which is bound by reading
// the cache. A producer warp keeps a ring of tiles of keys and values full through TMA, over the ends of items, and four
// consumer warps multiply what has come. README.md beside this file tells how blocks share the keys and who merges.
#pragma once

#include <cutlass/arch/barrier.h>
#include <cute/arch/copy_sm90_tma.hpp>
#include <type_traits>

#include "attention/combine.h"
#include "core/cuda_check.h"
#include "flashcore/plan.h"
#include "sm80/decode_rows.cuh"
#include "sm90/decode_tile.h"
#include "sm90/tensor_map.h"

#ifndef DECODE_MARK
#define DECODE_MARK(i)
#endif
namespace flashcore::sm90 {

using DecodeBarrier = cutlass::arch::ClusterTransactionBarrier;

template <class Element_, int head_dim_, int slices_>
struct DecodeConfig {
  using Element = Element_;
  static constexpr HopperDecodeTile tile{head_dim_, slices_};
  static constexpr int head_dim = head_dim_;
  static constexpr int slices = slices_;  // of 16 rows
  static constexpr int rows = 16 * slices, warps = HopperDecodeTile::warps, consumers = 32 * warps;
  static constexpr int threads = consumers + 32;
  static constexpr int tile_k = DecodeSchedule::tile_k, warp_keys = HopperDecodeTile::warp_keys;
  static_assert(tile_k == warps * warp_keys && tile_k == 64 && head_dim % 32 == 0);

  static constexpr int panels = tile.panels(), panel_bytes = tile_k * 128;
  // Two blocks share a multiprocessor's registers where the accumulators are few.
  static constexpr int blocks_a_unit = head_dim * slices <= 128 ? 2 : 1;
  static constexpr int kv_bytes = tile.kv_bytes(), stage_bytes = tile.stage_bytes();
};

struct DecodeArguments {
  CUtensorMap k, v;  // boxes of 64 columns × box_rows keys
  sm80::DecodeParams p;
  int box_rows;  // 64, or a page's where that is less
  int cluster;   // blocks that share an item and merge it themselves; 1: the schedule divides the work
};

// Keys or values in shared memory as TMA writes them with its 128-byte swizzle: panels of 64 columns, a row of a panel
// 128 bytes, whose 16-byte chunks are permuted by the row modulo 8.
struct PanelTile {
  static __device__ __forceinline__ uint32_t offset(int row, int chunk) {
    return chunk / 8 * (64 * 128) + row * 128 + ((chunk ^ row) & 7) * 16;
  }
  // The offset that is `slices` slices of 16 columns to the right of `offset`, which lies in the first.
  static __device__ __forceinline__ uint32_t right(uint32_t offset, int slices) {
    return (offset ^ (32 * (slices % 4))) + slices / 4 * (64 * 128);
  }
};

// --- instructions ----------------------------------------------------------------------------------------------------

__device__ __forceinline__ void cluster_arrive() { asm volatile("barrier.cluster.arrive.release.aligned;" ::: "memory"); }
__device__ __forceinline__ void cluster_wait() { asm volatile("barrier.cluster.wait.acquire.aligned;" ::: "memory"); }
__device__ __forceinline__ void consumers_sync(int threads) {
  asm volatile("barrier.cta.sync.aligned 1, %0;" ::"r"(threads) : "memory");
}
// The address of what lies at `address` of this block's shared memory in that of the cluster's block `rank`.
__device__ __forceinline__ uint32_t address_in(uint32_t address, int rank) {
  uint32_t result;
  asm volatile("mapa.shared::cluster.u32 %0, %1, %2;" : "=r"(result) : "r"(address), "r"(rank));
  return result;
}
__device__ __forceinline__ void send(uint32_t address, float x) {
  asm volatile("st.shared::cluster.f32 [%0], %1;" ::"r"(address), "f"(x) : "memory");
}
__device__ __forceinline__ void send(uint32_t address, float4 x) {
  asm volatile("st.shared::cluster.v4.f32 [%0], {%1, %2, %3, %4};" ::"r"(address), "f"(x.x), "f"(x.y), "f"(x.z),
               "f"(x.w)
               : "memory");
}

// --- the block's work ------------------------------------------------------------------------------------------------

// What a block does, one after the other: of an item's tiles first, first + step, ... The producer's warp finds out, and
// posts it for the consumers.
struct DecodeTask {
  int sequence;  // -1: there is no more
  int head;      // of the keys
  int first_row, valid_rows;
  int cached, keys;  // of the sequence in the cache, and with the new ones
  int first, count, step;
  int full_begin, full_end;  // tiles that all queries see whole
  int64_t slot;              // of the result; -1: the output itself, or the cluster
};
static_assert(sizeof(DecodeTask) <= 64);

// All lanes of a warp together.
template <class Config>
class DecodeTasks {
 public:
  __device__ __forceinline__ DecodeTasks(DecodeArguments const& a, int lane) {
    sm80::DecodeParams const& p = a.p;
    if (a.cluster > 1) {
      int const item = blockIdx.x / a.cluster, rank = blockIdx.x - item * a.cluster;
      int const sequence = item / p.schedule.lines;
      DecodeSchedule::Item const tiles = p.schedule.item(p, sequence);
      any = true;
      set(p, sequence, item - sequence * p.schedule.lines);
      task.first = tiles.begin + rank;
      task.count = max_of(0, ceil_div(tiles.tiles - rank, a.cluster));
      task.step = a.cluster;
      task.slot = -1;
      return;
    }
    sm80::LineScan const scan(p, lane);
    int64_t const total = scan.total(p), active = p.schedule.active(total);
    any = blockIdx.x < active;
    if (!any) return;
    int64_t const at = DecodeSchedule::start(total, active, blockIdx.x);
    int64_t const end = DecodeSchedule::start(total, active, blockIdx.x + 1);
    sm80::LineScan::Found const found = scan.find(p, at / p.schedule.lines);
    walk = DecodeSchedule::Walk::make(p.schedule, p, at, end, found.sequence, found.before);
    take(p);
  }

  __device__ __forceinline__ void next(DecodeArguments const& a) {
    any = a.cluster == 1 && walk.next(a.p.schedule, a.p, part);
    if (any) take(a.p);
  }

  bool any;
  DecodeTask task;

 private:
  DecodeSchedule::Walk walk;
  DecodeSchedule::Part part;

  __device__ __forceinline__ void set(sm80::DecodeParams const& p, int sequence, int line) {
    task.sequence = sequence;
    task.head = line / p.row_tiles;
    task.first_row = (line - task.head * p.row_tiles) * Config::rows;
    task.valid_rows = min_of(Config::rows, p.rows - task.first_row);
    task.cached = cached_keys(p, sequence);
    task.keys = task.cached + p.new_tokens;
    KeyRange const range = cache_mask(p, task.keys).key_range(0, p.seqlen_q, Config::tile_k);
    task.full_begin = range.full_begin;
    task.full_end = range.full_end;
  }
  __device__ __forceinline__ void take(sm80::DecodeParams const& p) {
    set(p, walk.sequence, walk.line);
    part = walk.part(p.schedule, blockIdx.x);
    task.first = part.begin;
    task.count = part.end - part.begin;
    task.step = 1;
    task.slot = part.slot;
  }
};

// --- shared memory ---------------------------------------------------------------------------------------------------

template <class Config>
struct DecodeMemory {
  static constexpr HopperDecodeTile tile = Config::tile;
  char* base;
  int stages;

  __device__ __forceinline__ char* queries() const { return base; }
  // (warps, merged_rows, merge_stride)
  __device__ __forceinline__ float* outputs() const { return reinterpret_cast<float*>(queries() + tile.q_bytes()); }
  // (warps, rows), and as many sums behind them
  __device__ __forceinline__ float* maxima() const { return outputs() + tile.merge_bytes() / 4; }
  __device__ __forceinline__ float* sums() const { return maxima() + Config::warps * Config::rows; }
  __device__ __forceinline__ DecodeBarrier* full_keys() const {
    return reinterpret_cast<DecodeBarrier*>(maxima() + tile.state_bytes() / 4);
  }
  __device__ __forceinline__ DecodeBarrier* full_values() const { return full_keys() + HopperDecodeTile::most_stages; }
  __device__ __forceinline__ DecodeBarrier* empty() const { return full_keys() + 2 * HopperDecodeTile::most_stages; }
  // A bit for each box of a stage whose page does not exist.
  __device__ __forceinline__ uint32_t* absent() const {
    return reinterpret_cast<uint32_t*>(full_keys() + 3 * HopperDecodeTile::most_stages);
  }
  __device__ __forceinline__ DecodeTask* posts() const {  // 64 bytes each
    return reinterpret_cast<DecodeTask*>(absent() + HopperDecodeTile::most_stages);
  }
  __device__ __forceinline__ DecodeBarrier* full_post() const {
    return reinterpret_cast<DecodeBarrier*>(reinterpret_cast<char*>(posts()) + HopperDecodeTile::most_posts * 64);
  }
  __device__ __forceinline__ DecodeBarrier* empty_post() const { return full_post() + HopperDecodeTile::most_posts; }
  __device__ __forceinline__ char* keys(int stage) const {
    return base + tile.head_bytes() + stage * Config::stage_bytes;
  }
  __device__ __forceinline__ char* values(int stage) const { return keys(stage) + Config::kv_bytes; }
  // Of a cluster: (cluster, pieces of a block), and (cluster, rows)
  __device__ __forceinline__ float4* received() const { return reinterpret_cast<float4*>(keys(stages)); }
  __device__ __forceinline__ float* received_lse() const {
    return reinterpret_cast<float*>(received()) + tile.received_bytes() / 4;
  }
};

// A place in the ring: stages are filled and emptied in turn, and the barriers' phase flips each time around.
struct StagePlace {
  int stage = 0;
  uint32_t phase = 0;
  __device__ __forceinline__ void advance(int stages) {
    if (++stage == stages) {
      stage = 0;
      phase ^= 1;
    }
  }
};

// --- the producer ----------------------------------------------------------------------------------------------------

// What TMA tells the L2 cache: nobody reads keys and values again.
#ifndef READ_HINT
#define READ_HINT 0x12f0000000000000
#endif
constexpr uint64_t read_once = READ_HINT;

// One warp: asks for the block's tiles as the stages empty, each box by a lane.
template <class Config>
__device__ __forceinline__ void produce(DecodeArguments const& a, DecodeMemory<Config> const& shared, int lane) {
  sm80::DecodeParams const& p = a.p;
  StagePlace place;
  int const box_rows = a.box_rows, boxes = Config::tile_k / box_rows;
  // A box that is not there comes as zeros from behind the last page.
  int const nowhere = max_of(p.pages, 1);
  auto const load = [&](int row, int head, int block) {
    shared.empty()[place.stage].wait(place.phase ^ 1);
    uint32_t const absent = __ballot_sync(0xffffffffu, lane < boxes && block < 0);
    DecodeBarrier &full_keys = shared.full_keys()[place.stage], &full_values = shared.full_values()[place.stage];
    if (lane == 0) {
      shared.absent()[place.stage] = absent;
      full_keys.arrive_and_expect_tx(Config::kv_bytes);
      full_values.arrive_and_expect_tx(Config::kv_bytes);
    }
    __syncwarp();
    if (lane < boxes) {
      int const at = block < 0 ? nowhere : block;
      auto const copy = [&](CUtensorMap const& map, DecodeBarrier& full, char* to) {
#pragma unroll
        for (int panel = 0; panel < Config::panels; ++panel) {
          cute::SM90_TMA_LOAD_5D::copy(&map, reinterpret_cast<uint64_t*>(&full), read_once,
                                       to + panel * Config::panel_bytes + lane * box_rows * 128, panel * 64, row, 0,
                                       head, at);
        }
      };
      copy(a.k, full_keys, shared.keys(place.stage));
      copy(a.v, full_values, shared.values(place.stage));
    }
    __syncwarp();
    place.advance(shared.stages);
  };

  // A cluster's block knows its first tile without the length, unless a window or a page table says where it is: asked
  // for ahead, it comes while the length does.
  bool ahead = false;
#ifndef NO_AHEAD
  if (a.cluster > 1 && p.page_table == nullptr && p.window_left >= unlimited) {
    int const item = blockIdx.x / a.cluster, first = (blockIdx.x - item * a.cluster) * Config::tile_k;
    int const sequence = item / p.schedule.lines;
    ahead = first < p.seqlen_k;
    if (ahead) load(first, (item - sequence * p.schedule.lines) / p.row_tiles, sequence);
  }
#endif

  StagePlace post_place;
  auto const post = [&](DecodeTask const& task) {
    shared.empty_post()[post_place.stage].wait(post_place.phase ^ 1);
    if (lane == 0) {
      shared.posts()[post_place.stage] = task;
      shared.full_post()[post_place.stage].arrive();
    }
    post_place.advance(HopperDecodeTile::most_posts);
  };
  DecodeTasks<Config> tasks(a, lane);
  DECODE_MARK(10);
#pragma unroll 1
  for (; tasks.any; tasks.next(a)) {
    DecodeTask const& task = tasks.task;
    post(task);
    int const head = task.head;
    if (p.page_table == nullptr) {
      if (ahead && task.count == 0) {  // in vain: nobody else waits for it
        shared.full_keys()[0].wait(0);
        shared.full_values()[0].wait(0);
      }
#pragma unroll 1
      for (int i = ahead; i < task.count; ++i) load((task.first + i * task.step) * Config::tile_k, head, task.sequence);
      continue;
    }
    // The pages of 32 boxes at a time, one a lane, and those of the next 32 meanwhile.
    auto const pages_from = [&](int box) {
      box += lane;
      int const i = box / boxes;
      int const key = (task.first + i * task.step) * Config::tile_k + (box - i * boxes) * box_rows;
      return i < task.count && key < task.keys ? cache_place(p, task.sequence, key).block : -1;
    };
    int pages = pages_from(0), next_pages = pages_from(32);
#pragma unroll 1
    for (int i = 0, box = 0; i < task.count; ++i, box += boxes) {
      if (box != 0 && box % 32 == 0) {
        pages = next_pages;
        next_pages = pages_from(box + 32);
      }
      int const block = __shfl_sync(0xffffffffu, pages, (box + lane) % 32);
      int const row = (task.first + i * task.step) * Config::tile_k + (lane < boxes ? lane : 0) * box_rows;
      load(row & (p.page_size - 1), head, block);
    }
  }
  DecodeTask none{};
  none.sequence = -1;
  post(none);
}

// --- the consumers ---------------------------------------------------------------------------------------------------

// Puts rows that TMA has not brought in place of what it has: row r of the warp's 16 is that of the new token
// first + r; others from `count` on are cleared, where `clears`.
template <class Config, bool clears>
__device__ __forceinline__ void patch(sm80::DecodeParams const& p, Rows<void const*> const& appended, char* rows, int b,
                                      int head, int begin, int first_token, int end, int lane) {
  using Element = typename Config::Element;
  int const chunks = p.head_dim / 8;
#pragma unroll 1
  for (int i = begin * chunks + lane; i < Config::warp_keys * chunks; i += 32) {
    int const row = i / chunks, chunk = i - row * chunks;
    uint4 x{0, 0, 0, 0};
    if (row < end) {
      x = __ldg(reinterpret_cast<uint4 const*>(static_cast<Element const*>(appended.data) + b * appended.batch_stride +
                                               (first_token + row) * appended.row_stride + head * appended.head_stride +
                                               chunk * 8));
    } else if (!clears) {
      break;
    }
    *reinterpret_cast<uint4*>(rows + PanelTile::offset(row, chunk)) = x;
  }
}

template <class Config>
__device__ __forceinline__ void consume(DecodeArguments const& a, DecodeMemory<Config> const& shared, int warp,
                                        int lane) {
  using Element = typename Config::Element;
  using Queries = sm80::SharedTile<Config::head_dim>;
  constexpr int head_dim = Config::head_dim, slices = Config::slices, rows = Config::rows, tile_k = Config::tile_k;
  constexpr int chunks = head_dim / 8, consumers = Config::consumers;
  constexpr int merge_stride = Config::tile.merge_stride(), merged_rows = HopperDecodeTile::merged_rows;
  sm80::DecodeParams const& p = a.p;

  auto const address = [](void const* x) { return static_cast<uint32_t>(__cvta_generic_to_shared(x)); };
  uint32_t const shared_q = address(shared.queries());
  // This lane's rows of the operands, as in the forward kernel.
  uint32_t const from_q = shared_q + Queries::offset(lane % 16, lane / 16);
  uint32_t const lane_k = warp * Config::warp_keys * 128 + PanelTile::offset(lane % 8 + lane / 16 * 8, lane / 8 % 2);
  uint32_t const lane_v = warp * Config::warp_keys * 128 + PanelTile::offset(lane % 16, lane / 16);

  StagePlace place;
  bool appended = p.new_tokens == 0;
  StagePlace post_place;
  DECODE_MARK(2);
#pragma unroll 1
  for (;; post_place.advance(HopperDecodeTile::most_posts)) {
    DecodeTask const& task = shared.posts()[post_place.stage];
    shared.full_post()[post_place.stage].wait(post_place.phase);
    if (task.sequence < 0) break;
    int const first_row = task.first_row, cached = task.cached, keys = task.keys, count = task.count, step = task.step;
    int const full_begin = task.full_begin, full_end = task.full_end;
    int tile = task.first;

    consumers_sync(consumers);  // all warps are done with the item before
#pragma unroll 2
    for (int i = threadIdx.x; i < rows * chunks; i += consumers) {
      int const row = i / chunks, chunk = i % chunks;
      int const token = (first_row + row) / p.group, in_group = first_row + row - token * p.group;
      Element const* const source = static_cast<Element const*>(p.q.data) + task.sequence * p.q.batch_stride +
                                    token * p.q.row_stride + (task.head * p.group + in_group) * p.q.head_stride + chunk * 8;
      sm80::copy_async(shared_q + Queries::offset(row, chunk), source, row < task.valid_rows && chunk * 8 < p.head_dim);
    }
    sm80::copy_commit();
    if (!appended) {
      sm80::append<Element>(p, consumers);
      appended = true;
    }
    sm80::copy_wait_all();
    consumers_sync(consumers);  // the queries are here

    sm80::DecodeRows<Element, head_dim, slices, PanelTile> work;
    work.start(from_q);
#pragma unroll 1
    for (int i = 0; i < count; ++i, tile += step) {
      int const first = tile * tile_k + warp * Config::warp_keys;
      char* const stage_keys = shared.keys(place.stage);
      shared.full_keys()[place.stage].wait(place.phase);
      if (i == 0) DECODE_MARK(3);
      if (i + 1 == count) DECODE_MARK(12);
      bool const here = (shared.absent()[place.stage] >> (warp * Config::warp_keys / a.box_rows) & 1) == 0;
      bool const patched = here && first + Config::warp_keys > cached;
      int const patch_begin = clamp_to(cached - first, 0, Config::warp_keys);
      int const patch_end = clamp_to(keys - first, 0, Config::warp_keys);
      if (patched && p.new_tokens > 0) {
        patch<Config, false>(p, p.new_k, stage_keys + warp * Config::warp_keys * 128, task.sequence, task.head, patch_begin,
                             first - cached, patch_end, lane);
        __syncwarp();
      }

      float s[slices][2][4];
      uint32_t weights[slices][4];
      work.scores(s, from_q, address(stage_keys) + lane_k);
      if (!p.plain_score) work.transform(s, p.score);
      if (!here || tile < full_begin || tile >= full_end) {  // keys that not all queries see
        work.hide(s, cache_mask(p, keys), first, first_row, p.group, here, lane);
      }
      work.softmax(s, weights, p.score.factor);

      shared.full_values()[place.stage].wait(place.phase);
      if (patched) {
        patch<Config, true>(p, p.new_v, shared.values(place.stage) + warp * Config::warp_keys * 128, task.sequence, task.head,
                            patch_begin, first - cached, patch_end, lane);
        cutlass::arch::fence_view_async_shared();  // before TMA writes there again
        __syncwarp();
      }
      work.output(weights, address(stage_keys) + Config::kv_bytes + lane_v);
      __syncwarp();  // all lanes are done with the stage
      if (lane == 0) shared.empty()[place.stage].arrive();
      place.advance(shared.stages);
    }

    DECODE_MARK(4);
    // The warps' results become one: each scales its own by its weight over the sum of all.
#pragma unroll
    for (int m = 0; m < slices; ++m) {
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        float const sum = sm80::sum_of_quad(work.state[m][half].sum);
        int const row = lane / 4 + m * 16 + half * 8;
        if (lane % 4 == 0) {
          shared.maxima()[warp * rows + row] = work.state[m][half].max;
          shared.sums()[warp * rows + row] = sum;
        }
      }
    }
    consumers_sync(consumers);  // the states are there
    if (a.cluster > 1) cluster_wait();  // all blocks run
    DECODE_MARK(5);
    int const sequence = task.sequence, head = task.head, valid_rows = task.valid_rows;
    int64_t const slot = task.slot;
    int const rank = a.cluster > 1 ? static_cast<int>(blockIdx.x % a.cluster) : 0;
    int const row_pieces = p.head_dim / 4, pieces_a_block = ceil_div(valid_rows * row_pieces, a.cluster);
#pragma unroll
    for (int m = 0; m < slices; ++m) {
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        int const row = m * 16 + half * 8 + lane / 4;
        SoftmaxRow all;
#pragma unroll
        for (int w = 0; w < Config::warps; ++w) all.max = fmaxf(all.max, shared.maxima()[w * rows + row]);
        float const top = all.max == minus_infinity() ? 0.0f : all.max;
#pragma unroll
        for (int w = 0; w < Config::warps; ++w) {
          all.sum += exp2_of((shared.maxima()[w * rows + row] - top) * p.score.factor) * shared.sums()[w * rows + row];
        }
        float const weight = exp2_of((work.state[m][half].max - top) * p.score.factor) * all.inverse_sum();
#pragma unroll
        for (int n = 0; n < head_dim / 8; ++n) {
          work.o[m][n][2 * half] *= weight;
          work.o[m][n][2 * half + 1] *= weight;
        }
        if (warp == 0 && row < valid_rows) {
          float const lse = all.lse(p.score.factor);
          if (a.cluster > 1) {
            uint32_t const at = address(shared.received_lse() + rank * rows + row);
#pragma unroll 1
            for (int block = lane % 4; block < a.cluster; block += 4) send(address_in(at, block), lse);
          } else if (lane % 4 == 0 && slot >= 0) {
            p.part_lse[slot * p.part_rows + row] = lse;
          } else if (lane % 4 == 0 && p.lse != nullptr) {
            int const token = (first_row + row) / p.group, in_group = first_row + row - token * p.group;
            p.lse[(int64_t{sequence} * p.heads_q + head * p.group + in_group) * p.seqlen_q + token] = lse;
          }
        }
      }
    }
#pragma unroll
    for (int m = 0; m < slices; ++m) {
#pragma unroll
      for (int quarter = 0; quarter < 4; ++quarter) {
        int const pass_row = m * 16 + quarter * merged_rows, half = quarter / 2;
        if (pass_row >= valid_rows) continue;
        if (pass_row > 0) consumers_sync(consumers);  // the rows before have been read
        if (lane / 16 == quarter % 2) {               // this lane has one of the rows
          float* const to =
              shared.outputs() + (warp * merged_rows + lane / 4 % merged_rows) * merge_stride + lane % 4 * 2;
#pragma unroll
          for (int n = 0; n < head_dim / 8; ++n) {
            *reinterpret_cast<float2*>(to + n * 8) = {work.o[m][n][2 * half], work.o[m][n][2 * half + 1]};
          }
        }
        consumers_sync(consumers);  // these rows' outputs are there
#pragma unroll 1
        for (int i = threadIdx.x; i < merged_rows * row_pieces; i += consumers) {
          int const in_pass = i / row_pieces, piece = i - in_pass * row_pieces, row = pass_row + in_pass;
          if (row >= valid_rows) break;
          float4 sum{0.0f, 0.0f, 0.0f, 0.0f};
#pragma unroll
          for (int w = 0; w < Config::warps; ++w) {
            float4 const x = *reinterpret_cast<float4 const*>(shared.outputs() +
                                                              (w * merged_rows + in_pass) * merge_stride + piece * 4);
            sum.x += x.x, sum.y += x.y, sum.z += x.z, sum.w += x.w;
          }
          if (a.cluster > 1) {
            int const index = row * row_pieces + piece, owner = index / pieces_a_block;
            uint32_t const at =
                address(shared.received() + rank * pieces_a_block + index - owner * pieces_a_block);
            send(address_in(at, owner), sum);
          } else if (slot >= 0) {
            *reinterpret_cast<float4*>(p.part_out + (slot * p.part_rows + row) * p.head_dim + piece * 4) = sum;
          } else {
            int const token = (first_row + row) / p.group, in_group = first_row + row - token * p.group;
            Element* const out = static_cast<Element*>(p.o.data) + sequence * p.o.batch_stride +
                                 token * p.o.row_stride + (head * p.group + in_group) * p.o.head_stride + piece * 4;
            using P = sm80::Precision<Element>;
            *reinterpret_cast<uint2*>(out) = {P::pack(sum.x, sum.y), P::pack(sum.z, sum.w)};
          }
        }
      }
    }
    __syncwarp();  // all lanes have read the post
    if (lane == 0) shared.empty_post()[post_place.stage].arrive();
  }
  if (!appended) sm80::append<Element>(p, consumers);
}

// After the cluster's second barrier: this block's pieces of the item's rows, from all blocks in order.
template <class Config>
__device__ __forceinline__ void merge_cluster(DecodeArguments const& a, DecodeMemory<Config> const& shared) {
  using Element = typename Config::Element;
  sm80::DecodeParams const& p = a.p;
  int const item = blockIdx.x / a.cluster, rank = blockIdx.x - item * a.cluster;
  int const sequence = item / p.schedule.lines, line = item - sequence * p.schedule.lines;
  int const head = line / p.row_tiles, first_row = (line - head * p.row_tiles) * Config::rows;
  int const valid_rows = min_of(Config::rows, p.rows - first_row);
  int const row_pieces = p.head_dim / 4, pieces_a_block = ceil_div(valid_rows * row_pieces, a.cluster);
  for (int i = threadIdx.x; i < pieces_a_block; i += Config::threads) {
    int const index = rank * pieces_a_block + i, row = index / row_pieces, piece = index - row * row_pieces;
    if (row >= valid_rows) break;
    float max_lse = minus_infinity();
#pragma unroll 4
    for (int b = 0; b < a.cluster; ++b) {
      float const lse = shared.received_lse()[b * Config::rows + row];
      max_lse = lse > max_lse || lse != lse ? lse : max_lse;  // a NaN stays
    }
    float4 sum{0.0f, 0.0f, 0.0f, 0.0f};
    float total = 0.0f;
#pragma unroll 4
    for (int b = 0; b < a.cluster; ++b) {
      float const weight = part_weight(shared.received_lse()[b * Config::rows + row], max_lse);
      float4 const x = shared.received()[b * pieces_a_block + i];
      total += weight;
      sum.x += weight * x.x, sum.y += weight * x.y, sum.z += weight * x.z, sum.w += weight * x.w;
    }
    float const inverse = total == 0.0f ? 0.0f : 1.0f / total;
    int const token = (first_row + row) / p.group, in_group = first_row + row - token * p.group;
    int const head_q = head * p.group + in_group;
    Element* const out = static_cast<Element*>(p.o.data) + sequence * p.o.batch_stride + token * p.o.row_stride +
                         head_q * p.o.head_stride + piece * 4;
    using P = sm80::Precision<Element>;
    *reinterpret_cast<uint2*>(out) = {P::pack(sum.x * inverse, sum.y * inverse),
                                      P::pack(sum.z * inverse, sum.w * inverse)};
    if (piece == 0 && p.lse != nullptr) {
      p.lse[(int64_t{sequence} * p.heads_q + head_q) * p.seqlen_q + token] = merged_lse(max_lse, total);
    }
  }
}

// --- the kernel ------------------------------------------------------------------------------------------------------

template <class Config>
__global__ void __launch_bounds__(Config::threads, Config::blocks_a_unit) decode_kernel(__grid_constant__ DecodeArguments const a) {
  extern __shared__ __align__(1024) char memory[];
  DecodeMemory<Config> const shared{memory, a.p.stages};
  DECODE_MARK(0);
  sm80::let_dependents_launch();
  if (threadIdx.x == 0) {
    for (int i = 0; i < a.p.stages; ++i) {
      shared.full_keys()[i].init(1);
      shared.full_values()[i].init(1);
      shared.empty()[i].init(Config::warps);
    }
    for (int i = 0; i < HopperDecodeTile::most_posts; ++i) {
      shared.full_post()[i].init(1);
      shared.empty_post()[i].init(Config::warps);
    }
    cutlass::arch::fence_barrier_init();
  }
  if (threadIdx.x == Config::consumers) {
    asm volatile("prefetch.tensormap [%0];" ::"l"(&a.k) : "memory");
    asm volatile("prefetch.tensormap [%0];" ::"l"(&a.v) : "memory");
  }
  __syncthreads();
  if (a.cluster > 1) cluster_arrive();
  sm80::wait_for_primary();
  DECODE_MARK(1);

  int const warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  if (warp == Config::warps) {
    DECODE_MARK(9);
    produce<Config>(a, shared, lane);
    DECODE_MARK(11);
    if (a.cluster > 1) cluster_wait();
  } else {
    consume<Config>(a, shared, warp, lane);
  }
  if (a.cluster > 1) {
    __syncwarp();
    DECODE_MARK(6);
    cluster_arrive();
    cluster_wait();  // all have sent
    DECODE_MARK(7);
    merge_cluster<Config>(a, shared);
    DECODE_MARK(8);
  }
}

template <class Config>
void run_decode(sm80::DecodeParams const& p, Plan const& plan, cudaStream_t stream) {
  constexpr DType dtype = std::is_same_v<typename Config::Element, __half> ? float16 : bfloat16;
  bool const paged = p.page_table != nullptr;
  int const box_rows = paged ? min_of(Config::tile_k, p.page_size) : Config::tile_k;
  auto const cache = [&](Rows<void const*> const& rows) {
    return tensor_map({rows.data,
                       dtype,
                       p.head_dim,
                       {paged ? p.page_size : p.seqlen_k, 1, p.heads_k, paged ? p.pages : p.batch},
                       {rows.row_stride, 0, rows.head_stride, rows.batch_stride},
                       {box_rows, 1}});
  };
  int const cluster = HopperDecodeTile::clusters(plan.kernel) ? plan.splits : 1;
  DecodeArguments const arguments{cache(p.k), cache(p.v), p, box_rows, cluster};

  auto const kernel = decode_kernel<Config>;
  cuda_check(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, plan.shared_memory),
             "preparing the sm90 decode kernel");
  cuda_check(cudaFuncSetAttribute(kernel, cudaFuncAttributeNonPortableClusterSizeAllowed, 1),
             "preparing the sm90 decode kernel");
  cudaLaunchConfig_t config{};
  config.gridDim = dim3(static_cast<unsigned>(plan.blocks));
  config.blockDim = dim3(Config::threads);
  config.dynamicSmemBytes = static_cast<size_t>(plan.shared_memory);
  config.stream = stream;
  cudaLaunchAttribute attributes[2]{};
  attributes[0].id = cudaLaunchAttributeProgrammaticStreamSerialization;
  attributes[0].val.programmaticStreamSerializationAllowed = 1;
  attributes[1].id = cudaLaunchAttributeClusterDimension;
  attributes[1].val.clusterDim = {static_cast<unsigned>(cluster), 1, 1};
  config.attrs = attributes;
  config.numAttrs = cluster > 1 ? 2 : 1;
  cuda_check(cudaLaunchKernelEx(&config, kernel, arguments), "launching the sm90 decode kernel");
}

}  // namespace flashcore::sm90

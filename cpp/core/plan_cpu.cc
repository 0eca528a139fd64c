// SPDX-License-Identifier: Apache-2.0
// The CPU kernel's plan: tiles of queries, and into how many parts the keys of few queries are divided.
#include <algorithm>

#include "core/forward_plans.h"
#include "core/problem_facts.h"
#include "core/tiling.h"
#include "cpu/cpu.h"

namespace flashcore {
namespace {

// As large tiles as the cache, or tile registers, and an even load of all threads allow: four for each, and eight where
// they differ (those of whole heads do not). A query's bits do not depend on it.
int cpu_tile_q(const Problem& problem, const DeviceProperties& device) {
  Sizes const s = sizes(problem);
  auto const wanted = [&](int tile_q) {
    bool const differ = uneven(problem) && (problem.varlen() || tile_q < s.seqlen_q);
    return int64_t{differ ? 8 : 4} * device.units;
  };
  if (cpu::holds_keys(problem.query.dtype, s.seqlen_k, s.head_dim) &&
      tiles(problem, cpu::tile_q_held, s.heads_q) >= wanted(cpu::tile_q_held)) {
    return cpu::tile_q_held;
  }
  int tile_q = cpu::tile_q_in(device.l2_bytes, s.head_dim);
  while (tile_q > cpu::least_tile_q && tiles(problem, tile_q, s.heads_q) < wanted(tile_q)) tile_q /= 2;
  return tile_q;
}

}  // namespace

Plan plan_cpu(const Problem& problem, const DeviceProperties& device) {
  Sizes const s = sizes(problem);
  Plan plan;
  plan.backend = Backend::cpu;
  plan.kernel = "cpu_forward";
  plan.head_dim = static_cast<int>(s.head_dim);
  plan.tile_q = cpu_tile_q(problem, device);
  plan.tile_k = cpu::tile_k;
  plan.threads = device.units;
  plan.plain_score = plain_score(problem);
  plan.tiles = plan.blocks = tiles(problem, plan.tile_q, s.heads_q);
  plan.splits = problem.varlen() || problem.batch_invariant ? 1 : cpu_splits(s, problem.layout);
  return plan;
}

// A few queries with many keys are divided over the keys. Into how many parts depends on nothing but the problem, so
// that the number of threads changes no bits; the parts' memory is at most 4 MiB.
int cpu_splits(const Sizes& s, Layout layout) {
  constexpr int64_t part_keys = 4096, most_parts = 64;
  if (s.heads_k == 0) return 1;
  int64_t const rows = s.seqlen_q * (s.heads_q / s.heads_k);
  if (rows > cpu::few_rows || s.head_dim % cpu::few_rows_head_dim != 0) return 1;
  int64_t const key_heads = cpu::few_key_heads(rows, s.head_dim, s.heads_k, layout == Layout::bshd);
  int64_t const tasks = s.batch * ((s.heads_k + key_heads - 1) / key_heads);
  if (tasks == 0 || tasks >= most_parts) return 1;
  return static_cast<int>(std::clamp<int64_t>(s.seqlen_k / part_keys, 1, most_parts / tasks));
}

}  // namespace flashcore

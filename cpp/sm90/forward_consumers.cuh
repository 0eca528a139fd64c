// SPDX-License-Identifier: Apache-2.0
// The consumers of the Hopper forward kernel: warpgroups that multiply tiles and keep the softmax of 64 rows each.
#pragma once

#include "sm90/forward_output.cuh"

namespace flashcore::sm90 {

// Clears the rows from `rows` on of a tile of values: they are another sequence's, or unused, and may hold NaN, which
// a weight of zero does not hide.
template <class Config>
__device__ __forceinline__ void clear_rows(char* values, int rows) {
  constexpr int consumers = 128 * Config::warpgroups;
  int const thread = threadIdx.x - 128;
  int const chunks = (Config::tile_k - rows) * (row_bytes / 16);
#pragma unroll
  for (int panel = 0; panel < Config::panels; ++panel) {
    uint4* const tail = reinterpret_cast<uint4*>(values + panel * Config::kv_panel + rows * row_bytes);
    for (int i = thread; i < chunks; i += consumers) tail[i] = uint4{};
  }
  cutlass::arch::fence_view_async_shared();
  cutlass::arch::NamedBarrier::sync(consumers, 7);
}

template <class Config>
__device__ __forceinline__ void consume(Arguments<typename Config::Score> const& a, SharedMemory<Config>& shared,
                                        int warpgroup) {
  using Element = typename Config::Element;
  constexpr int tile_k = Config::tile_k, head_dim = Config::head_dim;
  constexpr int columns = Config::columns;
  bool const leads = threadIdx.x % 32 == 0;  // one lane of each warp tells the producer what is free
  Lane const lane{warpgroup * 64 + static_cast<int>(threadIdx.x) % 128 / 32 * 16 +
                  static_cast<int>(threadIdx.x) % 32 / 4};

  uint32_t const shared_q = cute::cast_smem_ptr_to_uint(shared.q) + warpgroup * 64 * row_bytes;
  uint32_t const shared_kv = cute::cast_smem_ptr_to_uint(shared.kv);
  RingPlace<Config::slots> place;
  JobNumber<Config::q_buffers> current;

  float o[columns / 2], s[tile_k / 2];
  uint32_t weights[tile_k / 4];
  uint32_t q[Config::queries_in_registers ? head_dim / 4 : 1];

  // S = Q Kᵀ with the keys in `slot`; O += P V with the values in `slot`. Asynchronous.
  auto const issue_scores = [&](int slot) {
    uint64_t const keys = operand(shared_kv + slot * Config::kv_bytes, 0);
    uint64_t const queries = operand(shared_q + current.slot() * Config::q_bytes, 0);
    hold(s);
    cute::warpgroup_arrive();
#pragma unroll
    for (int d = 0; d < head_dim / 16; ++d) {
      uint64_t const k = keys + (d / 4 * Config::kv_panel + d % 4 * 32) / 16;
      if constexpr (Config::queries_in_registers) {
        multiply_keys<Element, tile_k>(s, q + 4 * d, k, d > 0);
      } else {
        multiply_keys<Element, tile_k>(s, queries + (d / 4 * Config::q_panel + d % 4 * 32) / 16, k, d > 0);
      }
    }
    cute::warpgroup_commit_batch();
  };
  auto const issue_output = [&](int slot) {
    uint32_t const panel_stride = Config::sums_by_product
                                      ? cute::cast_smem_ptr_to_uint(shared.ones) - shared_kv - slot * Config::kv_bytes
                                      : Config::kv_panel;
    uint64_t const values = operand(shared_kv + slot * Config::kv_bytes, panel_stride);
    hold(o);
    cute::warpgroup_arrive();
#pragma unroll
    for (int n = 0; n < tile_k / 16; ++n) {
      multiply_values<Element, columns>(o, weights + 4 * n, values + n * 16 * row_bytes / 16);
    }
    cute::warpgroup_commit_batch();
  };
  auto const release = [&](Barrier& barrier) {
    if (leads) barrier.arrive();
  };
  // The queries' place and the job beside it, which all lanes have read.
  auto const release_job = [&] {
    __syncwarp();
    if (leads) shared.q_empty[current.slot()].arrive();
  };

  // At a job's beginning. Later the queries' place is another job's.
  auto const read_queries = [&] {
    if constexpr (Config::queries_in_registers) {
      int const thread = threadIdx.x % 32, row = threadIdx.x % 128 / 32 * 16 + thread % 16;
#pragma unroll
      for (int d = 0; d < head_dim / 16; ++d) {
        read_operand(q + 4 * d, shared_q + current.slot() * Config::q_bytes + d / 4 * Config::q_panel, row,
                     d % 4 * 2 + thread / 16);
      }
      release_job();
    }
  };
  auto const release_queries = [&] {
    if constexpr (!Config::queries_in_registers) release_job();
  };

  // Whose turn it is to issue products: a named barrier for each warpgroup, which the one before it opens.
  auto const take_turn = [&] {
    if constexpr (Config::in_turn) cutlass::arch::NamedBarrier::sync(256, 1 + warpgroup);
  };
  auto const pass_turn = [&] {
    if constexpr (Config::in_turn) {
      cutlass::arch::NamedBarrier::arrive(256, 1 + (warpgroup + 1 == Config::warpgroups ? 0 : warpgroup + 1));
    }
  };
  if (Config::in_turn && warpgroup == Config::warpgroups - 1) pass_turn();

  auto const clear_tail = [&](RingPlace<Config::slots> const& values, int rows) {
    shared.full[values.slot].wait(values.phase);
    clear_rows<Config>(shared.kv[values.slot], rows);
  };

  // Puts the largest weight at 2^−slack.
  auto const lower = [&](float (&offset)[2]) {
    if constexpr (Config::steady) {
      offset[0] += Config::slack;
      offset[1] += Config::slack;
    }
  };

  SoftmaxRow state[2];
  bool pending = false;  // the job before, whose last tile of weights waits for its product with the values
  // Read anew where it is needed: it does not stay in registers during the loop.
  auto const job_at = [&](int place) { return job_of<Config>(a, shared.work[place]); };
  auto const job_before = [&] { return job_at(current.before()); };
  // Rows of a job's first tile of values; fewer than tile_k where the others, which are another sequence's or none's,
  // have to be cleared.
  auto const rows_of_values = [&](Job const& job) {
    return a.ragged() ? min_of(tile_k, job.work.seqlen_k - job.range.tile(0) * tile_k) : tile_k;
  };
  auto const clear_values_that_wait = [&](RingPlace<Config::slots> const& values) {
    if (!a.ragged()) return;
    Job const job = job_before();
    if (job.range.count() == 1 && rows_of_values(job) < tile_k) clear_tail(values, rows_of_values(job));
  };

  // A job's last product with values, and its output.
  auto const end_job = [&](int number) {
    shared.full[place.slot].wait(place.phase);
    issue_output(place.slot);
    cute::warpgroup_wait<0>();
    hold(o);
    release(shared.empty[place.slot]);
    place.advance();
    store<Config>(a, place_of(job_at(number)), lane, o, state);
  };
  // Of the job that waits.
  auto const finish = [&] {
    if (!Config::pipelined || !pending) return;
    clear_values_that_wait(place);
    end_job(current.before());
    pending = false;
  };
  // Gives a tile back that this warpgroup has no use for: not before it has come, or the slot's turns would be counted
  // wrong.
  auto const drop = [&] {
    shared.full[place.slot].wait(place.phase);
    release(shared.empty[place.slot]);
    place.advance();
  };

#pragma unroll 1
  while (true) {
    shared.q_full[current.slot()].wait(current.phase());
    asm volatile("" ::: "memory");  // CUTLASS's wait does not tell the compiler that memory may have changed
    Posted const work = shared.work[current.number];
    Job const job = job_of<Config>(a, work);
    int const count = work.tile < 0 ? 0 : job.range.count();
    if (count == 0) {
      if (work.tile == Posted::notes) release_job();
      finish();
      if (work.tile == Posted::end) break;
      if (work.tile >= 0) {
        store_nothing<Config>(a, place_of(job), lane);
        release_job();
      }
      current.advance();
      continue;
    }
    read_queries();
    int const tail = rows_of_values(job);
    float ratio[2], offset[2];
    int masked = job.range.masked(), first_of_warpgroup = job.first;
    // Tiles at the end that no row of this warpgroup sees, while others do.
    int skipped = 0;
    if (Config::skips && job.range.begin == job.range.full_begin && tail == tile_k) {
      int const rows = a.pack == 1 ? warpgroup * 64 : warpgroup * 64 / a.pack;
      int const end = a.pack == 1 ? rows + 64 : (warpgroup * 64 + 63) / a.pack + 1;
      if (rows < job.queries) {
        first_of_warpgroup += rows;
        KeyRange const own = job.mask.key_range(first_of_warpgroup, job.first + min_of(end, job.queries), tile_k);
        if (own.count() > 0) {
          skipped = min_of(job.range.end - own.end, Config::most_skipped);
          masked = job.range.end - own.full_end;
        }
      }
    }
    if (Config::skips && skipped > 0) {
      // Next in the ring are K0, the values that wait, K1 V0 K2 V1 ...
      drop();
      finish();
      for (int j = 1; j < skipped; ++j) {
        drop();
        drop();
      }
    }

    // The first tile's scores, with the last output of the job before where one is left.
    auto const first_step = [&](auto with_output) {
      constexpr bool finishes = decltype(with_output)::value;
      SoftmaxRow fresh[2];
      Visible const seen = visible<Config>(a, job, lane, skipped);
      int const keys = place.slot;
      if constexpr (finishes) {
        RingPlace<Config::slots> ragged = place;
        ragged.advance();
        clear_values_that_wait(ragged);
      }
      take_turn();
      shared.full[keys].wait(place.phase);
      place.advance();
      int const values = place.slot;
      issue_scores(keys);
      if constexpr (finishes) {
        shared.full[values].wait(place.phase);
        issue_output(values);
        place.advance();
      }
      pass_turn();
      if (Config::skips && skipped > 0) drop();
      cute::warpgroup_wait<finishes ? 1 : 0>();
      hold(s);
      release(shared.empty[keys]);
      if (skipped == count - 1) release_queries();
      transform(s, a.score);
      if (masked > skipped) hide(s, seen);
      raise_maxima(s, fresh, ratio, offset, a.score);
      lower(offset);
      exponentials<Config>(s, fresh, offset, a.score.factor);
      if constexpr (finishes) {
        cute::warpgroup_wait<0>();
        hold(o);
        release(shared.empty[values]);
        store<Config>(a, place_of(job_before()), lane, o, state);
      }
#pragma unroll
      for (int i = 0; i < columns / 2; ++i) o[i] = 0.0f;
      state[0] = fresh[0];
      state[1] = fresh[1];
#pragma unroll
      for (int i = 0; i < tile_k / 4; ++i) weights[i] = Precision<Element>::pack(s[2 * i], s[2 * i + 1]);
    };
    if (Config::pipelined && pending) {
      first_step(std::bool_constant<Config::pipelined>{});
    } else {
      first_step(std::false_type{});
    }

    if (tail < tile_k && (count > 1 || !Config::pipelined)) {
      RingPlace<Config::slots> ragged = place;
      if (count > 1) ragged.advance();
      clear_tail(ragged, tail);
    }

    // The others: scores of this tile, output of the one before, softmax of this one meanwhile. multiply() issues both
    // products of the i-th tile, waits for the scores and gives the slot of the values, finish_output() waits for the
    // output.
    auto const multiply = [&](int i) {
      int const keys = place.slot;
      take_turn();
      shared.full[keys].wait(place.phase);
      place.advance();
      int const values = place.slot;
      issue_scores(keys);
      shared.full[values].wait(place.phase);
      issue_output(values);
      pass_turn();
      place.advance();
      cute::warpgroup_wait<1>();
      hold(s);
      release(shared.empty[keys]);
      if (i == count - 1) release_queries();
      return values;
    };
    auto const finish_output = [&](int values) {
      cute::warpgroup_wait<0>();
      hold(o);
      release(shared.empty[values]);
    };
    auto const step = [&](int i, auto mask) {
      constexpr bool masks = decltype(mask)::value;
      Visible seen;
      if constexpr (masks) seen = visible<Config>(a, job_at(current.number), lane, i);
      int const values = multiply(i);
      transform(s, a.score);
      if constexpr (masks) hide(s, seen);
      raise_maxima(s, state, ratio, offset, a.score);
      lower(offset);
      exponentials<Config>(s, state, offset, a.score.factor);
      finish_output(values);
#pragma unroll
      for (int j = 0; j < columns / 2; ++j) o[j] *= ratio[j / 2 % 2];
#pragma unroll
      for (int j = 0; j < tile_k / 4; ++j) weights[j] = Precision<Element>::pack(s[2 * j], s[2 * j + 1]);
    };
    // Packs a tile's weights, moves the references where one is 2 or more, and adds up the sums.
    auto const settle = [&](float (&added)[2]) {
      auto const pack = [&] {
#pragma unroll
        for (int j = 0; j < tile_k / 4; ++j) weights[j] = Precision<Element>::pack(s[2 * j], s[2 * j + 1]);
      };
      pack();
      uint32_t any[4] = {};
#pragma unroll
      for (int j = 0; j < tile_k / 4; ++j) any[j % 4] |= weights[j];
      uint32_t const all = any[0] | any[1] | any[2] | any[3];
      constexpr uint32_t two_or_more = 0x40004000;  // of each of a pair: the highest bit of either type's exponent
      if (__any_sync(0xffffffffu, (all & two_or_more) != 0)) {
        Posted const& work = shared.work[current.number];
        if (!move_references<Config>(a, work, lane, s, o, state, added, offset) && leads &&
            atomicExch(&shared.noted[current.number], 1) == 0) {
          shared.again[atomicAdd(&shared.again_count, 1)] = work;
        }
        pack();
      }
      if constexpr (Config::adds_sums) {
        state[0].sum += added[0];
        state[1].sum += added[1];
      }
    };
    // The same for a tile that all rows see whole, and of which all have seen keys: the weights are relative to the
    // reference that the rows have, so that no maximum has to be known before the first exponential, and neither the
    // output nor the sums are multiplied by anything. Floating point does not mind by what common factor weights are
    // too large or too small, until one reaches 2: then the references move.
    auto const steady_step = [&](int i) {
      int const values = multiply(i);
      float added[2];
      steady_exponentials<Config>(s, added, offset, a.score.factor);
      finish_output(values);
      settle(added);
    };
    int i = skipped + 1;
    int exact = masked;
    if constexpr (Config::steady) {
      // A row can have seen nothing of the masked tiles: one that ends where the tiles that all see do, or, where the
      // masked tiles are behind a window's left end, any.
      bool const blind = masked > 0 && (job.range.full_end == job.range.end ||
                                        job.mask.end_key(first_of_warpgroup) <= (job.range.end - masked) * tile_k);
      exact = min_of(count, masked + blind);
    }
#pragma unroll 1
    for (; i < exact; ++i) step(i, std::true_type{});
    if (!Config::steady || !a.steady || work.once_more) {
#pragma unroll 1
      for (; i < count; ++i) step(i, std::false_type{});
    }
    if constexpr (Config::steady) {
#pragma unroll 1
      for (; i < count; ++i) steady_step(i);
#pragma unroll
      for (int half = 0; half < 2; ++half) state[half].max = (offset[half] - Config::slack) / a.score.factor;
    }

    if constexpr (Config::pipelined) {
      pending = true;
    } else {
      end_job(current.number);
    }
    current.advance();
  }
}

}  // namespace flashcore::sm90

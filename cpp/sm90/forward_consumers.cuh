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
  int const chunks = (Config::tile_k - rows) * (Config::row_bytes / 16);
#pragma unroll
  for (int panel = 0; panel < Config::panels; ++panel) {
    uint4* const tail = reinterpret_cast<uint4*>(values + panel * Config::kv_panel + rows * Config::row_bytes);
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
  constexpr int columns = Config::columns, row_bytes = Config::row_bytes, steps = Config::panel_steps;
  bool const leads = threadIdx.x % 32 == 0;  // one lane of each warp tells the producer what is free
  uint32_t const shared_q = cute::cast_smem_ptr_to_uint(shared.q);
  uint32_t const shared_kv = cute::cast_smem_ptr_to_uint(shared.kv);
  RingPlace<Config::slots> place;
  JobNumber<Config::q_buffers> current;

  int const first_row = warpgroup * 64;
  Lane const lane{first_row + static_cast<int>(threadIdx.x) % 128 / 32 * 16 + static_cast<int>(threadIdx.x) % 32 / 4};

  float o[columns / 2], s[tile_k / 2];
  uint32_t weights[tile_k / 4];
  uint32_t q[Config::queries_in_registers ? head_dim / 4 : 1];

  // S = Q Kᵀ with the keys in `slot`; O += P V with the values in `slot`. Asynchronous.
  auto const issue_scores = [&](int slot) {
    uint64_t const keys = operand<row_bytes>(shared_kv + slot * Config::kv_bytes, 0);
    uint64_t const queries = operand<row_bytes>(shared_q + current.slot() * Config::q_bytes + first_row * row_bytes, 0);
    if constexpr (Config::forgets_scores) {
      forget(s);
    } else {
      hold(s);
    }
    cute::warpgroup_arrive();
#pragma unroll
    for (int d = 0; d < head_dim / 16; ++d) {
      uint64_t const k = keys + (d / steps * Config::kv_panel + d % steps * 32) / 16;
      if constexpr (Config::queries_in_registers) {
        multiply_keys<Element, tile_k>(s, q + 4 * d, k, d > 0);
      } else {
        multiply_keys<Element, tile_k>(s, queries + (d / steps * Config::q_panel + d % steps * 32) / 16, k, d > 0);
      }
    }
    cute::warpgroup_commit_batch();
  };
  auto const issue_output = [&](int slot) {
    uint32_t const panel_stride = Config::sums_by_product
                                      ? cute::cast_smem_ptr_to_uint(shared.ones) - shared_kv - slot * Config::kv_bytes
                                      : Config::kv_panel;
    uint64_t const values = operand<row_bytes>(shared_kv + slot * Config::kv_bytes, panel_stride);
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

  // At a job's end: those before it have been read to their end.
  auto const end_jobs_before = [&] {
    if (current.second_of_half()) shared.jobs_done.arrive();
    current.advance();
  };

  // At a job's beginning. Later the queries' place is another job's.
  auto const read_queries = [&] {
    if constexpr (Config::queries_in_registers) {
      int const thread = threadIdx.x % 32, row = first_row + threadIdx.x % 128 / 32 * 16 + thread % 16;
#pragma unroll
      for (int d = 0; d < head_dim / 16; ++d) {
        read_operand<row_bytes>(q + 4 * d, shared_q + current.slot() * Config::q_bytes + d / steps * Config::q_panel,
                                row, d % steps * 2 + thread / 16);
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
  float reference[2];    // of the job before: what its rows' weights are relative to, in bits
  bool pending = false;  // the job before, whose last tile of weights waits for its product with the values
  bool absent = false;   // from it: this warpgroup has no rows of it, and no use for those values
  // Read anew where it is needed: it does not stay in registers during the loop.
  auto const job_before = [&]() -> Job const& { return shared.job[current.before()]; };
  auto const clear_values_that_wait = [&](RingPlace<Config::slots> const& values) {
    Job const& job = job_before();
    if (job.tail < tile_k && job.count == 1) clear_tail(values, job.tail);
  };

  // A job's last product with values, and its output.
  auto const end_job = [&](int number) {
    shared.full[place.slot].wait(place.phase);
    issue_output(place.slot);
    cute::warpgroup_wait<0>();
    hold(o);
    release(shared.empty[place.slot]);
    place.advance();
    store<Config>(a, shared.job[number], lane, o, state, reference);
  };
  // Gives a tile back that this warpgroup has no use for: not before it has come, or the slot's turns would be counted
  // wrong.
  auto const drop = [&] {
    shared.full[place.slot].wait(place.phase);
    release(shared.empty[place.slot]);
    place.advance();
  };
  // Of the job that waits.
  auto const finish = [&] {
    if (!Config::pipelined || !pending) return;
    if (absent) {
      drop();
    } else {
      end_job(current.before());
    }
    pending = absent = false;
  };

#pragma unroll 1
  while (true) {
    shared.q_full[current.slot()].wait(current.phase());
    asm volatile("" ::: "memory");  // CUTLASS's wait does not tell the compiler that memory may have changed
    Job const& job = shared.job[current.number];
    int const count = job.count;
    if (count == 0) {
      if (Config::pipelined && pending) clear_values_that_wait(place);
      finish();
      if (job.work.tile == Job::end) break;
      if (job.work.tile >= 0) store_nothing<Config>(a, job, lane);
      release_job();
      end_jobs_before();
      continue;
    }
    read_queries();
    if (Config::pipelined && pending) {
      // All warpgroups come here, and before any turn: else one could have the turn that another one waits for.
      RingPlace<Config::slots> ragged = place;
      ragged.advance();
      clear_values_that_wait(ragged);
    }
    // Of a job's second tile of values on, clear_tail() is a barrier of all warpgroups, too.
    auto const clear_first_values = [&] {
      if (job.tail == tile_k || (count == 1 && Config::pipelined)) return;
      RingPlace<Config::slots> ragged = place;
      if (count > 1) ragged.advance();
      clear_tail(ragged, job.tail);
    };
    auto const let_pass = [&] {
      take_turn();
      pass_turn();
    };
    // A warpgroup without rows gives the tiles back as they come. In the ring are K0, the values that wait, K1 V0 K2 V1
    // ...
    bool const empty = a.query(first_row) >= job.queries;
    float ratio[2], offset[2];
    Part own;
    if constexpr (Config::parts == 0) own = part_of<Config>(a, job, warpgroup);
    Part const& part = Config::parts == 0 ? own : job.part[Config::skips ? warpgroup : 0];
    int const skipped = Config::skips ? part.skipped : 0;
    if (Config::skips && skipped > 0 && !empty) {
      let_pass();
      drop();
      finish();
      for (int j = 1; j < skipped; ++j) {
        let_pass();
        drop();
        drop();
      }
    }

    // The first tile's scores, with the last output of the job before where one is left.
    auto const first_step = [&](auto with_output) {
      constexpr bool finishes = decltype(with_output)::value;
      SoftmaxRow fresh[2];
      Visible seen;
      bool const masked = part.masked > skipped;
      if (masked) seen = visible<Config>(a, job, lane, skipped);
      int const keys = place.slot;
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
      if constexpr (!finishes) {
        if ((Config::skips && skipped > 0) || absent) drop();
      }
      cute::warpgroup_wait<finishes ? 1 : 0>();
      hold(s);
      if (skipped == count - 1) release_queries();
      transform(s, a.score);
      if (masked) hide(s, seen);
      raise_maxima(s, fresh, ratio, offset, a.score);
      fresh[0].sum = fresh[1].sum = 0.0f;
      lower(offset);
      exponentials<Config>(s, fresh, offset, a.score.factor);
      if constexpr (finishes && Config::waits_late) {
        // The wait for the output stays behind this arrival, and the arrival waits for an exponential. That is never
        // negative, which the compiler knows, unless some of its bits are cut.
        float const begun = __uint_as_float(__float_as_uint(s[0]) & Config::kept);
        if (leads & !(begun < 0.0f)) shared.empty[keys].arrive();
      } else {
        release(shared.empty[keys]);
      }
      if constexpr (finishes) {
        cute::warpgroup_wait<0>();
        hold(o);
        release(shared.empty[values]);
        store<Config>(a, job_before(), lane, o, state, reference);
      }
#pragma unroll
      for (int i = 0; i < columns / 2; ++i) o[i] = 0.0f;
      state[0] = fresh[0];
      state[1] = fresh[1];
#pragma unroll
      for (int i = 0; i < tile_k / 4; ++i) weights[i] = Precision<Element>::pack(s[2 * i], s[2 * i + 1]);
    };
    if (empty) {
      release_queries();
      let_pass();
      drop();
      finish();
    } else if (Config::pipelined && pending && !absent) {
      first_step(std::bool_constant<Config::pipelined>{});
    } else {
      first_step(std::false_type{});
    }

    absent = false;
    clear_first_values();  // all warpgroups come here: two places that wait at one barrier are an error to synccheck
    if (empty) {
#pragma unroll 1
      for (int j = 1; j < count; ++j) {
        let_pass();
        drop();
        drop();
      }
      if constexpr (Config::pipelined) {
        pending = absent = true;
      } else {
        drop();
      }
      end_jobs_before();
      continue;
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
      cute::warpgroup_wait<Config::early == 0 ? 0 : 1>();
      hold(s);
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
      if constexpr (masks) seen = visible<Config>(a, shared.job[current.number], lane, i);
      int const keys = place.slot;
      int const values = multiply(i);
      release(shared.empty[keys]);
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
        Job const& job = shared.job[current.number];
        if (!move_references<Config>(a, job.queries, lane, s, o, state, added, offset) && leads &&
            atomicExch(&shared.noted[current.number], 1) == 0) {
          shared.again[atomicAdd(&shared.again_count, 1)] = job.work;
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
      int const keys = place.slot;
      int const values = multiply(i);
      float sums[2][4] = {};
      steady_exponentials<Config, 0, Config::early>(s, sums, offset, a.score.factor);
      if constexpr (Config::waits_late) {
        // The wait for the output stays behind this arrival, and the arrival waits for the sum: no weight is negative.
        float sum = 0.0f;
#pragma unroll
        for (int half = 0; half < 2; ++half) sum += (sums[half][0] + sums[half][1]) + (sums[half][2] + sums[half][3]);
        if constexpr (!Config::adds_sums) {
#pragma unroll
          for (int j = 0; j < Config::early; ++j) sum += __uint_as_float(__float_as_uint(s[j]) & Config::kept);
        }
        if (leads & !(sum < 0.0f)) shared.empty[keys].arrive();
      } else {
        release(shared.empty[keys]);
      }
      finish_output(values);
      steady_exponentials<Config, Config::early, tile_k / 2>(s, sums, offset, a.score.factor);
      float added[2];
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        added[half] = (sums[half][0] + sums[half][1]) + (sums[half][2] + sums[half][3]);
      }
      settle(added);
    };
    int i = skipped + 1;
    int const exact = part.exact;
#pragma unroll 1
    for (; i < exact; ++i) step(i, std::true_type{});
    if (!Config::steady || !a.steady || job.once_more) {
#pragma unroll 1
      for (; i < count; ++i) step(i, std::false_type{});
    }
    if constexpr (Config::steady) {
#pragma unroll 1
      for (; i < count; ++i) steady_step(i);
    }
    reference[0] = offset[0];
    reference[1] = offset[1];

    if constexpr (Config::pipelined) {
      pending = true;
    } else {
      end_job(current.number);
    }
    end_jobs_before();
  }
}

}  // namespace flashcore::sm90

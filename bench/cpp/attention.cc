// SPDX-License-Identifier: Apache-2.0
// The commands attention and sweep: problems through the public interface, on the GPU where there is one.
#include <cstdio>

#include "commands.h"
#include "core/problem_facts.h"
#include "reference.h"

namespace flashcore::bench {
namespace {

constexpr int64_t sampled_heads = 12;  // (sequence, head) pairs that are held against float64

struct Result {
  Plan plan;
  Errors errors;
  Timing timing;
  std::string problem;
  double allowed = 0;
};

std::unique_ptr<Machine> machine_for(Backend backend) { return on_cpu(backend) ? cpu_machine() : gpu_machine(); }

Result measure(Machine& machine, const Case& c, const Options& options) {
  bool const cpu = machine.device().type == DeviceType::cpu;
  Result result;
  Arrays arrays(machine, c, options.rotate >= 0 ? options.rotate : cpu ? 0.03 * 0x1p30 : 0x1p30, options.seed);
  Problem const first = arrays.problem(0, nullptr);
  try {
    validate(first);
    result.plan = plan(first, device_properties(machine.device()));
  } catch (const std::exception& error) {
    throw UsageError(error.what());
  }
  auto const call = [&](int set, void* stream) { launch(arrays.problem(set, stream), result.plan); };
  machine.run(call);
  Reference const reference(c, arrays, sampled_heads);
  result.allowed = reference.allowed();
  result.errors = reference.errors(arrays.out());
  result.problem = reference.problem(result.errors);
  if (result.problem.empty()) {
    Budget budget = options.budget;
    if (budget.milliseconds <= 0) budget.milliseconds = cpu ? 100 : 20;
    result.timing = machine.time(call, arrays.sets(), budget);
  }
  machine.release();
  return result;
}

// Measures the cases and prints them as one table.
int run(const Options& options, const char* kind, const std::vector<Case>& cases) {
  auto const machine = machine_for(options.problem.backend);
  bool const cpu = machine->device().type == DeviceType::cpu;
  char const* const unit = cpu ? "GFLOP/s" : "TFLOP/s";
  std::vector<std::vector<std::string>> rows = {
      {"B, H, S, D", "us", "+/-", unit, "GB/s", "error", "allowed", "", "kernel"}};
  Json cells = Json::array();
  bool wrong = false;
  for (size_t i = 0; i < cases.size(); ++i) {
    Case const& c = cases[i];
    progress(std::to_string(i + 1) + " of " + std::to_string(cases.size()) + ": " + c.label());
    Result const r = measure(*machine, c, options);
    wrong |= !r.problem.empty();
    double const us = r.timing.microseconds;
    std::string const kernel =
        std::string(r.plan.kernel) + ", " + std::to_string(r.plan.tile_q) + " x " + std::to_string(r.plan.tile_k);
    Json cell = Json::object();
    for (auto& [key, value] : c.to_json()) cell.set(key, value);
    cell.set("kernel", r.plan.kernel);
    cell.set("problem", r.problem);
    cell.set("max_error", r.errors.largest);
    cell.set("relative_error", r.errors.relative);
    cell.set("allowed_error", r.allowed);
    if (us > 0) {
      cell.set("microseconds", us);
      cell.set("spread", r.timing.spread);
      cell.set("tflops", c.flops() / us / 1e6);
      cell.set("tbytes_per_second", c.bytes() / us / 1e6);
    }
    cells.append(cell);
    rows.push_back({c.label(), us > 0 ? format("%.2f", us) : "", us > 0 ? format("%.1f%%", 50 * r.timing.spread) : "",
                    us > 0 ? format("%.1f", c.flops() / us / (cpu ? 1e3 : 1e6)) : "",
                    us > 0 ? format("%.0f", c.bytes() / us / 1e3) : "", format("%.2e", r.errors.largest),
                    format("%.2e", r.allowed), r.problem.empty() ? "pass" : "FAIL",
                    r.problem.empty() ? kernel : r.problem});
  }
  progress("");
  Json json = report(kind, options, *machine);
  if (!options.suite.empty()) json.set("suite", options.suite);
  Backend const backend = options.problem.backend;
  json.set("backend", backend == Backend::automatic ? "chosen by plan" : to_string(backend));
  json.set("seed", options.seed);
  json.set("cells", cells);
  std::fputs(table(rows).c_str(), stdout);
  write(options, json);
  return wrong ? 1 : 0;
}

}  // namespace

int attention(const Options& options) { return run(options, "attention", {options.problem}); }

// The suites of bench/suites.py by the same names.
int sweep(const Options& options) {
  std::vector<Case> cases;
  auto const add = [&](int64_t batch, int64_t heads, int64_t seqlen, int64_t head_dim, DType dtype, bool causal) {
    Case c;
    c.batch = batch;
    c.heads = heads;
    c.seqlen = seqlen;
    c.head_dim = head_dim;
    c.dtype = dtype;
    c.causal = causal;
    c.backend = options.problem.backend;
    cases.push_back(c);
  };
  if (options.suite == "forward") {
    for (int64_t const head_dim : {64, 128}) {
      for (int64_t const seqlen : {1024, 4096, 16384}) {
        for (bool const causal : {false, true}) {
          add(16384 / seqlen, 2048 / head_dim, seqlen, head_dim, bfloat16, causal);
        }
      }
    }
  } else if (options.suite == "small") {
    add(1, 8, 512, 64, bfloat16, false);
    add(1, 8, 512, 64, float16, false);
    add(1, 8, 512, 64, float16, true);
    for (int64_t const seqlen : {128, 256, 512}) {
      for (int64_t const batch : {8, 16, 32}) add(batch, 8, seqlen, 64, bfloat16, false);
    }
  } else {
    std::pair<int64_t, int64_t> const shapes[] = {{1, 4096}, {1, 32768}, {1, 131072},
                                                  {8, 8192}, {32, 4096}, {64, 8192}};
    for (auto const& [batch, keys] : shapes) {
      add(batch, 32, 1, 128, bfloat16, false);
      cases.back().heads_k = 8;
      cases.back().seqlen_k = keys;
    }
  }
  return run(options, "sweep", cases);
}

}  // namespace flashcore::bench

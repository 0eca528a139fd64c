// SPDX-License-Identifier: Apache-2.0
// The command ladder: every rung on the same inputs, checked and timed.
#include "ladder/ladder.h"

#include <algorithm>
#include <cstdio>
#include <functional>

#include "commands.h"
#include "core/forward_params.h"
#include "reference.h"

namespace flashcore::bench {
namespace {

// A row of the table: what runs, or why it does not.
struct Entry {
  std::string name, note{}, refused{};
  std::function<void(const Problem&)> run{};

  std::string problem{};  // why the result is wrong
  Errors errors{};
  Timing timing{};
};

// Through the public interface: the backend as asked, or as plan() chooses.
Entry through_library(const char* name, Problem p, Backend backend) {
  Entry entry{.name = name};
  p.backend = backend;
  try {
    validate(p);
    Plan const chosen = plan(p, device_properties(p.query.device));
    entry.note = std::string(backend == Backend::automatic ? "the library's choice: " : "the library's ") +
                 chosen.kernel + ", " + std::to_string(chosen.tile_q) + " x " + std::to_string(chosen.tile_k);
    entry.run = [chosen, backend](const Problem& problem) {
      Problem own = problem;
      own.backend = backend;
      launch(own, chosen);
    };
  } catch (const std::exception& error) {
    entry.refused = error.what();
  }
  return entry;
}

std::vector<Entry> entries(const Problem& p) {
  std::vector<Entry> all;
  DeviceProperties const& device = device_properties(p.query.device);
  for (auto const& rung : ladder::rungs()) {
    Entry entry{.name = rung.name, .note = rung.note};
    entry.refused = ladder::refusal(rung, forward_params(p), p.query.dtype, device);
    entry.run = [run = rung.run](const Problem& q) { run(forward_params(q), q.query.dtype, q.stream); };
    all.push_back(entry);
  }
  all.push_back(through_library("sm80", p, Backend::sm80));
  all.push_back(through_library("flashcore", p, Backend::automatic));
  return all;
}

std::string number(double x) { return format(x < 10 ? "%.2f" : x < 100 ? "%.1f" : "%.0f", x); }

}  // namespace

int ladder(const Options& options) {
  auto const gpu = gpu_machine();
  Case const& c = options.problem;
  Arrays arrays(*gpu, c, options.check ? 0 : options.rotate < 0 ? 0x1p30 : options.rotate, options.seed);
  Problem const first = arrays.problem(0, nullptr);
  try {
    validate(first);
  } catch (const std::exception& error) {
    throw UsageError(error.what());
  }
  std::vector<Entry> all = entries(first);
  if (!options.only.empty()) {
    std::erase_if(all, [&](Entry const& entry) { return entry.name != options.only; });
    if (all.empty()) throw UsageError("--only: there is no rung " + options.only);
  }

  progress("computing the float64 reference");
  Reference const reference(c, arrays, c.batch * c.heads);
  Budget budget = options.budget;
  if (budget.milliseconds <= 0) budget.milliseconds = 20;
  bool wrong = false;
  for (size_t i = 0; i < all.size(); ++i) {
    Entry& entry = all[i];
    if (!entry.refused.empty()) continue;
    progress("rung " + std::to_string(i + 1) + " of " + std::to_string(all.size()) + ": " + entry.name);
    auto const call = [&](int set, void* stream) { entry.run(arrays.problem(set, stream)); };
    arrays.poison();
    try {
      gpu->run(call);
      entry.errors = reference.errors(arrays.out());
      entry.problem = reference.problem(entry.errors);
      if (entry.problem.empty() && !options.check) {
        entry.timing = gpu->time(call, arrays.sets(), budget);
        if (reference.errors(arrays.out()).largest != entry.errors.largest) {
          entry.problem = "the output changed while it was timed";
        }
      }
    } catch (const RuntimeError& error) {  // of a kernel: what follows on this GPU fails as well
      entry.problem = error.what();
    }
    wrong |= !entry.problem.empty();
  }
  Peak peak;
  if (!options.check && !wrong) {
    progress("measuring the peaks of this GPU");
    arrays.release();
    peak = measure_peak(*gpu);
  }
  progress("");

  double const baseline = all[0].name == "baseline" ? all[0].timing.microseconds : 0;
  std::vector<std::vector<std::string>> rows = {
      {"approach", "us", "+/-", "speed-up", "TFLOP/s", "of peak", "error", "allowed", "", "note"}};
  Json rungs = Json::array();
  for (Entry const& entry : all) {
    Json json = Json::object({{"name", entry.name}, {"note", entry.note}});
    if (!entry.refused.empty()) {
      rows.push_back({entry.name, "", "", "", "", "", "", "", "not run", entry.refused});
      json.set("refused", entry.refused);
      rungs.append(json);
      continue;
    }
    double const us = entry.timing.microseconds, tflops = us > 0 ? c.flops() / us / 1e6 : 0;
    double const share = peak.tflops() > 0 ? tflops / peak.tflops() : 0;
    json.set("problem", entry.problem);
    json.set("max_error", entry.errors.largest);
    json.set("relative_error", entry.errors.relative);
    if (us > 0) {
      json.set("microseconds", us);
      json.set("spread", entry.timing.spread);
      json.set("calls", entry.timing.calls);
      json.set("tflops", tflops);
      if (baseline > 0) json.set("speedup", baseline / us);
      if (share > 0) json.set("share_of_peak", share);
    }
    rungs.append(json);
    rows.push_back({entry.name, us > 0 ? number(us) : "", us > 0 ? format("%.1f%%", 50 * entry.timing.spread) : "",
                    us > 0 && baseline > 0 ? format("%.1f", baseline / us) : "", us > 0 ? number(tflops) : "",
                    share > 0 ? format("%.1f%%", 100 * share) : "", format("%.2e", entry.errors.largest),
                    format("%.2e", reference.allowed()), entry.problem.empty() ? "pass" : "FAIL",
                    entry.problem.empty() ? entry.note : entry.problem});
  }

  Json json = report("ladder", options, *gpu);
  Json problem = Json::object();
  for (auto& [key, value] : c.to_json()) problem.set(key, value);
  json.set("problem", problem);
  json.set("seed", options.seed);
  json.set("method", Json::object({{"rounds", budget.rounds},
                                   {"milliseconds", budget.milliseconds},
                                   {"sets", arrays.sets()},
                                   {"rotated_bytes", arrays.sets() * c.bytes()}}));
  json.set("reference", Json::object({{"rows", reference.rows()},
                                      {"allowed_error", reference.allowed()},
                                      {"allowed_relative_error", reference.allowed_relative()}}));
  if (peak.tflops() > 0) json.set("peak", to_json(peak));
  json.set("rungs", rungs);

  std::printf("%s, %lld rows checked%s\n\n", c.label().c_str(), static_cast<long long>(reference.rows()),
              peak.tflops() > 0 ? format(", peak %.0f TFLOP/s", peak.tflops()).c_str() : "");
  std::fputs(table(rows).c_str(), stdout);
  write(options, json);
  return wrong ? 1 : 0;
}

}  // namespace flashcore::bench

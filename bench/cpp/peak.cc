// SPDX-License-Identifier: Apache-2.0
// The command peak.
#include <cstdio>

#include "commands.h"
#include "flashcore/flashcore.h"

namespace flashcore::bench {
namespace {

int peak_of_cpu(const Options& options) {
  auto const cpu = cpu_machine();
  progress("measuring the peaks of this processor");
  CpuPeak const p = measure_cpu_peak(*cpu);
  progress("");
  Json json = report("peak", options, *cpu);
  json.set("peak", to_json(p));
  std::vector<std::vector<std::string>> rows = {
      {"threads", std::to_string(num_threads())},
      {"instruction set", build_info().cpu_isa},
      {"multiply-add, float32", format("%.1f GFLOP/s", p.float32_tflops * 1e3)}};
  bool const tiles = p.bfloat16_dot_tflops > 0;
  if (tiles) rows.push_back({"product of tiles, bfloat16", format("%.1f GFLOP/s", p.bfloat16_tflops * 1e3)});
  double const dot = tiles ? p.bfloat16_dot_tflops : p.bfloat16_tflops;
  if (dot > 0) rows.push_back({"dot product, bfloat16", format("%.1f GFLOP/s", dot * 1e3)});
  rows.push_back({"memory, read", format("%.1f GB/s", p.read_tbytes * 1e3)});
  std::fputs(table(rows).c_str(), stdout);
  write(options, json);
  return 0;
}

}  // namespace

int peak(const Options& options) {
  if (on_cpu(options.problem.backend)) return peak_of_cpu(options);
  auto const gpu = gpu_machine();
  progress("measuring the peaks of this GPU");
  Peak const p = measure_peak(*gpu);
  progress("");
  Json json = report("peak", options, *gpu);
  json.set("peak", to_json(p));
  std::vector<std::vector<std::string>> rows = {
      {"multiprocessors", std::to_string(p.multiprocessors)},
      {"clock, during mma.sync", format("%.0f MHz", p.clock_mhz) + format(" of at most %.0f", p.max_clock_mhz)},
      {"tensor cores, mma.sync fp16", format("%.0f TFLOP/s", p.mma_tflops)}};
  if (p.wgmma_tflops > 0) rows.push_back({"tensor cores, wgmma fp16", format("%.0f TFLOP/s", p.wgmma_tflops)});
  rows.push_back({"memory, copy", format("%.2f TB/s", p.copy_tbytes) + ", read and written"});
  rows.push_back({"memory, read", format("%.2f TB/s", p.read_tbytes)});
  std::fputs(table(rows).c_str(), stdout);
  write(options, json);
  return 0;
}

}  // namespace flashcore::bench

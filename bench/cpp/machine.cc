// SPDX-License-Identifier: Apache-2.0
// The CPU as a machine, and what all machines share.
#include "machine.h"

#include <algorithm>
#include <chrono>
#include <cstdlib>
#include <cstring>
#include <fstream>
#include <new>
#include <thread>

#include "cpu/element.h"
#include "flashcore/flashcore.h"
#include "random.h"

namespace flashcore::bench {
namespace {

std::string processor() {
  std::ifstream file("/proc/cpuinfo");
  for (std::string line; std::getline(file, line);) {
    if (line.starts_with("model name") && line.find(": ") != std::string::npos) return line.substr(line.find(": ") + 2);
  }
  return "CPU";
}

template <class Element>
void fill_with(Element* to, int64_t begin, int64_t end, uint64_t seed, int64_t row_length) {
  for (int64_t i = begin; i < end; ++i) {
    float const scale = row_length > 0 ? row_scale(static_cast<uint64_t>(i / row_length)) : 1.0f;
    cpu::from_float(normal(seed, static_cast<uint64_t>(i)) * scale, to[i]);
  }
}

class CpuMachine : public Machine {
 public:
  Device device() const override { return {DeviceType::cpu, 0}; }

  void* allocate(size_t bytes) override {
    // Lines of the cache, and pages that come from the system as they are written.
    memory_.emplace_back(std::aligned_alloc(64, (bytes + 63) / 64 * 64), &std::free);
    if (!memory_.back()) throw RuntimeError("out of memory: " + std::to_string(bytes) + " bytes for an array");
    return memory_.back().get();
  }
  void release() override { memory_.clear(); }
  void write(void* to, const void* from, size_t bytes) override { std::memcpy(to, from, bytes); }
  void read(void* to, const void* from, size_t bytes) override { std::memcpy(to, from, bytes); }
  void clear(void* to, int byte, size_t bytes) override { std::memset(to, byte, bytes); }

  void fill(void* to, DType dtype, int64_t count, uint64_t seed, int64_t row_length) override {
    int const parts = num_threads();
    std::vector<std::jthread> threads;
    for (int i = 0; i < parts; ++i) {
      threads.emplace_back([=] {
        int64_t const begin = count * i / parts, end = count * (i + 1) / parts;
        if (dtype == float16)
          fill_with(static_cast<cpu::Half*>(to), begin, end, seed, row_length);
        else if (dtype == bfloat16)
          fill_with(static_cast<cpu::BFloat*>(to), begin, end, seed, row_length);
        else
          fill_with(static_cast<float*>(to), begin, end, seed, row_length);
      });
    }
  }

  void run(const Call& call) override { call(0, nullptr); }

  Timing time(const Call& call, int sets, const Budget& budget) override {
    auto const round = [&](int calls) {
      auto const begin = std::chrono::steady_clock::now();
      for (int i = 0; i < calls; ++i) call(i % sets, nullptr);
      return std::chrono::duration<double, std::micro>(std::chrono::steady_clock::now() - begin).count() / calls;
    };
    round(1);
    int const calls = std::clamp(static_cast<int>(budget.milliseconds * 1e3 / std::max(round(1), 1e-3)), 1, 1 << 20);
    std::vector<double> samples;
    for (int i = 0; i < budget.rounds; ++i) samples.push_back(round(calls));
    return summary(samples, calls);
  }

  Json::Members facts() const override {
    return {{"device", processor()},
            {"versions", Json::object({{"flashcore", version()}})},
            {"threads", num_threads()},
            {"isa", build_info().cpu_isa}};
  }

 private:
  std::vector<std::unique_ptr<void, void (*)(void*)>> memory_;
};

}  // namespace

std::unique_ptr<Machine> cpu_machine() { return std::make_unique<CpuMachine>(); }

Timing summary(std::vector<double> microseconds, int calls) {
  std::sort(microseconds.begin(), microseconds.end());
  size_t const n = microseconds.size();
  double const median = (microseconds[n / 2] + microseconds[(n - 1) / 2]) / 2;
  return {median, (microseconds.back() - microseconds.front()) / median, calls};
}

Json to_json(const Peak& peak) {
  Json::Members members = {{"tflops", peak.tflops()}, {"mma_tflops", peak.mma_tflops}};
  if (peak.wgmma_tflops > 0) members.emplace_back("wgmma_tflops", peak.wgmma_tflops);
  members.insert(members.end(), {{"copy_tbytes_per_second", peak.copy_tbytes},
                                 {"read_tbytes_per_second", peak.read_tbytes},
                                 {"clock_mhz", peak.clock_mhz},
                                 {"max_clock_mhz", peak.max_clock_mhz},
                                 {"multiprocessors", peak.multiprocessors}});
  return Json::object(members);
}

#if !FLASHCORE_HAS_CUDA
std::unique_ptr<Machine> gpu_machine() {
  throw NoGpu("no GPU can be used: this build has no CUDA code (it was made with FLASHCORE_CUDA=OFF)");
}
Peak measure_peak(Machine&) { return {}; }
#endif

}  // namespace flashcore::bench

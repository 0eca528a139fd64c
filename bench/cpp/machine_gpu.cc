// SPDX-License-Identifier: Apache-2.0
// An NVIDIA GPU as a machine: the CUDA runtime's memory, graphs and events; and its peaks, measured.
#include <dlfcn.h>

#include <algorithm>
#include <cmath>

#include "core/cuda_check.h"
#include "flashcore/flashcore.h"
#include "gpu_kernels.h"
#include "machine.h"

namespace flashcore::bench {
namespace {

// "580.159.04", from NVIDIA's management library, which comes with the driver; empty where it does not tell.
std::string driver_version() {
  void* const library = dlopen("libnvidia-ml.so.1", RTLD_NOW | RTLD_LOCAL);
  if (library == nullptr) return "";
  auto const init = reinterpret_cast<int (*)()>(dlsym(library, "nvmlInit_v2"));
  auto const tell = reinterpret_cast<int (*)(char*, unsigned)>(dlsym(library, "nvmlSystemGetDriverVersion"));
  char text[80] = "";
  if (init == nullptr || tell == nullptr || init() != 0 || tell(text, sizeof text) != 0) return "";
  return text;
}

class Event {
 public:
  Event() { cuda_check(cudaEventCreate(&event_), "making an event"); }
  ~Event() { cudaEventDestroy(event_); }
  Event(const Event&) = delete;
  Event& operator=(const Event&) = delete;
  void record(cudaStream_t stream) { cuda_check(cudaEventRecord(event_, stream), "recording an event"); }
  // Microseconds from `begin` to this one, waiting for it.
  double since(const Event& begin) {
    cuda_check(cudaEventSynchronize(event_), "running a kernel");
    float milliseconds = 0;
    cuda_check(cudaEventElapsedTime(&milliseconds, begin.event_, event_), "reading an event");
    return milliseconds * 1e3;
  }

 private:
  cudaEvent_t event_ = nullptr;
};

class Graph {
 public:
  // The calls walk(0) to walk(count − 1), captured.
  template <class Walk>
  Graph(cudaStream_t stream, Walk walk) {
    cuda_check(cudaStreamBeginCapture(stream, cudaStreamCaptureModeThreadLocal), "capturing a CUDA graph");
    cudaGraph_t graph = nullptr;
    try {
      walk();
    } catch (...) {
      if (cudaStreamEndCapture(stream, &graph) == cudaSuccess) cudaGraphDestroy(graph);
      cudaGetLastError();
      throw;
    }
    cuda_check(cudaStreamEndCapture(stream, &graph), "capturing a CUDA graph");
    auto const status = cudaGraphInstantiate(&executable_, graph, 0);
    cudaGraphDestroy(graph);
    cuda_check(status, "making a CUDA graph");
  }
  ~Graph() { cudaGraphExecDestroy(executable_); }
  Graph(const Graph&) = delete;
  Graph& operator=(const Graph&) = delete;
  void launch(cudaStream_t stream) { cuda_check(cudaGraphLaunch(executable_, stream), "launching a CUDA graph"); }

 private:
  cudaGraphExec_t executable_ = nullptr;
};

class GpuMachine : public Machine {
 public:
  GpuMachine() {
    cuda_check(cudaSetDevice(0), "choosing the GPU");
    cuda_check(cudaGetDeviceProperties(&properties_, 0), "asking for the properties of the GPU");
    cuda_check(cudaStreamCreateWithFlags(&stream_, cudaStreamNonBlocking), "making a stream");
  }
  ~GpuMachine() override {
    for (void* const p : memory_) cudaFree(p);
    cudaStreamDestroy(stream_);
  }

  Device device() const override { return {DeviceType::cuda, 0}; }

  void* allocate(size_t bytes) override {
    void* p = nullptr;
    cuda_check(cudaMalloc(&p, bytes), "allocating an array on the GPU");
    memory_.push_back(p);
    return p;
  }
  void release() override {
    for (void* const p : memory_) cuda_check(cudaFree(p), "freeing an array on the GPU");
    memory_.clear();
  }
  void write(void* to, const void* from, size_t bytes) override {
    cuda_check(cudaMemcpyAsync(to, from, bytes, cudaMemcpyHostToDevice, stream_), "copying to the GPU");
    synchronize();
  }
  void read(void* to, const void* from, size_t bytes) override {
    cuda_check(cudaMemcpyAsync(to, from, bytes, cudaMemcpyDeviceToHost, stream_), "copying from the GPU");
    synchronize();
  }
  void clear(void* to, int byte, size_t bytes) override {
    cuda_check(cudaMemsetAsync(to, byte, bytes, stream_), "clearing an array on the GPU");
    synchronize();
  }
  void fill(void* to, DType dtype, int64_t count, uint64_t seed, int64_t row_length) override {
    fill_on_gpu(to, dtype, count, seed, row_length, stream_);
  }
  void run(const Call& call) override {
    call(0, stream_);
    synchronize();
  }

  Timing time(const Call& call, int sets, const Budget& budget) override {
    Event begin, end;
    auto const once = [&](auto&& work) {
      begin.record(stream_);
      work();
      end.record(stream_);
      return end.since(begin);
    };
    run(call);
    double const guess = once([&] { call(sets > 1, stream_); });
    // As many calls as a round is to take, but all sets at least once unless that takes long; a slow kernel's time does
    // not come from memory that is still cached.
    double const wanted = budget.milliseconds * 1e3 / guess;
    int const walk = sets * guess <= 5e3 * budget.milliseconds ? sets : 1;
    int const calls = static_cast<int>(std::clamp(std::ceil(wanted / walk), 1.0, std::ceil(2048.0 / walk))) * walk;
    Graph graph(stream_, [&] {
      for (int i = 0; i < calls; ++i) call(i % sets, stream_);
    });
    double const first = once([&] { graph.launch(stream_); });
    int const replays = std::max(1, static_cast<int>(std::lround(budget.milliseconds * 1e3 / first)));
    std::vector<double> samples;
    for (int i = 0; i < budget.rounds; ++i) {
      double const all = once([&] {
        for (int r = 0; r < replays; ++r) graph.launch(stream_);
      });
      samples.push_back(all / (static_cast<double>(calls) * replays));
    }
    return summary(samples, calls * replays);
  }

  Json::Members facts() const override {
    int runtime = 0;
    cudaRuntimeGetVersion(&runtime);
    std::string const cuda = std::to_string(runtime / 1000) + "." + std::to_string(runtime % 1000 / 10);
    return {{"device", properties_.name},
            {"versions", Json::object({{"flashcore", version()}, {"cuda", cuda}})},
            {"driver", driver_version()},
            {"multiprocessors", properties_.multiProcessorCount}};
  }

 private:
  void synchronize() { cuda_check(cudaStreamSynchronize(stream_), "running a kernel"); }

  cudaDeviceProp properties_;
  cudaStream_t stream_ = nullptr;
  std::vector<void*> memory_;
};

}  // namespace

std::unique_ptr<Machine> gpu_machine() {
  if (std::string const why = build_info().cuda_problem; !why.empty()) throw NoGpu("no GPU can be used: " + why);
  return std::make_unique<GpuMachine>();
}

Peak measure_peak(Machine& gpu) {
  constexpr size_t bytes = size_t{1} << 29;
  Peak peak;
  int clock_khz = 0, capability = 0;
  cuda_check(cudaDeviceGetAttribute(&peak.multiprocessors, cudaDevAttrMultiProcessorCount, 0), "asking the GPU");
  cuda_check(cudaDeviceGetAttribute(&clock_khz, cudaDevAttrClockRate, 0), "asking the GPU for its clock");
  cuda_check(cudaDeviceGetAttribute(&capability, cudaDevAttrComputeCapabilityMajor, 0), "asking the GPU");
  peak.max_clock_mhz = clock_khz / 1e3;
  int const units = peak.multiprocessors;

  // Some milliseconds a call, so that launching it counts for nothing.
  constexpr int repetitions = 20000;
  auto* const ticks = static_cast<uint64_t*>(gpu.allocate(64));
  auto* const from = static_cast<char*>(gpu.allocate(bytes));
  auto* const to = static_cast<char*>(gpu.allocate(bytes));
  gpu.fill(from, float16, bytes / 2, 1, 0);
  auto const stream_of = [](void* s) { return static_cast<cudaStream_t>(s); };
  Budget const budget{5, 20.0};

  double flops = 0;
  Timing t = gpu.time([&](int, void* s) { flops = mma_loop(units, repetitions, ticks, stream_of(s)); }, 1, budget);
  peak.mma_tflops = flops / t.microseconds / 1e6;
  uint64_t measured[2] = {};
  gpu.read(measured, ticks, sizeof measured);
  peak.clock_mhz = measured[1] > 0 ? 1e3 * static_cast<double>(measured[0]) / static_cast<double>(measured[1]) : 0;
  if (capability == 9) {
    flops = 0;
    t = gpu.time([&](int, void* s) { flops = wgmma_loop(units, repetitions / 16, ticks, stream_of(s)); }, 1, budget);
    peak.wgmma_tflops = flops / t.microseconds / 1e6;
  }
  t = gpu.time([&](int, void* s) { copy_bytes(to, from, bytes, units, stream_of(s)); }, 1, budget);
  peak.copy_tbytes = 2.0 * bytes / t.microseconds / 1e6;
  t = gpu.time([&](int, void* s) { read_bytes(to, from, bytes, units, stream_of(s)); }, 1, budget);
  peak.read_tbytes = bytes / t.microseconds / 1e6;
  gpu.release();
  return peak;
}

}  // namespace flashcore::bench

// SPDX-License-Identifier: Apache-2.0
// What the benchmark needs of a device: memory, random numbers, time, facts. One implementation for the CPU and one for
// NVIDIA GPUs.
#pragma once

#include <cstddef>
#include <cstdint>
#include <functional>
#include <memory>

#include "flashcore/error.h"
#include "flashcore/tensor.h"
#include "json.h"

namespace flashcore::bench {

// How long to measure.
struct Budget {
  int rounds = 5;
  double milliseconds = 20.0;  // of work a round
};

// Of one call.
struct Timing {
  double microseconds = 0;  // median of the rounds
  double spread = 0;        // (largest − smallest) / median
  int calls = 0;            // that one round consists of
};

class Machine {
 public:
  virtual ~Machine() = default;
  virtual Device device() const = 0;

  // Memory; freed by release() or with the machine. Throws RuntimeError where there is not enough.
  virtual void* allocate(size_t bytes) = 0;
  virtual void release() = 0;
  virtual void write(void* to, const void* from, size_t bytes) = 0;
  virtual void read(void* to, const void* from, size_t bytes) = 0;
  virtual void clear(void* to, int byte, size_t bytes) = 0;

  // `count` elements, normally distributed; with row_length > 0 each row times row_scale().
  virtual void fill(void* to, DType dtype, int64_t count, uint64_t seed, int64_t row_length) = 0;

  // Runs call(0) once, to its end.
  using Call = std::function<void(int set, void* stream)>;
  virtual void run(const Call& call) = 0;

  // Times calls that walk through the sets 0 to sets − 1. On a GPU they are the nodes of a CUDA graph.
  virtual Timing time(const Call& call, int sets, const Budget& budget) = 0;

  // Name, driver, versions.
  virtual Json::Members facts() const = 0;
};

std::unique_ptr<Machine> cpu_machine();

// There is none that can be used: no driver, no device, a build without CUDA. The text says which.
struct NoGpu : RuntimeError {
  using RuntimeError::RuntimeError;
};

// The first GPU. Throws NoGpu.
std::unique_ptr<Machine> gpu_machine();

// What a GPU reaches on its own: operands in registers (mma.sync) or shared memory (wgmma), nothing else to do.
struct Peak {
  double mma_tflops = 0;    // float16, mma.sync m16n8k16
  double wgmma_tflops = 0;  // float16, wgmma m64n256k16; 0 where there is none
  double copy_tbytes = 0;   // per second, read and written
  double read_tbytes = 0;
  double clock_mhz = 0;      // of the multiprocessors, during mma.sync
  double max_clock_mhz = 0;  // what the driver names
  int multiprocessors = 0;

  double tflops() const { return wgmma_tflops > mma_tflops ? wgmma_tflops : mma_tflops; }
};

// Of `gpu`, which is gpu_machine()'s. Takes some tenths of a second and half a gibibyte, which it gives back.
Peak measure_peak(Machine& gpu);
Json to_json(const Peak& peak);

// What a processor reaches on its own, in the instruction set and on the threads of the kernels.
struct CpuPeak {
  double float32_tflops = 0;       // multiply-adds, operands in registers
  double bfloat16_tflops = 0;      // dot products, operands in registers; 0 where the instruction set has none
  double bfloat16_dot_tflops = 0;  // those of vectors where bfloat16_tflops is of products of tiles; else 0
  double read_tbytes = 0;          // per second, of an array larger than the caches
};

// Of `cpu`, which is cpu_machine()'s. Takes half a second and a quarter of a gibibyte, which it gives back.
CpuPeak measure_cpu_peak(Machine& cpu);
Json to_json(const CpuPeak& peak);

// (largest − smallest) / median and the median, of one number a round.
Timing summary(std::vector<double> microseconds, int calls);

}  // namespace flashcore::bench

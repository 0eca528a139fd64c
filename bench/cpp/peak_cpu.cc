// SPDX-License-Identifier: Apache-2.0
// The peaks of the processor, on as many threads as a call of the library uses.
#include <string>
#include <vector>

#include "cpu/cpu.h"
#include "cpu/thread_pool.h"
#include "machine.h"
#include "peak_isa.h"

namespace flashcore::bench {

#define FLASHCORE_BENCH_DECLARE(isa) \
  namespace isa {                    \
  extern const PeakLoops peak_loops; \
  }

FLASHCORE_BENCH_DECLARE(baseline)
FLASHCORE_BENCH_DECLARE(avx2)
FLASHCORE_BENCH_DECLARE(avx512)
FLASHCORE_BENCH_DECLARE(avx512bf16)
FLASHCORE_BENCH_DECLARE(avx512amx)

namespace {

// Of the instruction set that the kernels run in.
const PeakLoops& chosen_loops() {
  std::string const name = cpu::chosen_isa();
#if FLASHCORE_CPU_HAS_AVX2
  if (name == "avx2") return avx2::peak_loops;
#endif
#if FLASHCORE_CPU_HAS_AVX512
  if (name == "avx512") return avx512::peak_loops;
#endif
#if FLASHCORE_CPU_HAS_AVX512BF16
  if (name == "avx512bf16") return avx512bf16::peak_loops;
#endif
#if FLASHCORE_CPU_HAS_AVX512AMX
  if (name == "avx512amx") return avx512amx::peak_loops;
#endif
  return baseline::peak_loops;
}

constexpr Budget budget{5, 20.0};
constexpr int pieces = 8;  // of a call's work for each thread, so that one that comes late holds nobody up

double product_tflops(Machine& cpu, ProductLoop loop) {
  constexpr int64_t repetitions = 30000;  // of a piece: a tenth of a millisecond and more
  int const threads = cpu::num_threads();
  struct alignas(64) Registers {
    float values[loop_floats];
  };
  std::vector<Registers> registers(pieces * threads);
  for (Registers& own : registers) {
    for (int i = 0; i < loop_floats; ++i) own.values[i] = 1.0f + static_cast<float>(i) / loop_floats;
  }
  double const flops = loop(1, registers[0].values) * repetitions * pieces * threads;
  if (flops == 0) return 0;
  auto const call = [&](int, void*) {
    cpu::parallel_for(pieces * threads, [&](int64_t i) { loop(repetitions, registers[i].values); });
  };
  return flops / cpu.time(call, 1, budget).microseconds / 1e6;
}

double read_tbytes(Machine& cpu, ReadLoop loop) {
  constexpr int64_t bytes = int64_t{1} << 28, piece = int64_t{1} << 20;  // several times the caches of most machines
  constexpr int64_t floats = piece / sizeof(float);
  auto* const memory = static_cast<float*>(cpu.allocate(bytes));
  cpu.clear(memory, 0, bytes);
  std::vector<float> sums(bytes / piece);
  auto const call = [&](int, void*) {
    cpu::parallel_for(bytes / piece, [&](int64_t i) { sums[i] = loop(memory + i * floats, floats); });
  };
  double const microseconds = cpu.time(call, 1, budget).microseconds;
  cpu.release();
  return bytes / microseconds / 1e6;
}

}  // namespace

CpuPeak measure_cpu_peak(Machine& cpu) {
  PeakLoops const& loops = chosen_loops();
  return {product_tflops(cpu, loops.float32), product_tflops(cpu, loops.bfloat16),
          loops.bfloat16_dot ? product_tflops(cpu, loops.bfloat16_dot) : 0, read_tbytes(cpu, loops.read)};
}

Json to_json(const CpuPeak& peak) {
  Json::Members members = {{"float32_tflops", peak.float32_tflops}};
  if (peak.bfloat16_tflops > 0) members.emplace_back("bfloat16_tflops", peak.bfloat16_tflops);
  if (peak.bfloat16_dot_tflops > 0) members.emplace_back("bfloat16_dot_tflops", peak.bfloat16_dot_tflops);
  members.emplace_back("read_tbytes_per_second", peak.read_tbytes);
  return Json::object(members);
}

}  // namespace flashcore::bench

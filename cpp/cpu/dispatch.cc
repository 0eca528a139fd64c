// SPDX-License-Identifier: Apache-2.0
// Which instruction set's copy of the kernel runs. The build defines FLASHCORE_CPU_HAS_AVX2, FLASHCORE_CPU_HAS_AVX512,
// FLASHCORE_CPU_HAS_AVX512BF16 and FLASHCORE_CPU_HAS_AVX512AMX as 1 for those that it compiled besides the baseline.
#include <cstdint>
#include <cstdlib>
#include <iterator>
#include <string>
#include <string_view>

#include "cpu/cpu.h"
#include "cpu/isa.h"

#if defined(__x86_64__) || defined(_M_X64)
#define FLASHCORE_CPU_X86 1
#if defined(_MSC_VER)
#include <intrin.h>
#else
#include <cpuid.h>
#endif
#endif
#if defined(__linux__)
#include <sys/syscall.h>
#include <unistd.h>
#endif

#define FLASHCORE_CPU_DECLARE(isa)                                            \
  namespace isa {                                                             \
  void forward_tile(const ForwardParams&, const QueryTile&, Element, float*); \
  }

namespace flashcore::cpu {

FLASHCORE_CPU_DECLARE(baseline)
FLASHCORE_CPU_DECLARE(avx2)
FLASHCORE_CPU_DECLARE(avx512)
FLASHCORE_CPU_DECLARE(avx512bf16)
FLASHCORE_CPU_DECLARE(avx512amx)

namespace {

bool always() { return true; }

#ifdef FLASHCORE_CPU_X86
struct Registers {
  uint32_t eax, ebx, ecx, edx;
};

Registers cpuid(uint32_t leaf, uint32_t subleaf) {
  Registers r{};
#if defined(_MSC_VER)
  int out[4];
  __cpuid(out, 0);
  if (leaf > static_cast<uint32_t>(out[0])) return r;
  __cpuidex(out, static_cast<int>(leaf), static_cast<int>(subleaf));
  r = {static_cast<uint32_t>(out[0]), static_cast<uint32_t>(out[1]), static_cast<uint32_t>(out[2]),
       static_cast<uint32_t>(out[3])};
#else
  if (!__get_cpuid_count(leaf, subleaf, &r.eax, &r.ebx, &r.ecx, &r.edx)) return {};
#endif
  return r;
}

bool has(uint32_t value, uint32_t mask) { return (value & mask) == mask; }

// Whether the operating system saves these parts of the register state (XCR0) when it switches threads.
bool system_saves(uint32_t parts) {
  if (!has(cpuid(1, 0).ecx, 1u << 27)) return false;  // OSXSAVE: XGETBV may be used
#if defined(_MSC_VER)
  return has(static_cast<uint32_t>(_xgetbv(0)), parts);
#else
  uint32_t low, high;
  __asm__("xgetbv" : "=a"(low), "=d"(high) : "c"(0));
  return has(low, parts);
#endif
}

// Bits from Intel's Software Developer's Manual, volume 2A, CPUID.
[[maybe_unused]] bool has_avx2() {
  constexpr uint32_t fma = 1u << 12, avx = 1u << 28, f16c = 1u << 29, avx2 = 1u << 5;
  return has(cpuid(1, 0).ecx, fma | avx | f16c) && has(cpuid(7, 0).ebx, avx2) && system_saves(0x06);  // XMM, YMM
}

[[maybe_unused]] bool has_avx512() {
  constexpr uint32_t f = 1u << 16, dq = 1u << 17, bw = 1u << 30, vl = 1u << 31;
  return has_avx2() && has(cpuid(7, 0).ebx, f | dq | bw | vl) && system_saves(0xe6);  // and masks, ZMM
}

[[maybe_unused]] bool has_avx512bf16() { return has_avx512() && cpuid(7, 0).eax >= 1 && has(cpuid(7, 1).eax, 1u << 5); }

// Tile registers besides. Linux keeps them from a process until it asks (8 KiB more of state for each thread, once it
// uses them, and larger signal stacks: the system refuses where an alternate one in use is too small).
[[maybe_unused]] bool has_avx512amx() {
#if defined(__linux__) && defined(SYS_arch_prctl)
  constexpr uint32_t vbmi = 1u << 1, amx_bf16 = 1u << 22, amx_tile = 1u << 24;
  if (!has_avx512bf16() || !has(cpuid(7, 0).ecx, vbmi) || !has(cpuid(7, 0).edx, amx_bf16 | amx_tile)) return false;
  if (!system_saves(0x60000)) return false;
  constexpr int request_permission = 0x1023, tile_data = 18;  // ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA
  return syscall(SYS_arch_prctl, request_permission, tile_data) == 0;
#else
  return false;
#endif
}
#endif

constexpr Isa isas[] = {
    {"baseline", baseline::forward_tile, always},
#if FLASHCORE_CPU_HAS_AVX2
    {"avx2", avx2::forward_tile, has_avx2},
#endif
#if FLASHCORE_CPU_HAS_AVX512
    {"avx512", avx512::forward_tile, has_avx512},
#endif
#if FLASHCORE_CPU_HAS_AVX512BF16
    {"avx512bf16", avx512bf16::forward_tile, has_avx512bf16},
#endif
#if FLASHCORE_CPU_HAS_AVX512AMX
    {"avx512amx", avx512amx::forward_tile, has_avx512amx},
#endif
};

std::string listed(bool (*wanted)(const Isa&)) {
  std::string names;
  for (const Isa& isa : isas) {
    if (wanted(isa)) names += (names.empty() ? "" : ", ") + std::string(isa.name);
  }
  return names;
}

const Isa& choose() {
  const char* const forced = std::getenv("FLASHCORE_CPU_ISA");
  if (!forced || !*forced) {
    const Isa* best = isas;
    for (const Isa& isa : isas) {
      if (isa.supported()) best = &isa;
    }
    return *best;
  }
  for (const Isa& isa : isas) {
    if (std::string_view(forced) != isa.name) continue;
    if (isa.supported()) return isa;
    throw RuntimeError("FLASHCORE_CPU_ISA: got \"" + std::string(forced) +
                       "\", which this processor does not support; it has " +
                       listed([](const Isa& i) { return i.supported(); }));
  }
  throw RuntimeError("FLASHCORE_CPU_ISA: got \"" + std::string(forced) + "\", expected one of " +
                     listed([](const Isa&) { return true; }));
}

}  // namespace

const Isa& chosen() {
  static const Isa& isa = choose();  // where it throws, the next call tries again
  return isa;
}

std::string chosen_isa() { return chosen().name; }

std::vector<std::string> compiled_isas() {
  std::vector<std::string> names;
  for (const Isa& isa : isas) names.emplace_back(isa.name);
  return names;
}

}  // namespace flashcore::cpu

// SPDX-License-Identifier: Apache-2.0
// What is known of devices: those of this machine, those that can be planned for by name, and this build.
#include <algorithm>
#include <array>
#include <cstdlib>
#include <mutex>
#include <optional>

#include "cpu/cpu.h"
#include "flashcore/flashcore.h"

#if FLASHCORE_HAS_CUDA
#include "core/cuda_check.h"
#endif

namespace flashcore {
namespace {

DeviceProperties gpu(const char* name, int capability, int multiprocessors, int block_kib, int unit_kib, int l2_mib) {
  return {
      name, DeviceType::cuda, capability, multiprocessors, block_kib * 1024, unit_kib * 1024, int64_t{l2_mib} << 20};
}

DeviceProperties this_cpu() { return {"cpu", DeviceType::cpu, 0, cpu::num_threads(), 0, 0, cpu::second_level_cache()}; }

#if FLASHCORE_HAS_CUDA
constexpr int max_devices = 64;

DeviceProperties read_properties(int index) {
  // A named device's choices, run on this one: how the tiles of GPUs with less shared memory are tested.
  if (char const* const name = std::getenv("FLASHCORE_PLAN_AS"); name != nullptr && name[0] != '\0') {
    DeviceProperties const& named = named_device(name);
    if (named.type != DeviceType::cuda)
      throw ValueError("FLASHCORE_PLAN_AS: got \"" + named.name + "\"; expected a GPU");
    return named;
  }
  cudaDeviceProp p;
  cuda_check(cudaGetDeviceProperties(&p, index), "asking for the properties of a CUDA device");
  return {p.name,
          DeviceType::cuda,
          p.major * 10 + p.minor,
          p.multiProcessorCount,
          static_cast<int>(p.sharedMemPerBlockOptin),
          static_cast<int>(p.sharedMemPerMultiprocessor),
          p.l2CacheSize};
}
#endif

}  // namespace

const std::vector<DeviceProperties>& named_devices() {
  // Multiprocessors and shared memory (KiB a block, KiB a multiprocessor) as the CUDA runtime reports them, L2 in MiB.
  static std::vector<DeviceProperties> const devices = {
      gpu("h100", 90, 132, 227, 228, 50),      gpu("h200", 90, 132, 227, 228, 60),
      gpu("a100", 80, 108, 163, 164, 40),      gpu("l4", 89, 58, 99, 100, 48),
      gpu("rtx4090", 89, 128, 99, 100, 72),    gpu("b200", 100, 148, 227, 228, 126),
      {"cpu", DeviceType::cpu, 0, 1, 0, 0, 0},
  };
  return devices;
}

const DeviceProperties& named_device(const std::string& name) {
  std::string known;
  for (auto const& device : named_devices()) {
    if (device.name == name) return device;
    known += (known.empty() ? "\"" : ", \"") + device.name + "\"";
  }
  throw ValueError("device: got \"" + name + "\"; expected one of " + known);
}

int cuda_device_count() {
#if FLASHCORE_HAS_CUDA
  int count = 0;
  if (cudaGetDeviceCount(&count) != cudaSuccess) {
    cudaGetLastError();
    return 0;
  }
  return count;
#else
  return 0;
#endif
}

const DeviceProperties& device_properties(Device device) {
  if (device.type == DeviceType::cpu) {
    thread_local DeviceProperties properties;  // the number of threads may change between calls
    properties = this_cpu();
    return properties;
  }
#if FLASHCORE_HAS_CUDA
  static std::array<std::optional<DeviceProperties>, max_devices> cache;
  static std::array<std::once_flag, max_devices> read;
  if (device.index < 0 || device.index >= max_devices) throw RuntimeError("there is no device " + to_string(device));
  std::call_once(read[device.index], [&] { cache[device.index] = read_properties(device.index); });
  return *cache[device.index];
#else
  throw RuntimeError("this build of FlashCore has no CUDA code, and the arrays are on " + to_string(device) +
                     ": install it without FLASHCORE_CUDA=OFF");
#endif
}

const char* version() { return FLASHCORE_VERSION; }

BuildInfo build_info() {
  BuildInfo info;
  info.cpu_isas = cpu::compiled_isas();
  info.cpu_isa = cpu::chosen_isa();
#if FLASHCORE_HAS_CUDA
  info.cuda = true;
  std::string const archs = FLASHCORE_CUDA_ARCHS;
  for (size_t begin = 0; begin < archs.size();) {
    size_t const end = std::min(archs.find(',', begin), archs.size());
    info.cuda_archs.push_back(archs.substr(begin, end - begin));
    begin = end + 1;
  }
  cudaRuntimeGetVersion(&info.cuda_runtime_version);
  cudaDriverGetVersion(&info.cuda_driver_version);
  int count = 0;
  try {
    cuda_check(cudaGetDeviceCount(&count), "looking for CUDA devices");
  } catch (const RuntimeError& error) {
    info.cuda_problem = info.cuda_driver_version == 0 ? "no NVIDIA driver is installed" : error.what();
  }
#endif
  return info;
}

int num_threads() { return cpu::num_threads(); }
void set_num_threads(int threads) { cpu::set_num_threads(threads); }

}  // namespace flashcore

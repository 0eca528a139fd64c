// SPDX-License-Identifier: Apache-2.0
// The merge of the parts that the sm80 decode kernel's schedule makes.
#include "sm80/decode_merge.cuh"

#include <array>
#include <atomic>

namespace flashcore::sm80 {
namespace {

// The parts of an item, from the schedule.
struct FindScheduled {
  __device__ __forceinline__ DecodeSchedule::Parts operator()(DecodeParams const& p, int sequence, int line,
                                                              int lane) const {
    LineScan const scan(p, lane);
    int const units = p.schedule.item(p, sequence).units;
    int64_t const first = scan.units_before(p, sequence) * p.schedule.lines + int64_t{line} * units;
    return p.schedule.parts(scan.total(p), first, units);
  }
};

// Whether this device runs code that was compiled for 9.0, which has the instructions of a dependent launch; elsewhere
// (and where the driver compiles PTX of 8.0) the merge is an ordinary launch.
template <class Kernel>
bool launches_dependents(Kernel kernel) {
  constexpr int most_devices = 64;
  static std::array<std::atomic<int8_t>, most_devices> known{};  // 0: not asked yet, 1: no, 2: yes
  int device = 0;
  cuda_check(cudaGetDevice(&device), "asking for the current CUDA device");
  std::atomic<int8_t>& here = known[static_cast<size_t>(device % most_devices)];
  if (int8_t const answer = here.load(std::memory_order_relaxed); answer != 0) return answer == 2;
  cudaFuncAttributes attributes{};
  cuda_check(cudaFuncGetAttributes(&attributes, kernel), "preparing the merge of the decode kernel");
  bool const answer = attributes.ptxVersion >= 90;
  here.store(answer ? 2 : 1, std::memory_order_relaxed);
  return answer;
}

template <class Element>
void merge(DecodeParams const& params, cudaStream_t stream) {
  launch_merge<Element>(params, FindScheduled{}, launches_dependents(merge_kernel<Element, FindScheduled>), stream);
}

}  // namespace

void merge_parts(DecodeParams const& params, DType dtype, cudaStream_t stream) {
  dtype == float16 ? merge<__half>(params, stream) : merge<__nv_bfloat16>(params, stream);
}

}  // namespace flashcore::sm80

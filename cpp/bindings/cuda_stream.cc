// SPDX-License-Identifier: Apache-2.0
// Streams, events and stream-ordered memory through the CUDA runtime, or errors that say it is not there.
#include "cuda_stream.h"

#include <string>

#include "flashcore/error.h"

#if FLASHCORE_HAS_CUDA
#include <cuda_runtime_api.h>

#include <map>
#include <mutex>
#endif

namespace flashcore::cuda {

#if FLASHCORE_HAS_CUDA

namespace {

void check(cudaError_t status, const char* what) {
  if (status == cudaSuccess) return;
  cudaGetLastError();  // so that the next launch does not report it again
  throw RuntimeError(std::string(what) + ": " + cudaGetErrorString(status));
}

// Makes a device current and restores the one before.
class DeviceGuard {
 public:
  explicit DeviceGuard(int device) {
    check(cudaGetDevice(&previous_), "asking for the current CUDA device");
    if (previous_ != device) check(cudaSetDevice(device), "making the arrays' CUDA device current");
    changed_ = previous_ != device;
  }
  ~DeviceGuard() {
    if (changed_) cudaSetDevice(previous_);
  }
  DeviceGuard(const DeviceGuard&) = delete;
  DeviceGuard& operator=(const DeviceGuard&) = delete;

 private:
  int previous_ = 0;
  bool changed_ = false;
};

cudaStream_t stream_of(void* stream) { return static_cast<cudaStream_t>(stream); }
cudaEvent_t event_of(void* event) { return static_cast<cudaEvent_t>(event); }

}  // namespace

int current_device() {
  int device = 0;
  check(cudaGetDevice(&device), "asking for the current CUDA device");
  return device;
}

Event::Event(int device, void* stream) : device_(device) {
  DeviceGuard guard(device);
  cudaEvent_t event = nullptr;
  check(cudaEventCreateWithFlags(&event, cudaEventDisableTiming), "creating a CUDA event");
  event_ = event;
  cudaError_t const status = cudaEventRecord(event, stream_of(stream));
  if (status != cudaSuccess) cudaEventDestroy(event);
  check(status, "recording a CUDA event");
}

Event::~Event() { cudaEventDestroy(event_of(event_)); }

bool Event::completed() const {
  cudaError_t const status = cudaEventQuery(event_of(event_));
  if (status == cudaErrorNotReady) cudaGetLastError();
  return status != cudaErrorNotReady;  // an error means that nothing will read the memory any more
}

void Event::synchronize() const { cudaEventSynchronize(event_of(event_)); }

void Event::hold(void* stream) const {
  DeviceGuard guard(device_);
  check(cudaStreamWaitEvent(stream_of(stream), event_of(event_), 0), "making a stream wait for FlashCore's result");
}

void* own_stream(int device) {
  static std::mutex mutex;
  static auto& streams = *new std::map<int, cudaStream_t>;  // never destroyed: the driver may be gone by then
  std::lock_guard lock(mutex);
  if (auto const found = streams.find(device); found != streams.end()) return found->second;
  DeviceGuard guard(device);
  cudaStream_t stream = nullptr;
  check(cudaStreamCreateWithFlags(&stream, cudaStreamNonBlocking), "creating a CUDA stream");
  streams.emplace(device, stream);
  return stream;
}

void order(int device, void* stream, void* waiter) { Event(device, stream).hold(waiter); }

void* allocate(int device, size_t bytes, void* stream) {
  DeviceGuard guard(device);
  void* data = nullptr;
  cudaError_t const status = cudaMallocAsync(&data, bytes, stream_of(stream));
  if (status == cudaErrorMemoryAllocation) {
    cudaGetLastError();
    throw RuntimeError("out of memory on cuda:" + std::to_string(device) + ": the result needs " +
                       std::to_string(bytes) + " bytes; free memory there, or let the framework reserve less of it");
  }
  check(status, "allocating the result");
  return data;
}

void release(int device, void* data, void* stream) noexcept {
  int previous = 0;
  if (cudaGetDevice(&previous) != cudaSuccess) return;  // the driver is shutting down, and the memory with it
  if (previous != device) cudaSetDevice(device);
  if (cudaFreeAsync(data, stream_of(stream)) != cudaSuccess) cudaGetLastError();
  if (previous != device) cudaSetDevice(previous);
}

#else

namespace {

[[noreturn]] void not_built() {
  throw RuntimeError(
      "this FlashCore was built without CUDA (FLASHCORE_CUDA=OFF): move the arrays to the CPU, or install a "
      "build with CUDA");
}

}  // namespace

Event::Event(int device, void* /*stream*/) : device_(device) { not_built(); }
Event::~Event() = default;
bool Event::completed() const { return true; }
void Event::synchronize() const {}
void Event::hold(void* /*stream*/) const {}

int current_device() { not_built(); }
void* own_stream(int /*device*/) { not_built(); }
void order(int /*device*/, void* /*stream*/, void* /*waiter*/) { not_built(); }
void* allocate(int /*device*/, size_t /*bytes*/, void* /*stream*/) { not_built(); }
void release(int /*device*/, void* /*data*/, void* /*stream*/) noexcept {}

#endif

}  // namespace flashcore::cuda

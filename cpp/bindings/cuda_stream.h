// SPDX-License-Identifier: Apache-2.0
// What the bindings need of the CUDA runtime: streams, events and stream-ordered memory. Without CUDA in the build
// every function that could not do its work throws RuntimeError.
#pragma once

#include <cstddef>
#include <memory>

namespace flashcore::cuda {

// The legacy default stream by a handle of its own: 0 would mean the per-thread one in a build that asks for that.
inline void* legacy_stream() { return reinterpret_cast<void*>(1); }
inline void* per_thread_stream() { return reinterpret_cast<void*>(2); }

// The calling thread's current device.
int current_device();

// A point in the work of a stream.
class Event {
 public:
  // Records what has been issued to `stream` of `device` so far.
  Event(int device, void* stream);
  ~Event();
  Event(const Event&) = delete;
  Event& operator=(const Event&) = delete;

  bool completed() const;
  void synchronize() const;
  // Makes later work of `stream` (of any device) wait.
  void hold(void* stream) const;

 private:
  int device_;
  void* event_ = nullptr;
};

// The stream of ours on `device`, for frameworks that have none. It does not synchronize with the legacy default
// stream.
void* own_stream(int device);

// Makes later work of `waiter` wait for what has been issued to `stream` so far; both of `device`.
void order(int device, void* stream, void* waiter);

// Device memory whose life is ordered by `stream`.
void* allocate(int device, size_t bytes, void* stream);
void release(int device, void* data, void* stream) noexcept;

}  // namespace flashcore::cuda

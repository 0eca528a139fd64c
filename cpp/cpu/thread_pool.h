// SPDX-License-Identifier: Apache-2.0
// A small pool of threads: one loop at a time, its iterations handed out one by one. No OpenMP runtime: that is neither
// safe after fork nor quiet under ThreadSanitizer, and a second one beside torch's would oversubscribe the processor.
#pragma once

#include <cstdint>
#include <type_traits>

namespace flashcore::cpu {

// Calls body(context, i) for every i in [0, count), in no particular order, on up to num_threads() threads, of which
// the caller's is one, and returns when all are done. Loops of several callers take turns, so that together they use no
// more threads than one; a loop inside a loop runs on its own thread. The first exception that a body throws ends the
// loop and is thrown here.
void parallel_for(int64_t count, void (*body)(void*, int64_t), void* context);

template <typename Body>
void parallel_for(int64_t count, Body&& body) {
  using Plain = std::remove_reference_t<Body>;
  parallel_for(count, [](void* context, int64_t i) { (*static_cast<Plain*>(context))(i); }, &body);
}

}  // namespace flashcore::cpu

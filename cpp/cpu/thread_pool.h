// SPDX-License-Identifier: Apache-2.0
// A small pool of threads: one loop at a time, its iterations handed out as threads are free. No OpenMP runtime: that
// is neither safe after fork nor quiet under ThreadSanitizer, and a second one beside torch's would oversubscribe the
// processor.
#pragma once

#include <cstdint>
#include <type_traits>

namespace flashcore::cpu {

// In which order iterations are handed out: the first ones first, to whoever is free; or to each thread as many
// neighbours, in order, and then what the others have left.
enum class HandOut { one_by_one, in_runs };

// Calls body(context, i) for every i in [0, count), in no particular order, on up to num_threads() threads, of which
// the caller's is one, and returns when all are done. Loops of several callers take turns, so that together they use no
// more threads than one; a loop inside a loop runs on its own thread. The first exception that a body throws ends the
// loop and is thrown here.
void parallel_for(int64_t count, void (*body)(void*, int64_t), void* context, HandOut hand_out = HandOut::one_by_one);

template <typename Body>
void parallel_for(int64_t count, Body&& body, HandOut hand_out = HandOut::one_by_one) {
  using Plain = std::remove_reference_t<Body>;
  parallel_for(count, [](void* context, int64_t i) { (*static_cast<Plain*>(context))(i); }, &body, hand_out);
}

}  // namespace flashcore::cpu

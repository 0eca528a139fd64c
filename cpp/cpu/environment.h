// SPDX-License-Identifier: Apache-2.0
// The floating-point environment of a task. A caller may have asked for subnormals to be flushed to zero
// (torch.set_flush_denormal) on its own thread, and the same call must give the same bits whichever thread takes a
// task.
#pragma once

#if defined(__x86_64__) || defined(_M_X64)
#include <xmmintrin.h>

namespace flashcore::cpu {

class DefaultFloats {
 public:
  DefaultFloats() : saved_(_mm_getcsr()) { _mm_setcsr(0x1f80); }  // round to nearest, subnormals kept, no traps
  ~DefaultFloats() { _mm_setcsr(saved_); }
  DefaultFloats(const DefaultFloats&) = delete;
  DefaultFloats& operator=(const DefaultFloats&) = delete;

 private:
  unsigned saved_;
};

}  // namespace flashcore::cpu
#else
namespace flashcore::cpu {

struct DefaultFloats {
  DefaultFloats() {}
};

}  // namespace flashcore::cpu
#endif

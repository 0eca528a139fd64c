// SPDX-License-Identifier: Apache-2.0
// The processor's caches, as the system tells them.
#include "cpu/cpu.h"

#if defined(__linux__)
#include <unistd.h>
#endif

namespace flashcore::cpu {

int64_t second_level_cache() {
#if defined(_SC_LEVEL2_CACHE_SIZE)
  static int64_t const bytes = sysconf(_SC_LEVEL2_CACHE_SIZE);
  return bytes > 0 ? bytes : 0;
#else
  return 0;
#endif
}

}  // namespace flashcore::cpu

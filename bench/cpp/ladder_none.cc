// SPDX-License-Identifier: Apache-2.0
// The command ladder in a build without CUDA.
#include "commands.h"

namespace flashcore::bench {

int ladder(const Options&) {
  gpu_machine();  // throws, and says why
  return 2;
}

}  // namespace flashcore::bench

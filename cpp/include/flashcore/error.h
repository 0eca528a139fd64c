// SPDX-License-Identifier: Apache-2.0
// The errors FlashCore throws. Each text names the argument, what it got and what was expected.
#pragma once

#include <stdexcept>
#include <string>

namespace flashcore {

// Not an array, or an array of a dtype that the function does not take. TypeError in Python.
struct TypeError : std::invalid_argument {
  using std::invalid_argument::invalid_argument;
};

// Wrong shape, stride, alignment, range, or arrays on different devices. ValueError in Python.
struct ValueError : std::invalid_argument {
  using std::invalid_argument::invalid_argument;
};

// The machine cannot do it: no code for this GPU, a driver too old, out of memory. RuntimeError in Python.
struct RuntimeError : std::runtime_error {
  using std::runtime_error::runtime_error;
};

}  // namespace flashcore

// SPDX-License-Identifier: Apache-2.0
// Python arguments that are no arrays, as the fields of a Problem. Only their types are judged here; validate() judges
// values.
#pragma once

#include <nanobind/nanobind.h>

#include <cstdint>
#include <optional>
#include <string>

#include "flashcore/kvcache.h"
#include "flashcore/problem.h"

namespace flashcore {

namespace nb = nanobind;

// The options that attention, attention_varlen and plan share, as they came.
struct Options {
  nb::handle causal, window, scale, softcap, batch_invariant, backend;
};

void set_options(Problem& problem, const Options& options);

Layout layout_from(nb::handle layout);
DType dtype_from(nb::handle dtype);
bool bool_from(const char* name, nb::handle value);
int64_t integer_from(const char* name, nb::handle value);
std::optional<int64_t> optional_integer_from(const char* name, nb::handle value);

// The repr of a value for an error, cut where it is long.
std::string got(nb::handle value);

}  // namespace flashcore

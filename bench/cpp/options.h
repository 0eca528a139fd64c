// SPDX-License-Identifier: Apache-2.0
// The command line of flashcore_bench.
#pragma once

#include <stdexcept>
#include <string>

#include "case.h"

namespace flashcore::bench {

// What the user asked for cannot be: the text says which option and what was expected. Exit status 2.
struct UsageError : std::runtime_error {
  using std::runtime_error::runtime_error;
};

struct Options {
  std::string command;                      // "ladder", "attention", "sweep", "peak"; "help"
  Case problem{.heads = 8, .seqlen = 512};  // of ladder and attention
  std::string suite;                        // of sweep: "forward", "small", "decode"
  std::string only;                         // of ladder: a rung, or empty for all
  bool check = false;                       // of ladder: run and check each once, without timing
  Budget budget;
  double rotate = 0;  // bytes of arrays
  uint64_t seed = 1;
  std::string json;  // file, or empty
  std::string commit = "unknown";
};

// Throws UsageError.
Options parse(int argc, char** argv);

extern const char* const usage;

}  // namespace flashcore::bench

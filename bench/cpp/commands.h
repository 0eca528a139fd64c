// SPDX-License-Identifier: Apache-2.0
// The commands of flashcore_bench. Each prints its results once all of them are there, and returns the exit status.
#pragma once

#include "options.h"

namespace flashcore::bench {

int ladder(const Options& options);     // ladder.cc
int attention(const Options& options);  // attention.cc
int sweep(const Options& options);      // attention.cc
int peak(const Options& options);       // peak.cc

// Whether a command runs on the CPU: where --backend says so, or says nothing and there is no GPU.
bool on_cpu(Backend backend);

// What every result file begins with: kind, date, commit, and the machine's facts.
Json report(const char* kind, const Options& options, const Machine& machine);
// Writes it where --json says, if it does. Throws RuntimeError.
void write(const Options& options, const Json& report);

// One line on standard error, written over the one before where that is a terminal. Empty: takes the line away.
void progress(const std::string& text);

// Rows of cells as columns, the first column to the left and the last one too, the others to the right.
std::string table(const std::vector<std::vector<std::string>>& rows);

// printf's formats, as a string.
std::string format(const char* text, double value);

}  // namespace flashcore::bench

// SPDX-License-Identifier: Apache-2.0
// flashcore_bench: FlashCore timed and checked without Python. `flashcore_bench help` tells its commands.
#include <cstdio>

#include "commands.h"

namespace bench = flashcore::bench;

int main(int argc, char** argv) {
  try {
    bench::Options const options = bench::parse(argc, argv);
    if (options.command == "ladder") return bench::ladder(options);
    if (options.command == "attention") return bench::attention(options);
    if (options.command == "sweep") return bench::sweep(options);
    if (options.command == "peak") return bench::peak(options);
    std::fputs(bench::usage, stdout);
    return 0;
  } catch (const bench::UsageError& error) {
    bench::progress("");
    std::fprintf(stderr, "flashcore_bench: %s\nflashcore_bench help tells the options.\n", error.what());
    return 2;
  } catch (const bench::NoGpu& error) {
    std::fprintf(stderr, "flashcore_bench: %s\n", error.what());
    return 2;
  } catch (const std::exception& error) {
    bench::progress("");
    std::fprintf(stderr, "flashcore_bench: %s\n", error.what());
    return 1;
  }
}

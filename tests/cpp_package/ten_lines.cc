// SPDX-License-Identifier: Apache-2.0
// One query that sees two equal keys gets the mean of their values: prints 2.
#include <flashcore/flashcore.h>

#include <cstdio>

int main() {
  float query[] = {1}, keys[] = {1, 1}, values[] = {1, 3}, out[] = {0};
  auto tensor = [](float* data, int64_t rows) {
    return flashcore::Tensor{data, flashcore::float32, {}, false, 4, {1, rows, 1, 1}, {rows, 1, 1, 1}};
  };
  flashcore::attention(
      {.query = tensor(query, 1), .key = tensor(keys, 2), .value = tensor(values, 2), .out = tensor(out, 1)});
  std::printf("%g\n", out[0]);
}

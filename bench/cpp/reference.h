// SPDX-License-Identifier: Apache-2.0
// The numeric standard on the host: attention of sampled rows in float64, and what a kernel's error may be.
//
// The yardstick is an emulation of a good flash kernel on the same rows: the online softmax in float32 over tiles of
// 128 keys, weights rounded to the dtype before the second product, sums not rounded, the output rounded. A kernel
// passes when its largest error is at most twice the yardstick's plus 1e-5, and its relative Frobenius error at
// most 1.25 times the yardstick's plus 1e-6.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

#include "case.h"

namespace flashcore::bench {

struct Errors {
  double largest = 0, relative = 0;
};

class Reference {
 public:
  // Of the arrays' set 0. Up to `heads` (sequence, head) pairs, the first and the last among them; of each all rows
  // where that is little work, else at least 64, the first and the last among them.
  Reference(const Case& c, const Arrays& arrays, int64_t heads);

  // Of an output's elements on the host, in the case's dtype.
  Errors errors(const std::vector<char>& out) const;
  // Empty when they are within the standard, else what is wrong.
  std::string problem(const Errors& errors) const;

  double allowed() const { return 2 * yardstick_.largest + 1e-5; }
  double allowed_relative() const { return 1.25 * yardstick_.relative + 1e-6; }
  int64_t rows() const { return static_cast<int64_t>(rows_.size()); }

 private:
  template <class Element>
  void compute(const Arrays& arrays);

  struct Row {
    int64_t sequence, head, query;
  };
  Errors against(const std::vector<float>& out) const;

  Case case_;
  std::vector<Row> rows_;
  std::vector<double> exact_;  // (rows, head_dim)
  Errors yardstick_;
};

}  // namespace flashcore::bench

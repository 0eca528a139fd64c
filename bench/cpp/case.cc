// SPDX-License-Identifier: Apache-2.0
// Problems of the benchmark and their arrays.
#include "case.h"

#include <algorithm>
#include <cmath>
#include <numeric>
#include <sstream>

namespace flashcore::bench {
namespace {

int64_t elements(const Tensor& t) {
  return std::accumulate(t.shape, t.shape + t.ndim, int64_t{1}, std::multiplies<int64_t>());
}

Tensor contiguous(void* data, DType dtype, Device device, std::vector<int64_t> const& shape) {
  Tensor t{.data = data, .dtype = dtype, .device = device, .ndim = static_cast<int>(shape.size())};
  int64_t stride = 1;
  for (int i = t.ndim - 1; i >= 0; --i) {
    t.shape[i] = shape[i];
    t.stride[i] = stride;
    stride *= shape[i];
  }
  return t;
}

std::string short_name(DType dtype) { return dtype == float16 ? "fp16" : dtype == bfloat16 ? "bf16" : "fp32"; }

}  // namespace

int64_t Case::total_q() const {
  return varlen.empty() ? batch * seqlen : std::accumulate(varlen.begin(), varlen.end(), int64_t{0});
}
int64_t Case::total_k() const { return varlen.empty() ? batch * keys() : total_q(); }

double Case::flops() const {
  double seen = 0;
  for (Sequence const& s : sequences(*this)) {
    double const all = static_cast<double>(s.queries) * static_cast<double>(s.keys);
    if (!window_left && !window_right) {
      seen += causal ? all / 2 : all;
      continue;
    }
    for (int64_t i = 0; i < s.queries; ++i) {
      int64_t const position = i + s.keys - s.queries;
      int64_t const right = causal ? 0 : window_right.value_or(s.keys);
      int64_t const first = std::max<int64_t>(0, window_left ? position - *window_left : 0);
      seen += static_cast<double>(std::max<int64_t>(0, std::min(s.keys - 1, position + right) + 1 - first));
    }
  }
  return 4.0 * static_cast<double>(head_dim * heads) * seen;
}

std::string Case::label() const {
  std::ostringstream text;
  auto const pair = [&](int64_t n, int64_t other) -> std::ostream& {
    text << n;
    return other ? text << '/' << other : text;
  };
  text << batch << ", ";
  pair(heads, heads_k) << ", ";
  pair(seqlen, seqlen_k) << ", " << head_dim << ' ' << short_name(dtype);
  if (!varlen.empty()) text << " varlen";
  if (causal) text << " causal";
  if (window_left || window_right) {
    auto const side = [](std::optional<int64_t> n) { return n ? std::to_string(*n) : std::string("all"); };
    text << " window (" << side(window_left) << ", " << side(window_right) << ')';
  }
  return text.str();
}

Json::Members Case::to_json() const {
  Json lengths = Json::array();
  for (int64_t const n : varlen) lengths.append(n);
  Json::Members members = {{"label", label()},   {"batch", batch},       {"heads", heads},
                           {"seqlen", seqlen},   {"head_dim", head_dim}, {"heads_k", kv_heads()},
                           {"seqlen_k", keys()}, {"lengths", lengths},   {"dtype", to_string(dtype)},
                           {"causal", causal}};
  if (window_left) members.emplace_back("window_left", *window_left);
  if (window_right) members.emplace_back("window_right", *window_right);
  if (scale) members.emplace_back("scale", *scale);
  if (softcap != 0) members.emplace_back("softcap", softcap);
  return members;
}

std::vector<Sequence> sequences(const Case& c) {
  std::vector<Sequence> all;
  for (int64_t b = 0, begin = 0; b < c.batch; ++b) {
    if (c.varlen.empty()) {
      all.push_back({b * c.seqlen, c.seqlen, b * c.keys(), c.keys()});
    } else {
      all.push_back({begin, c.varlen[b], begin, c.varlen[b]});
      begin += c.varlen[b];
    }
  }
  return all;
}

Arrays::Arrays(Machine& machine, const Case& c, double rotate, uint64_t seed) : machine_(machine) {
  int const count = std::clamp(static_cast<int>(std::ceil(rotate / c.bytes())), 1, 1024);
  Device const device = machine.device();
  std::vector<int64_t> q_shape, k_shape;
  if (c.varlen.empty()) {
    q_shape = {c.batch, c.seqlen, c.heads, c.head_dim};
    k_shape = {c.batch, c.keys(), c.kv_heads(), c.head_dim};
  } else {
    q_shape = {c.total_q(), c.heads, c.head_dim};
    k_shape = {c.total_k(), c.kv_heads(), c.head_dim};
  }
  Tensor starts;
  if (!c.varlen.empty()) {
    std::vector<int32_t> offsets = {0};
    for (int64_t const n : c.varlen) offsets.push_back(offsets.back() + static_cast<int32_t>(n));
    starts = contiguous(machine.allocate(4 * offsets.size()), int32, device, {static_cast<int64_t>(offsets.size())});
    machine.write(starts.data, offsets.data(), 4 * offsets.size());
  }
  auto const array = [&](std::vector<int64_t> const& shape) {
    Tensor t = contiguous(nullptr, c.dtype, device, shape);
    t.data = machine.allocate(elements(t) * c.dtype.bytes());
    return t;
  };
  for (int i = 0; i < count; ++i) {
    Problem p;
    p.query = array(q_shape);
    p.key = array(k_shape);
    p.value = array(k_shape);
    p.out = array(q_shape);
    if (!c.varlen.empty()) {
      p.cu_seqlens_q = p.cu_seqlens_k = starts;
      p.max_seqlen_q = p.max_seqlen_k = c.seqlen;
    }
    p.causal = c.causal;
    p.window_left = c.window_left;
    p.window_right = c.window_right;
    p.scale = c.scale;
    p.softcap = c.softcap;
    p.backend = c.backend;
    uint64_t const base = (seed * 1024 + i) * 4;
    machine.fill(p.query.data, c.dtype, c.query_elements(), base, c.head_dim);
    machine.fill(p.key.data, c.dtype, c.key_elements(), base + 1, 0);
    machine.fill(p.value.data, c.dtype, c.key_elements(), base + 2, 0);
    machine.clear(p.out.data, 0xff, c.query_elements() * c.dtype.bytes());
    problems_.push_back(p);
  }
}

Problem Arrays::problem(int set, void* stream) const {
  Problem p = problems_[set];
  p.stream = stream;
  return p;
}

std::vector<char> Arrays::host(const Tensor& t) const {
  std::vector<char> bytes(elements(t) * t.dtype.bytes());
  machine_.read(bytes.data(), t.data, bytes.size());
  return bytes;
}

void Arrays::poison() {
  Tensor const& t = problems_[0].out;
  machine_.clear(t.data, 0xff, elements(t) * t.dtype.bytes());
}

}  // namespace flashcore::bench

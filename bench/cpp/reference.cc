// SPDX-License-Identifier: Apache-2.0
// Attention in float64, and its emulation in float32, of sampled rows on all processors.
#include "reference.h"

#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstring>
#include <limits>
#include <set>
#include <thread>

#include "attention/mask.h"
#include "cpu/element.h"
#include "random.h"

namespace flashcore::bench {
namespace {

constexpr int64_t sampled_rows = 64;
constexpr double little_work = 1.2e9;  // multiplications
constexpr int64_t tile = 128;          // keys of the emulation

template <class Element>
float rounded(float x) {
  Element y;
  cpu::from_float(x, y);
  return cpu::to_float(y);
}

// Eight sums, so that the compiler can keep them in one vector.
template <class Real>
Real dot(const float* a, const float* b, int64_t n) {
  Real sums[8] = {};
  int64_t i = 0;
  for (; i + 8 <= n; i += 8) {
    for (int j = 0; j < 8; ++j) sums[j] += static_cast<Real>(a[i + j]) * static_cast<Real>(b[i + j]);
  }
  for (; i < n; ++i) sums[0] += static_cast<Real>(a[i]) * static_cast<Real>(b[i]);
  return ((sums[0] + sums[1]) + (sums[2] + sums[3])) + ((sums[4] + sums[5]) + (sums[6] + sums[7]));
}

// One row: softmax(scores) · V over `keys` keys. `weigh` is what a weight becomes before the second product.
template <class Real, class Weigh>
void attend(const std::vector<Real>& scores, const float* v, int64_t stride, int64_t head_dim, int64_t tile_keys,
            Weigh weigh, Real* out) {
  auto const keys = static_cast<int64_t>(scores.size());
  Real top = -std::numeric_limits<Real>::infinity(), sum = 0;
  std::fill_n(out, head_dim, Real{0});
  for (int64_t begin = 0; begin < keys; begin += tile_keys) {
    int64_t const end = std::min(keys, begin + tile_keys);
    Real const new_top = std::max(top, *std::max_element(scores.begin() + begin, scores.begin() + end));
    Real const shrink = std::exp(top - new_top);
    sum *= shrink;
    for (int64_t d = 0; d < head_dim; ++d) out[d] *= shrink;
    top = new_top;
    for (int64_t key = begin; key < end; ++key) {
      Real const weight = std::exp(scores[key] - top);
      sum += weight;
      Real const factor = weigh(weight);
      for (int64_t d = 0; d < head_dim; ++d) out[d] += factor * static_cast<Real>(v[key * stride + d]);
    }
  }
  for (int64_t d = 0; d < head_dim; ++d) out[d] = keys > 0 ? out[d] / sum : Real{0};
}

// Places of `wanted` of `count` things, the first and the last among them, the others at random.
std::vector<int64_t> sample(int64_t count, int64_t wanted, uint64_t seed) {
  std::set<int64_t> chosen;
  if (wanted >= count) {
    for (int64_t i = 0; i < count; ++i) chosen.insert(i);
  } else {
    chosen = {0, count - 1};
    for (uint64_t i = 0; static_cast<int64_t>(chosen.size()) < wanted; ++i) {
      chosen.insert(static_cast<int64_t>(scramble(seed * 0x10001 + i) % static_cast<uint64_t>(count)));
    }
  }
  return {chosen.begin(), chosen.end()};
}

template <class Element>
std::vector<float> widened(const std::vector<char>& bytes) {
  std::vector<float> x(bytes.size() / sizeof(Element));
  for (size_t i = 0; i < x.size(); ++i) {
    Element e;
    std::memcpy(&e, bytes.data() + i * sizeof e, sizeof e);
    x[i] = cpu::to_float(e);
  }
  return x;
}

std::vector<float> widened(const std::vector<char>& bytes, DType dtype) {
  return dtype == float16    ? widened<cpu::Half>(bytes)
         : dtype == bfloat16 ? widened<cpu::BFloat>(bytes)
                             : widened<float>(bytes);
}

}  // namespace

Reference::Reference(const Case& c, const Arrays& arrays, int64_t heads) : case_(c) {
  auto const all = sequences(c);
  auto const pairs = sample(static_cast<int64_t>(all.size()) * c.heads, std::max<int64_t>(heads, 2), 1);
  for (int64_t const pair : pairs) {
    Sequence const& s = all[pair / c.heads];
    if (s.queries == 0) continue;
    double const row_work = 2.0 * static_cast<double>(c.head_dim * std::max<int64_t>(s.keys, 1));
    auto const wanted = static_cast<int64_t>(little_work / row_work) / static_cast<int64_t>(pairs.size());
    for (int64_t const query : sample(s.queries, std::max(wanted, sampled_rows), 2 + static_cast<uint64_t>(pair))) {
      rows_.push_back({pair / c.heads, pair % c.heads, query});
    }
  }
  if (c.dtype == float16)
    compute<cpu::Half>(arrays);
  else if (c.dtype == bfloat16)
    compute<cpu::BFloat>(arrays);
  else
    compute<float>(arrays);
}

template <class Element>
void Reference::compute(const Arrays& arrays) {
  Case const& c = case_;
  std::vector<float> const q = widened<Element>(arrays.query()), k = widened<Element>(arrays.key()),
                           v = widened<Element>(arrays.value());
  auto const all = sequences(c);
  int64_t const d = c.head_dim, stride = c.kv_heads() * d;
  double const scale = c.scale.value_or(1.0 / std::sqrt(static_cast<double>(d)));
  auto const bound = [](std::optional<int64_t> n) {
    return static_cast<int>(std::min<int64_t>(n.value_or(unlimited), unlimited));
  };
  exact_.resize(rows_.size() * d);
  std::vector<float> emulated(rows_.size() * d);

  std::atomic<size_t> next = 0;
  auto const work = [&] {
    std::vector<double> scores, output(d);
    std::vector<float> scores32, output32(d);
    for (size_t r; (r = next++) < rows_.size();) {
      Row const& row = rows_[r];
      Sequence const& s = all[row.sequence];
      auto const mask = Mask::make(static_cast<int>(s.queries), static_cast<int>(s.keys), bound(c.window_left),
                                   c.causal ? 0 : bound(c.window_right));
      int const first = mask.first_key(static_cast<int>(row.query)), end = mask.end_key(static_cast<int>(row.query));
      scores.clear();
      scores32.clear();
      float const* const query = q.data() + ((s.q_begin + row.query) * c.heads + row.head) * d;
      int64_t const offset = (s.k_begin + first) * stride + row.head / (c.heads / c.kv_heads()) * d;
      for (int64_t key = first; key < end; ++key) {
        float const* const keys = k.data() + offset + (key - first) * stride;
        double x = dot<double>(query, keys, d) * scale;
        float y = dot<float>(query, keys, d) * static_cast<float>(scale);
        if (c.softcap != 0) {
          x = c.softcap * std::tanh(x / c.softcap);
          y = static_cast<float>(c.softcap) * std::tanh(y / static_cast<float>(c.softcap));
        }
        scores.push_back(x);
        scores32.push_back(y);
      }
      float const* const values = v.data() + offset;
      attend(scores, values, stride, d, s.keys + 1, [](double x) { return x; }, output.data());
      attend(scores32, values, stride, d, tile, rounded<Element>, output32.data());
      for (int64_t i = 0; i < d; ++i) {
        exact_[r * d + i] = output[i];
        emulated[r * d + i] = rounded<Element>(output32[i]);
      }
    }
  };
  {
    std::vector<std::jthread> threads;
    for (int i = 0; i < num_threads(); ++i) threads.emplace_back(work);
  }
  yardstick_ = against(emulated);
}

Errors Reference::against(const std::vector<float>& out) const {
  Errors errors;
  double squares = 0, all = 0;
  for (size_t i = 0; i < exact_.size(); ++i) {
    double const difference = out[i] - exact_[i];
    if (!(std::abs(difference) <= errors.largest)) errors.largest = std::abs(difference);  // a NaN stays
    if (std::isnan(errors.largest)) break;
    squares += difference * difference;
    all += exact_[i] * exact_[i];
  }
  errors.relative = std::isnan(errors.largest) ? errors.largest
                    : all > 0                  ? std::sqrt(squares / all)
                                               : std::sqrt(squares);
  return errors;
}

Errors Reference::errors(const std::vector<char>& out) const {
  auto const all = widened(out, case_.dtype);
  auto const places = sequences(case_);
  std::vector<float> rows;
  rows.reserve(exact_.size());
  for (Row const& row : rows_) {
    auto const begin =
        all.begin() + ((places[row.sequence].q_begin + row.query) * case_.heads + row.head) * case_.head_dim;
    rows.insert(rows.end(), begin, begin + case_.head_dim);
  }
  Errors errors = against(rows);
  // A row that nobody wrote is NaN, sampled or not.
  if (std::any_of(all.begin(), all.end(), [](float x) { return std::isnan(x); })) errors.largest = NAN;
  return errors;
}

std::string Reference::problem(const Errors& errors) const {
  char text[128] = "";
  if (!(errors.largest <= allowed()))
    std::snprintf(text, sizeof text, "largest error %.2e, allowed %.2e", errors.largest, allowed());
  else if (!(errors.relative <= allowed_relative()))
    std::snprintf(text, sizeof text, "relative error %.2e, allowed %.2e", errors.relative, allowed_relative());
  return text;
}

}  // namespace flashcore::bench

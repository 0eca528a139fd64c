// SPDX-License-Identifier: Apache-2.0
// Runs causal attention in each dtype on the CPU and compares it with plain loops in double precision, runs it again as
// decoding over a cache, and plans for a GPU that is too old and for strides that no shape has. Prints the instruction
// set that was chosen; exits with 1 where something is wrong. Small, since it also runs on an emulated processor.
#include <flashcore/flashcore.h>

#include <bit>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstring>
#include <utility>
#include <vector>

namespace {

constexpr int heads = 2, queries = 37, keys = 70, head_dim = 40;

// A multiple of 1/16 in [-1, 1): exact in every dtype.
float element(uint32_t index) { return static_cast<float>(static_cast<int>((index * 2654435761u) >> 27) - 16) / 16.0f; }

// Bits of a float that is exact in float16 and not subnormal there.
uint16_t half_bits(float x) {
  uint32_t const bits = std::bit_cast<uint32_t>(x);
  uint32_t const sign = bits >> 16 & 0x8000u;
  return static_cast<uint16_t>(x == 0.0f ? sign : sign | (((bits & 0x7fffffffu) - (112u << 23)) >> 13));
}

float from_half(uint16_t bits) {
  int const exponent = bits >> 10 & 31;
  float const mantissa = static_cast<float>(bits & 1023) / 1024.0f;
  float const size = exponent == 0 ? std::ldexp(mantissa, -14) : std::ldexp(1.0f + mantissa, exponent - 15);
  return bits & 0x8000 ? -size : size;
}

struct Array {
  flashcore::DType dtype;
  int rows;
  std::vector<unsigned char> bytes;

  Array(flashcore::DType dtype, int rows, uint32_t seed) : dtype(dtype), rows(rows), bytes(count() * dtype.bytes()) {
    for (uint32_t i = 0; i < count(); ++i) {
      float const x = element(seed + i);
      uint16_t const bits = dtype == flashcore::float16 ? half_bits(x) : std::bit_cast<uint32_t>(x) >> 16;
      std::memcpy(&bytes[i * dtype.bytes()], dtype.bits == 32 ? static_cast<void const*>(&x) : &bits, dtype.bytes());
    }
  }
  size_t count() const { return size_t{heads} * rows * head_dim; }
  flashcore::Tensor tensor() {
    return {bytes.data(),
            dtype,
            {},
            false,
            4,
            {1, rows, heads, head_dim},
            {rows * heads * head_dim, heads * head_dim, head_dim, 1}};
  }
  double at(int row, int head, int d) const {
    void const* const place = &bytes[((row * heads + head) * head_dim + d) * dtype.bytes()];
    float x = 0;
    uint16_t bits = 0;
    std::memcpy(&bits, place, 2);
    if (dtype.bits == 32) std::memcpy(&x, place, 4);
    if (dtype == flashcore::float16) x = from_half(bits);
    if (dtype == flashcore::bfloat16) x = std::bit_cast<float>(uint32_t{bits} << 16);
    return x;
  }
};

double largest_error(flashcore::DType dtype) {
  Array query(dtype, queries, 0), key(dtype, keys, 10000), value(dtype, keys, 20000), out(dtype, queries, 30000);
  flashcore::attention(
      {.query = query.tensor(), .key = key.tensor(), .value = value.tensor(), .out = out.tensor(), .causal = true});
  double largest = 0;
  for (int head = 0; head < heads; ++head) {
    for (int q = 0; q < queries; ++q) {
      double sum = 0;
      std::vector<double> row(head_dim);
      for (int k = 0; k <= q + keys - queries; ++k) {
        double score = 0;
        for (int d = 0; d < head_dim; ++d) score += query.at(q, head, d) * key.at(k, head, d);
        double const weight = std::exp(score / std::sqrt(double{head_dim}));
        sum += weight;
        for (int d = 0; d < head_dim; ++d) row[d] += weight * value.at(k, head, d);
      }
      for (int d = 0; d < head_dim; ++d) largest = std::fmax(largest, std::fabs(row[d] / sum - out.at(q, head, d)));
    }
  }
  return largest;
}

// How far decoding is from attention() over the same keys, the last ones of which it appends to its cache.
double decoding_error(flashcore::DType dtype) {
  constexpr int cached = keys - queries;
  Array query(dtype, queries, 0), key(dtype, keys, 10000), value(dtype, keys, 20000);
  Array key_cache(dtype, keys, 30000), value_cache(dtype, keys, 40000), out(dtype, queries, 0),
      whole(dtype, queries, 0);
  size_t const cached_bytes = key.bytes.size() / keys * cached;
  std::memcpy(key_cache.bytes.data(), key.bytes.data(), cached_bytes);
  std::memcpy(value_cache.bytes.data(), value.bytes.data(), cached_bytes);
  auto const new_rows = [&](Array& array) {
    flashcore::Tensor tensor = array.tensor();
    tensor.data = array.bytes.data() + cached_bytes;
    tensor.shape[1] = queries;
    return tensor;
  };
  int32_t length = cached;
  flashcore::KvCacheProblem const problem{.query = query.tensor(),
                                          .key_cache = key_cache.tensor(),
                                          .value_cache = value_cache.tensor(),
                                          .cache_seqlens = {&length, flashcore::int32, {}, false, 1, {1}, {1}},
                                          .key = new_rows(key),
                                          .value = new_rows(value),
                                          .out = out.tensor(),
                                          .causal = true};
  flashcore::validate(problem);
  flashcore::check_values(problem);
  flashcore::launch(problem, flashcore::plan(problem, flashcore::device_properties({})));
  flashcore::attention(
      {.query = query.tensor(), .key = key.tensor(), .value = value.tensor(), .out = whole.tensor(), .causal = true});
  bool const appended = key_cache.bytes == key.bytes && value_cache.bytes == value.bytes;
  double largest = appended ? 0 : INFINITY;
  for (int head = 0; head < heads; ++head) {
    for (int q = 0; q < queries; ++q) {
      for (int d = 0; d < head_dim; ++d) {
        largest = std::fmax(largest, std::fabs(out.at(q, head, d) - whole.at(q, head, d)));
      }
    }
  }
  return largest;
}

// A GPU before Ampere is refused, by name, when planning.
bool refuses_old_gpu() {
  Array array(flashcore::float16, queries, 0);
  flashcore::Tensor tensor = array.tensor();
  tensor.device = {flashcore::DeviceType::cuda, 0};
  try {
    flashcore::plan(flashcore::Problem{.query = tensor, .key = tensor, .value = tensor},
                    {"Turing", flashcore::DeviceType::cuda, 75, 68, 64 << 10, 64 << 10, 6 << 20});
  } catch (const flashcore::RuntimeError& error) {
    return std::strstr(error.what(), "Turing has compute capability 7.5") != nullptr;
  }
  return false;
}

// On Hopper the kernel that loads by TMA is chosen where TMA can encode the strides, and refuses others (negative, or
// 2^40 bytes or more) where it is asked for.
bool plans_around_strides() {
  Array array(flashcore::float16, keys, 0);
  flashcore::DeviceProperties const& h100 = flashcore::named_device("h100");
  bool right = true;
  for (int which = 0; which < 3; ++which) {
    for (auto [stride, tma] : {std::pair{int64_t{heads * head_dim}, true},
                               {int64_t{-heads * head_dim}, false},
                               {(int64_t{1} << 39) - 8, true},
                               {int64_t{1} << 39, false}}) {
      flashcore::Tensor tensors[] = {array.tensor(), array.tensor(), array.tensor()};
      for (flashcore::Tensor& tensor : tensors) tensor.device = {flashcore::DeviceType::cuda, 0};
      tensors[which].stride[1] = stride;
      tensors[which].stride[0] = int64_t{-1} << 60;  // of one sequence: it means nothing
      flashcore::Problem problem{.query = tensors[0], .key = tensors[1], .value = tensors[2]};
      auto const expected = tma ? flashcore::Backend::sm90 : flashcore::Backend::sm80;
      bool as_expected = flashcore::plan(problem, h100).backend == expected;
      problem.backend = flashcore::Backend::sm90;
      try {
        as_expected = flashcore::plan(problem, h100).backend == flashcore::Backend::sm90 && tma && as_expected;
      } catch (const flashcore::ValueError& error) {
        as_expected = std::strstr(error.what(), "stride") != nullptr && !tma && as_expected;
      }
      if (!as_expected) std::printf("array %d, stride %lld: planned wrongly\n", which, static_cast<long long>(stride));
      right = right && as_expected;
    }
  }
  return right;
}

}  // namespace

int main() {
  bool right = refuses_old_gpu();
  right = plans_around_strides() && right;
  // Values are below 1: half a unit in the last place of the result, twice over for the weights' own rounding.
  for (auto [dtype, tolerance] :
       {std::pair{flashcore::float32, 1e-6}, {flashcore::float16, 1e-3}, {flashcore::bfloat16, 8e-3}}) {
    double const error = largest_error(dtype);
    double const decoding = decoding_error(dtype);
    right = right && error <= tolerance && decoding <= tolerance;
    std::printf("%s: largest error %.2g, of decoding beside it %.2g, allowed %.2g\n",
                flashcore::to_string(dtype).c_str(), error, decoding, tolerance);
  }
  std::printf("instruction set: %s\n", flashcore::build_info().cpu_isa.c_str());
  return right ? 0 : 1;
}

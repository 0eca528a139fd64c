// SPDX-License-Identifier: Apache-2.0
// The extents of problems, the kernel arguments made of them, and the names of dtypes, devices and backends.
#include "flashcore/tensor.h"

#include <cmath>
#include <limits>

#include "attention/mask.h"
#include "core/forward_params.h"
#include "core/problem_facts.h"
#include "flashcore/problem.h"

namespace flashcore {

std::string to_string(DType dtype) {
  std::string const bits = std::to_string(dtype.bits);
  switch (dtype.kind) {
    case DTypeKind::none:
      return "none";
    case DTypeKind::boolean:
      return "bool";
    case DTypeKind::signed_int:
      return "int" + bits;
    case DTypeKind::unsigned_int:
      return "uint" + bits;
    case DTypeKind::floating:
      return "float" + bits;
    case DTypeKind::bfloat:
      return "bfloat" + bits;
    case DTypeKind::complex:
      return "complex" + bits;
    case DTypeKind::other:
      break;
  }
  return "a dtype of " + bits + " bits";
}

std::string to_string(Device device) {
  switch (device.type) {
    case DeviceType::cpu:
      return "cpu";
    case DeviceType::cuda:
      return "cuda:" + std::to_string(device.index);
    case DeviceType::other:
      break;
  }
  return "another kind of device";
}

char const* to_string(Backend backend) {
  switch (backend) {
    case Backend::automatic:
      return "automatic";
    case Backend::cpu:
      return "cpu";
    case Backend::sm80:
      return "sm80";
    case Backend::sm90:
      return "sm90";
  }
  return "?";
}

namespace {
// batch · length; the largest number where that overflows, which validate() then refuses.
int64_t total(int64_t batch, int64_t length) {
  int64_t const most = std::numeric_limits<int64_t>::max();
  return length > 0 && batch > most / length ? most : batch * length;
}

// The axes of a 4-D array in `layout`: batch, sequence, heads.
struct Axes {
  int batch, sequence, heads;
};
Axes axes(Layout layout) { return layout == Layout::bshd ? Axes{0, 1, 2} : Axes{0, 2, 1}; }
}  // namespace

Sizes sizes(const Problem& problem) {
  Sizes s;
  Tensor const &q = problem.query, &k = problem.key, &v = problem.value;
  if (problem.varlen()) {
    s.batch = problem.cu_seqlens_q.shape[0] - 1;
    s.heads_q = q.shape[1];
    s.heads_k = k.shape[1];
    s.total_q = q.shape[0];
    s.total_k = k.shape[0];
    s.seqlen_q = problem.max_seqlen_q.value_or(s.total_q);
    s.seqlen_k = problem.max_seqlen_k.value_or(s.total_k);
    s.head_dim = q.shape[2];
    s.head_dim_v = v.shape[2];
    return s;
  }
  auto const [batch, sequence, heads] = axes(problem.layout);
  s.batch = q.shape[batch];
  s.heads_q = q.shape[heads];
  s.heads_k = k.shape[heads];
  s.seqlen_q = q.shape[sequence];
  s.seqlen_k = k.shape[sequence];
  s.total_q = total(s.batch, s.seqlen_q);
  s.total_k = total(s.batch, s.seqlen_k);
  s.head_dim = q.shape[3];
  s.head_dim_v = v.shape[3];
  return s;
}

double effective_scale(const Problem& problem) {
  return problem.scale.value_or(1.0 / std::sqrt(static_cast<double>(sizes(problem).head_dim)));
}

ForwardParams forward_params(const Problem& problem) {
  Sizes const s = sizes(problem);
  bool const varlen = problem.varlen();
  auto const [batch, sequence, heads] = axes(problem.layout);
  auto const rows = [&]<class Pointer>(Tensor const& t, Pointer data) {
    // The stride of an axis of extent 1 is whatever its owner left there.
    auto const stride = [&](int axis) { return t.present() && t.shape[axis] > 1 ? t.stride[axis] : 0; };
    return varlen ? Rows<Pointer>{data, 0, stride(0), stride(1)}
                  : Rows<Pointer>{data, stride(batch), stride(sequence), stride(heads)};
  };
  auto const values = [](Tensor const& t) { return static_cast<int32_t const*>(t.present() ? t.data : nullptr); };
  auto const side = [](std::optional<int64_t> keys) {
    return static_cast<int32_t>(keys && *keys < unlimited ? *keys : unlimited);
  };

  ForwardParams p{};
  p.q = rows(problem.query, static_cast<void const*>(problem.query.data));
  p.k = rows(problem.key, static_cast<void const*>(problem.key.data));
  p.v = rows(problem.value, static_cast<void const*>(problem.value.data));
  p.o = rows(problem.out, problem.out.data);
  p.lse = problem.lse.present() ? static_cast<float*>(problem.lse.data) : nullptr;
  p.cu_seqlens_q = values(problem.cu_seqlens_q);
  p.cu_seqlens_k = values(problem.cu_seqlens_k);
  p.seqused_k = values(problem.seqused_k);
  p.batch = static_cast<int32_t>(s.batch);
  p.heads_q = static_cast<int32_t>(s.heads_q);
  p.heads_k = static_cast<int32_t>(s.heads_k);
  p.group = s.heads_k == 0 ? 1 : static_cast<int32_t>(s.heads_q / s.heads_k);
  p.seqlen_q = static_cast<int32_t>(varlen ? s.total_q : s.seqlen_q);
  p.seqlen_k = static_cast<int32_t>(varlen ? s.total_k : s.seqlen_k);
  p.head_dim = static_cast<int32_t>(s.head_dim);
  p.window_left = side(problem.window_left);
  p.window_right = problem.causal ? 0 : side(problem.window_right);
  p.scale = static_cast<float>(effective_scale(problem));
  p.softcap = static_cast<float>(problem.softcap);
  return p;
}

}  // namespace flashcore

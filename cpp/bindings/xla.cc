// SPDX-License-Identifier: Apache-2.0
// Attention as custom calls of XLA, for flashcore/jax.py: its foreign function interface, on the CPU and on CUDA.
//
// The handlers run without Python. XLA accepts them because its headers are those of the oldest jaxlib supported.
#include <cstdint>
#include <exception>
#include <functional>
#include <numeric>
#include <optional>
#include <vector>

#include "bind.h"
#include "core/recent_plans.h"
#include "cuda_stream.h"
#include "dlpack.h"
#include "flashcore/flashcore.h"
#include "xla/ffi/api/ffi.h"

namespace flashcore {

namespace nb = nanobind;
namespace ffi = xla::ffi;

namespace {

DType dtype_of(ffi::DataType type) {
  switch (type) {
    case ffi::DataType::F32:
      return float32;
    case ffi::DataType::F16:
      return float16;
    case ffi::DataType::BF16:
      return bfloat16;
    case ffi::DataType::S32:
      return int32;
    default:
      return {DTypeKind::other, 0};
  }
}

// An array of XLA's, which is row-major, as one of `ndim` dimensions: the last ones of the array, and before them one
// for all others (jax.vmap puts them there; it may have put none).
Tensor tensor_of(ffi::AnyBuffer buffer, Device device, int ndim) {
  auto const dims = buffer.dimensions();
  if (static_cast<int>(dims.size()) < ndim - 1) throw ValueError("an array has too few dimensions");
  int64_t shape[Tensor::max_ndim] = {};
  size_t const leading = dims.size() - ndim + 1;
  shape[0] = std::accumulate(dims.begin(), dims.begin() + leading, int64_t{1}, std::multiplies<>());
  for (int i = 1; i < ndim; ++i) shape[i] = dims[leading + i - 1];
  Tensor tensor = dlpack::compact(dtype_of(buffer.element_type()), device, ndim, shape);
  tensor.data = buffer.untyped_data();
  return tensor;
}

// Element `index` of the first dimension.
Tensor at(const Tensor& tensor, int64_t index) {
  Tensor one = dlpack::compact(tensor.dtype, tensor.device, tensor.ndim - 1, tensor.shape + 1);
  one.data = static_cast<char*>(tensor.data) + index * tensor.stride[0] * tensor.dtype.bytes();
  return one;
}

// The arguments of one custom call, as they come.
struct Call {
  Device device;
  void* stream;
  std::function<void*(int64_t bytes)> allocate;
  ffi::RemainingArgs args;
  ffi::RemainingRets rets;
  bool causal;
  int64_t window_left, window_right;  // negative: unlimited
  double scale;

  Tensor arg(size_t index, int ndim) const { return tensor_of(args.get<ffi::AnyBuffer>(index).value(), device, ndim); }
  Tensor ret(size_t index, int ndim) const { return tensor_of(*rets.get<ffi::AnyBuffer>(index).value(), device, ndim); }
  Problem problem() const {
    Problem problem;
    problem.causal = causal;
    if (window_left >= 0) problem.window_left = window_left;
    if (window_right >= 0) problem.window_right = window_right;
    problem.scale = scale;
    problem.stream = stream;
    return problem;
  }
};

void run(const Call& call, const Problem& problem) {
  validate(problem);
  if (problem.varlen() && (call.device.type == DeviceType::cpu || check_requested())) check_values(problem);
  Plan const chosen = recent_plan(problem, device_properties(call.device));
  launch(problem, chosen, chosen.workspace > 0 ? call.allocate(chosen.workspace) : nullptr);
}

// query, key, value (..., batch, sequence, heads, head_dim) to out and, where there is a second result, lse.
void attention(const Call& call) {
  Problem problem = call.problem();
  problem.query = call.arg(0, 4);
  problem.key = call.arg(1, 4);
  problem.value = call.arg(2, 4);
  problem.out = call.ret(0, 4);
  if (call.rets.size() > 1) problem.lse = call.ret(1, 3);
  run(call, problem);
}

// query, key, value (..., total, heads, head_dim), cu_seqlens_q, cu_seqlens_k, seqused_k to out and lse.
void attention_varlen(const Call& call) {
  Tensor const query = call.arg(0, 4), key = call.arg(1, 4), value = call.arg(2, 4), out = call.ret(0, 4);
  Tensor const starts_q = call.arg(3, 2), starts_k = call.arg(4, 2), used_k = call.arg(5, 2);
  std::optional<Tensor> lse;
  if (call.rets.size() > 1) lse = call.ret(1, 3);
  for (int64_t i = 0; i < query.shape[0]; ++i) {
    Problem problem = call.problem();
    problem.query = at(query, i);
    problem.key = at(key, i);
    problem.value = at(value, i);
    problem.cu_seqlens_q = at(starts_q, i);
    problem.cu_seqlens_k = at(starts_k, i);
    problem.seqused_k = at(used_k, i);
    problem.out = at(out, i);
    if (lse) problem.lse = at(*lse, i);
    run(call, problem);
  }
}

ffi::Error guarded(void (*work)(const Call&), const Call& call) {
  try {
    work(call);
    return ffi::Error::Success();
  } catch (const std::invalid_argument& error) {
    return ffi::Error(ffi::ErrorCode::kInvalidArgument, error.what());
  } catch (const std::exception& error) {
    return ffi::Error::Internal(error.what());
  }
}

template <void (*work)(const Call&)>
ffi::Error on_cpu(ffi::RemainingArgs args, ffi::RemainingRets rets, bool causal, int64_t left, int64_t right,
                  double scale) {
  std::vector<std::vector<char>> memory;
  auto const allocate = [&](int64_t bytes) -> void* { return memory.emplace_back(bytes).data(); };
  return guarded(work, {Device{}, nullptr, allocate, args, rets, causal, left, right, scale});
}

template <void (*work)(const Call&)>
ffi::Error on_cuda(void* stream, ffi::ScratchAllocator scratch, ffi::RemainingArgs args, ffi::RemainingRets rets,
                   bool causal, int64_t left, int64_t right, double scale) {
  auto const allocate = [&](int64_t bytes) {
    std::optional<void*> const memory = scratch.Allocate(bytes, 16);  // XLA refuses more
    if (!memory) throw RuntimeError("XLA has no " + std::to_string(bytes) + " bytes of device memory for a workspace");
    return *memory;
  };
  try {
    Device const device{DeviceType::cuda, cuda::current_device()};
    return guarded(work, {device, stream, allocate, args, rets, causal, left, right, scale});
  } catch (const std::exception& error) {
    return ffi::Error::Internal(error.what());
  }
}

template <class Binding>
auto with_options(Binding&& binding) {
  return std::forward<Binding>(binding)
      .RemainingArgs()
      .RemainingRets()
      .template Attr<bool>("causal")
      .template Attr<int64_t>("window_left")
      .template Attr<int64_t>("window_right")
      .template Attr<double>("scale");
}

template <void (*work)(const Call&)>
XLA_FFI_Error* cpu_handler(XLA_FFI_CallFrame* frame) {
  static auto* const handler = with_options(ffi::Ffi::Bind()).To(on_cpu<work>).release();
  return handler->Call(frame);
}

// Its work may be recorded into a CUDA graph: it neither synchronizes nor reads device memory.
template <void (*work)(const Call&)>
XLA_FFI_Error* cuda_handler(XLA_FFI_CallFrame* frame) {
  static auto* const handler =
      with_options(ffi::Ffi::Bind().Ctx<ffi::PlatformStream<void*>>().Ctx<ffi::ScratchAllocator>())
          .To(on_cuda<work>, {ffi::Traits::kCmdBufferCompatible})
          .release();
  return handler->Call(frame);
}

nb::capsule capsule(XLA_FFI_Error* (*handler)(XLA_FFI_CallFrame*)) {
  return nb::capsule(reinterpret_cast<void*>(handler));
}

nb::dict handlers() {
  nb::dict targets, cpu, cuda;
  cpu["flashcore_attention"] = capsule(cpu_handler<attention>);
  cpu["flashcore_attention_varlen"] = capsule(cpu_handler<attention_varlen>);
  cuda["flashcore_attention"] = capsule(cuda_handler<attention>);
  cuda["flashcore_attention_varlen"] = capsule(cuda_handler<attention_varlen>);
  targets["cpu"] = cpu;
  if (build_info().cuda) targets["CUDA"] = cuda;
  return targets;
}

}  // namespace

void bind_xla(nb::module_& m) {
  m.def("xla_handlers", &handlers, nb::sig("def xla_handlers() -> dict[str, dict[str, typing.Any]]"),
        "Capsules of the handlers for XLA's foreign function interface, by platform and name.");
}

}  // namespace flashcore

// SPDX-License-Identifier: Apache-2.0
// flashcore.plan: what would run for arrays, or for shapes on a named device, and why.
#include <nanobind/stl/string.h>

#include <algorithm>
#include <string>

#include "arrays.h"
#include "bind.h"
#include "core/problem_facts.h"
#include "core/recent_plans.h"
#include "flashcore/flashcore.h"
#include "options.h"

namespace flashcore {

using namespace nb::literals;

namespace {

// A Plan with its reason in words.
struct ExplainedPlan {
  Plan plan;
  std::string reason;

  std::string kernel() const { return plan.kernel; }
  std::string backend() const { return to_string(plan.backend); }
  // All but the reason.
  std::string facts() const {
    auto const number = [](const char* name, int64_t value) {
      return std::string(", ") + name + "=" + std::to_string(value);
    };
    return "Plan(backend='" + backend() + "', kernel='" + kernel() + "'" + number("head_dim", plan.head_dim) +
           number("tile_q", plan.tile_q) + number("tile_k", plan.tile_k) + number("packed_heads", plan.packed_heads) +
           number("tiles", plan.tiles) + number("threads", plan.threads) + number("blocks", plan.blocks) +
           number("splits", plan.splits) + number("shared_memory", plan.shared_memory) +
           number("workspace", plan.workspace);
  }
  std::string repr() const { return facts() + ", reason=" + nb::repr(nb::str(reason.c_str())).c_str() + ")"; }
};

// A tuple or list that begins like one of ints; what follows is judged where it is read.
bool is_shape(nb::handle value) {
  if (!nb::isinstance<nb::tuple>(value) && !nb::isinstance<nb::list>(value)) return false;
  return nb::len(value) == 0 || PyIndex_Check(nb::object(value[0]).ptr());
}

// A tensor of a shape, with no memory behind it. The address stands for any that is well aligned; nothing reads it.
Tensor tensor_from_shape(const char* name, nb::handle value, DType dtype, Device device) {
  if (!is_shape(value)) {
    throw TypeError(std::string(name) + ": expected a shape like query's, got " + got(value));
  }
  int64_t shape[Tensor::max_ndim];
  int const dims = static_cast<int>(nb::len(value));
  for (int i = 0; i < std::min(dims, Tensor::max_ndim); ++i) {
    shape[i] = integer_from(name, nb::object(value[i]));
    if (shape[i] < 0) throw ValueError(std::string(name) + ": got the shape " + got(value) + ", expected extents >= 0");
  }
  Tensor tensor = dlpack::compact(dtype, device, dims, shape);
  tensor.data = reinterpret_cast<void*>(uintptr_t{1} << 20);
  return tensor;
}

// A device by name: a named one ("h100"), or one of this machine ("cpu", "cuda", "cuda:1").
DeviceProperties device_from(nb::handle device) {
  if (!nb::isinstance<nb::str>(device)) {
    std::string names;
    for (const DeviceProperties& known : named_devices()) names += (names.empty() ? "'" : ", '") + known.name + "'";
    throw ValueError("device: got " + got(device) + ", expected with shapes one of " + names + " or 'cuda:0'");
  }
  std::string const name = nb::cast<std::string>(device);
  if (name == "cpu") return device_properties({DeviceType::cpu, 0});
  if (name.rfind("cuda", 0) != 0) return named_device(name);
  int index = 0;
  if (name.size() > 4) {
    std::string const digits = name.substr(5);
    bool const number = name[4] == ':' && !digits.empty() && digits.size() < 6 &&
                        digits.find_first_not_of("0123456789") == std::string::npos;
    if (!number) throw ValueError("device: got " + got(device) + ", expected 'cuda' or 'cuda:<index>'");
    index = std::stoi(digits);
  }
  return device_properties({DeviceType::cuda, index});
}

ExplainedPlan make_plan(nb::handle query, nb::handle key, nb::handle value, nb::handle cu_seqlens_q,
                        nb::handle cu_seqlens_k, nb::handle max_seqlen_q, nb::handle max_seqlen_k, nb::handle seqused_k,
                        nb::handle cache_seqlens, nb::handle page_table, nb::handle causal, nb::handle window,
                        nb::handle scale, nb::handle softcap, nb::handle layout, nb::handle batch_invariant,
                        nb::handle backend, nb::handle dtype, nb::handle device) {
  Problem problem;
  problem.layout = layout_from(layout);
  set_options(problem, {causal, window, scale, softcap, batch_invariant, backend});
  problem.max_seqlen_q = optional_integer_from("max_seqlen_q", max_seqlen_q);
  problem.max_seqlen_k = optional_integer_from("max_seqlen_k", max_seqlen_k);

  Arrays arrays;
  DeviceProperties properties;
  bool const shapes = is_shape(query);
  DType element;
  Device place;
  if (shapes) {
    element = dtype_from(dtype);
    properties = device_from(device);
    place = {properties.type, 0};
  } else if (!dtype.is_none() || !device.is_none()) {
    throw ValueError(std::string(dtype.is_none() ? "device" : "dtype") +
                     ": it goes with shapes; arrays have their own");
  }
  auto const read = [&](const char* name, nb::handle array, DType of) {
    if (array.is_none()) return Tensor{};
    return shapes ? tensor_from_shape(name, array, of, place) : arrays.input(name, array);
  };
  bool const cached = !cache_seqlens.is_none();
  problem.query = read("query", query, element);
  problem.key = read(cached ? "key_cache" : "key", key, element);
  problem.value = read(cached ? "value_cache" : "value", value, element);
  problem.cu_seqlens_q = read("cu_seqlens_q", cu_seqlens_q, int32);
  problem.cu_seqlens_k = read("cu_seqlens_k", cu_seqlens_k, int32);
  problem.seqused_k = read("seqused_k", seqused_k, int32);
  auto const explained = [&](const auto& asked) -> ExplainedPlan {
    validate(asked);
    if (!shapes) properties = device_properties(asked.query.device);
    Plan const chosen = recent_plan(asked, properties);
    return {chosen, explain(asked, properties, chosen)};
  };
  if (!cached) {
    if (!page_table.is_none()) throw ValueError("page_table: it goes with cache_seqlens");
    return explained(problem);
  }
  if (problem.varlen()) throw ValueError("cache_seqlens: it does not go with cu_seqlens_q");
  KvCacheProblem decoding = cache_of(problem);
  decoding.cache_seqlens = read("cache_seqlens", cache_seqlens, int32);
  decoding.page_table = read("page_table", page_table, int32);
  return explained(decoding);
}

constexpr const char* plan_doc =
    R"(Tells what a call of attention, attention_varlen or attention_kvcache would run, and why; runs nothing.

query, key, value: arrays as for attention, or shapes (tuples of ints, row-major arrays meant) together with dtype and
    device, which needs neither the memory nor the device.
cu_seqlens_q, cu_seqlens_k, seqused_k: with them the problem is one of attention_varlen; shapes where query is one.
cache_seqlens, page_table: with cache_seqlens it is one of attention_kvcache, key and value being the caches.
max_seqlen_q, max_seqlen_k, causal, window, scale, softcap, layout, batch_invariant, backend: as for those functions.
dtype: with shapes: "float32", "float16" or "bfloat16".
device: with shapes: "h100", "h200", "a100", "l4", "rtx4090" or "b200", or "cpu" or "cuda:0" for those of this machine.

Returns a Plan. Raises what the call would raise before it launches anything.)";

}  // namespace

void bind_plan(nb::module_& m) {
  nb::class_<ExplainedPlan> plan(m, "Plan", "What a call would run; made by flashcore.plan. Plans compare by value.");
  plan.def_prop_ro("backend", &ExplainedPlan::backend, "The machine: \"cpu\", \"sm80\" or \"sm90\".")
      .def_prop_ro("kernel", &ExplainedPlan::kernel, "The kernel's name, as \"sm90_forward\".")
      .def_prop_ro(
          "head_dim", [](const ExplainedPlan& self) { return self.plan.head_dim; },
          "The head dimension of the kernel's instance: the problem's, or the next larger one.")
      .def_prop_ro(
          "tile_q", [](const ExplainedPlan& self) { return self.plan.tile_q; },
          "Rows of one tile: queries, or with packed_heads > 1 queries times heads.")
      .def_prop_ro(
          "tile_k", [](const ExplainedPlan& self) { return self.plan.tile_k; },
          "Keys of one tile; of the kernel \"sm90_small\", those that a block has room for.")
      .def_prop_ro(
          "packed_heads", [](const ExplainedPlan& self) { return self.plan.packed_heads; },
          "Query heads of one key head whose queries share a tile (tile_q // packed_heads queries of each); 1: none.")
      .def_prop_ro(
          "tiles", [](const ExplainedPlan& self) { return self.plan.tiles; },
          "Tiles of queries over all sequences and heads; more than there are, if sequences differ in length.")
      .def_prop_ro(
          "threads", [](const ExplainedPlan& self) { return self.plan.threads; }, "Threads of a block, or of the CPU.")
      .def_prop_ro(
          "blocks", [](const ExplainedPlan& self) { return self.plan.blocks; },
          "Blocks of the grid, or tasks on the CPU.")
      .def_prop_ro(
          "splits", [](const ExplainedPlan& self) { return self.plan.splits; }, "Parts that the keys are divided into.")
      .def_prop_ro(
          "shared_memory", [](const ExplainedPlan& self) { return self.plan.shared_memory; },
          "Bytes of shared memory a block.")
      .def_prop_ro(
          "workspace", [](const ExplainedPlan& self) { return self.plan.workspace; },
          "Bytes of device memory that the call allocates beside its results.")
      .def_ro("reason", &ExplainedPlan::reason, "Why this was chosen, in a sentence or two.")
      .def("__repr__", &ExplainedPlan::repr)
      .def(
          "__eq__",
          [](const ExplainedPlan& self, nb::handle other) -> nb::object {
            if (!nb::isinstance<ExplainedPlan>(other)) return nb::borrow(nb::handle(Py_NotImplemented));
            return nb::bool_(self.plan == nb::cast<const ExplainedPlan&>(other).plan);
          },
          nb::sig("def __eq__(self, other: object, /) -> bool"))
      .def("__hash__", [](const ExplainedPlan& self) { return nb::hash(nb::str(self.facts().c_str())); });
  m.def(
      "plan", &make_plan, "query"_a.none(), "key"_a.none(), "value"_a.none(), nb::kw_only(),
      "cu_seqlens_q"_a = nb::none(), "cu_seqlens_k"_a = nb::none(), "max_seqlen_q"_a = nb::none(),
      "max_seqlen_k"_a = nb::none(), "seqused_k"_a = nb::none(), "cache_seqlens"_a = nb::none(),
      "page_table"_a = nb::none(), "causal"_a.none() = false, "window"_a = nb::none(), "scale"_a = nb::none(),
      "softcap"_a.none() = 0.0, "layout"_a.none() = "bshd", "batch_invariant"_a.none() = false,
      "backend"_a = nb::none(), "dtype"_a = nb::none(), "device"_a = nb::none(),
      nb::sig("def plan(query: typing.Any, key: typing.Any, value: typing.Any, *, cu_seqlens_q: typing.Any = None, "
              "cu_seqlens_k: typing.Any = None, max_seqlen_q: int | None = None, max_seqlen_k: int | None = None, "
              "seqused_k: typing.Any = None, causal: bool = False, "
              "window: tuple[int | None, int | None] | None = None, scale: float | None = None, softcap: float = 0.0, "
              "layout: typing.Literal['bshd', 'bhsd'] = 'bshd', batch_invariant: bool = False, "
              "backend: typing.Literal['cpu', 'sm80', 'sm90'] | None = None, dtype: str | None = None, "
              "device: str | None = None) -> Plan"),
      plan_doc);
}

}  // namespace flashcore

// SPDX-License-Identifier: Apache-2.0
// The Python module flashcore._core: errors, facts about the build and the machine, and the parts of the other files.
#include <nanobind/nanobind.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/vector.h>
#include <nanobind/typing.h>

#include <algorithm>
#include <cstdint>
#include <exception>
#include <string>

#include "arrays.h"
#include "bind.h"
#include "buffer.h"
#include "flashcore/flashcore.h"
#include "gil.h"
#include "options.h"

namespace flashcore {

using namespace nb::literals;

namespace {

void translate(const std::exception_ptr& pointer, void* /*payload*/) {
  try {
    std::rethrow_exception(pointer);
  } catch (const TypeError& error) {
    PyErr_SetString(PyExc_TypeError, error.what());
  } catch (const ValueError& error) {
    PyErr_SetString(PyExc_ValueError, error.what());
  } catch (const RuntimeError& error) {
    PyErr_SetString(PyExc_RuntimeError, error.what());
  }
}

constexpr const char* requirements = "driver R580 or later; glibc 2.34";

nb::list devices() {
  nb::list list;
  for (int i = 0; i < cuda_device_count(); ++i) {
    Device const device{DeviceType::cuda, i};
    DeviceProperties const properties = device_properties(device);
    int const capability = properties.compute_capability;
    nb::dict entry;
    entry["device"] = to_string(device);
    entry["name"] = properties.name;
    entry["compute_capability"] = std::to_string(capability / 10) + "." + std::to_string(capability % 10);
    entry["multiprocessors"] = properties.units;
    entry["shared_memory_per_block"] = properties.shared_memory_per_block;
    list.append(entry);
  }
  return list;
}

nb::dict info() {
  BuildInfo const build = build_info();
  nb::dict cuda;
  cuda["built"] = build.cuda;
  cuda["archs"] = build.cuda_archs;
  cuda["runtime_version"] = build.cuda_runtime_version;
  cuda["driver_version"] = build.cuda_driver_version;
  cuda["problem"] = build.cuda_problem;
  cuda["requires"] = requirements;
  nb::dict cpu;
  cpu["isa"] = build.cpu_isa;
  cpu["isas"] = build.cpu_isas;
  cpu["threads"] = num_threads();
  nb::dict facts;
  facts["version"] = version();
  facts["cuda"] = cuda;
  facts["cpu"] = cpu;
  facts["devices"] = devices();
  facts["requires"] = requirements;
  return facts;
}

nb::dict read_array(nb::handle array) {
  Arrays arrays;
  Tensor const tensor = arrays.input("array", array);
  nb::list shape, strides;
  for (int i = 0; i < std::min(tensor.ndim, Tensor::max_ndim); ++i) {
    shape.append(tensor.shape[i]);
    strides.append(tensor.stride[i]);
  }
  nb::dict facts;
  facts["address"] = reinterpret_cast<uintptr_t>(tensor.data);
  facts["dtype"] = to_string(tensor.dtype);
  facts["device"] = to_string(tensor.device);
  facts["read_only"] = tensor.read_only;
  facts["ndim"] = tensor.ndim;
  facts["shape"] = nb::tuple(shape);
  facts["strides"] = nb::tuple(strides);
  facts["stream"] = reinterpret_cast<uintptr_t>(arrays.stream());
  return facts;
}

void set_threads(nb::handle threads) {
  int64_t const number = integer_from("threads", threads);
  if (number != static_cast<int>(number))
    throw ValueError("threads: got " + got(threads) + ", expected an int of 32 bits");
  set_num_threads(static_cast<int>(number));
}

}  // namespace

void bind_info(nb::module_& m) {
  m.def("info", &info, nb::sig("def info() -> dict[str, typing.Any]"),
        R"(Facts about this build and this machine, as plain dicts, lists, strings and numbers.

"version"; "cuda": whether built with it, "archs" compiled in, "runtime_version" and "driver_version" (13000 for 13.0, 0
without), "problem" (why CUDA devices cannot be used, else empty) and what CUDA "requires"; "cpu": the instruction set
("isa") chosen, those compiled in ("isas") and "threads"; "devices": a dict for each usable CUDA device; "requires".)");
  m.def("set_num_threads", &set_threads, "threads"_a.none(), nb::sig("def set_num_threads(threads: int) -> None"),
        "Sets how many threads the CPU backend uses, from now on and for the whole process. ValueError below 1.");
  m.def("get_num_threads", &num_threads, nb::sig("def get_num_threads() -> int"),
        "How many threads the CPU backend uses: as set, else OMP_NUM_THREADS, else the processors it may run on.");
}

}  // namespace flashcore

NB_MODULE(_core, m) {
  namespace nb = nanobind;
  m.doc() = "FlashCore's compiled part. Use it through the package flashcore.";
  nb::set_leak_warnings(
      false);  // frameworks' caches may outlive us with objects of ours, which is no error of the user's
  m.attr("__version__") = flashcore::version();
  m.attr("Array") = nb::type_var("Array");
  nb::register_exception_translator(flashcore::translate);
#if FLASHCORE_HAS_XLA
  flashcore::bind_xla(m);
#endif
  flashcore::bind_buffer(m);
  flashcore::bind_attention(m);
  flashcore::bind_combine(m);
  flashcore::bind_plan(m);
  flashcore::bind_info(m);
  flashcore::bind_schedule(m);
  m.def("read_array", &flashcore::read_array, nb::arg("array").none(),
        nb::sig("def read_array(array: typing.Any) -> dict[str, typing.Any]"),
        "How an array is seen that is passed to FlashCore: address, dtype, device, strides in elements. For tests.");
  m.def("release_pending", &flashcore::release_pending, nb::sig("def release_pending() -> None"),
        "Waits for the work on arrays of frameworks without streams, and lets go of them. Runs at the interpreter's "
        "exit.");
  m.def("close_gil", &flashcore::close_gil, nb::sig("def close_gil() -> None"),
        "Makes threads that still compute wait for the process's end. Runs last at the interpreter's exit.");
}

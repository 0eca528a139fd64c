// SPDX-License-Identifier: Apache-2.0
// Translates options, and names the argument that has the wrong type.
#include "options.h"

#include "flashcore/error.h"

namespace flashcore {

namespace {

bool is_string(nb::handle value, const char* text) {
  return nb::isinstance<nb::str>(value) && PyUnicode_CompareWithASCIIString(value.ptr(), text) == 0;
}

[[noreturn]] void wrong(const char* name, nb::handle value, const char* expected) {
  throw ValueError(std::string(name) + ": got " + got(value) + ", expected " + expected);
}

double real_from(const char* name, nb::handle value) {
  if (PyFloat_Check(value.ptr())) return PyFloat_AsDouble(value.ptr());
  bool real = PyLong_Check(value.ptr()) && !PyBool_Check(value.ptr());
  if (!real && !PyBool_Check(value.ptr())) {  // NumPy's scalars are registered as real numbers
    real = PyObject_IsInstance(value.ptr(), nb::module_::import_("numbers").attr("Real").ptr()) == 1;
  }
  if (!real) wrong(name, value, "a real number");
  double const number = PyFloat_AsDouble(value.ptr());
  if (number == -1.0 && PyErr_Occurred()) {
    PyErr_Clear();
    wrong(name, value, "a number that a float can hold");
  }
  return number;
}

std::optional<int64_t> window_side(nb::handle window, nb::handle side) {
  if (side.is_none()) return std::nullopt;
  int64_t keys = -1;
  if (!PyBool_Check(side.ptr())) {
    try {
      keys = integer_from("window", side);
    } catch (const ValueError&) {
    }
  }
  if (keys < 0) wrong("window", window, "None or (left, right), each a non-negative int or None for unlimited");
  return keys;
}

void set_window(Problem& problem, nb::handle window) {
  if (window.is_none()) return;
  bool const pair = nb::isinstance<nb::tuple>(window) || nb::isinstance<nb::list>(window);
  if (!pair || nb::len(window) != 2) {
    wrong("window", window, "None or (left, right), each a non-negative int or None for unlimited");
  }
  problem.window_left = window_side(window, nb::object(window[0]));
  problem.window_right = window_side(window, nb::object(window[1]));
}

Backend backend_from(nb::handle backend) {
  if (backend.is_none()) return Backend::automatic;
  if (is_string(backend, "cpu")) return Backend::cpu;
  if (is_string(backend, "sm80")) return Backend::sm80;
  if (is_string(backend, "sm90")) return Backend::sm90;
  wrong("backend", backend, "None, 'cpu', 'sm80' or 'sm90'");
}

}  // namespace

std::string got(nb::handle value) {
  constexpr size_t longest = 80;
  std::string text = nb::repr(value).c_str();
  if (text.size() > longest) text = text.substr(0, longest) + "...";
  return text;
}

void set_options(Problem& problem, const Options& options) {
  problem.causal = bool_from("causal", options.causal);
  set_window(problem, options.window);
  if (!options.scale.is_none()) problem.scale = real_from("scale", options.scale);
  problem.softcap = real_from("softcap", options.softcap);
  problem.batch_invariant = bool_from("batch_invariant", options.batch_invariant);
  problem.backend = backend_from(options.backend);
}

Layout layout_from(nb::handle layout) {
  if (is_string(layout, "bshd")) return Layout::bshd;
  if (is_string(layout, "bhsd")) return Layout::bhsd;
  wrong("layout", layout, "'bshd' or 'bhsd'");
}

DType dtype_from(nb::handle dtype) {
  for (DType known : {float32, float16, bfloat16}) {
    if (is_string(dtype, to_string(known).c_str())) return known;
  }
  throw TypeError("dtype: got " + got(dtype) + ", expected 'float32', 'float16' or 'bfloat16'");
}

bool bool_from(const char* name, nb::handle value) {
  if (value.ptr() == Py_True || value.ptr() == Py_False) return value.ptr() == Py_True;
  // NumPy's scalars are no bools: numpy.bool since NumPy 2, numpy.bool_ before.
  if (nb::isinstance<nb::str>(value.type().attr("__name__"))) {
    std::string const type = nb::cast<nb::str>(value.type().attr("__name__")).c_str();
    if (type == "bool" || type == "bool_") return nb::cast<bool>(nb::bool_(value));
  }
  wrong(name, value, "True or False");
}

int64_t integer_from(const char* name, nb::handle value) {
  nb::object const number = nb::steal(PyBool_Check(value.ptr()) ? nullptr : PyNumber_Index(value.ptr()));
  if (!number.is_valid()) {
    PyErr_Clear();
    wrong(name, value, "an int");
  }
  long long const integer = PyLong_AsLongLong(number.ptr());
  if (integer == -1 && PyErr_Occurred()) {
    PyErr_Clear();
    wrong(name, value, "an int of at most 64 bits");
  }
  return integer;
}

std::optional<int64_t> optional_integer_from(const char* name, nb::handle value) {
  if (value.is_none()) return std::nullopt;
  return integer_from(name, value);
}

}  // namespace flashcore

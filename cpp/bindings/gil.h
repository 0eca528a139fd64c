// SPDX-License-Identifier: Apache-2.0
// Work without the GIL that survives the interpreter's end.
//
// A daemon thread may come back from a call when the interpreter is going down already. CPython would then end the
// thread by unwinding its stack, through C++ functions that allow no unwinding, and the process would abort. Such a
// thread waits for the process's end instead.
#pragma once

#include <nanobind/nanobind.h>

#include <exception>

namespace flashcore {

// Takes the GIL back for `state`, or never returns.
void take_gil(PyThreadState* state);

// Must run at the interpreter's exit (atexit), after every other work: from then on only the thread that called it
// takes the GIL back.
void close_gil();

template <class Work>
void without_gil(Work&& work) {
  PyThreadState* const state = PyEval_SaveThread();
  std::exception_ptr error;
  try {
    work();
  } catch (...) {
    error = std::current_exception();
  }
  take_gil(state);
  if (error) std::rethrow_exception(error);
}

}  // namespace flashcore

// SPDX-License-Identifier: Apache-2.0
// See gil.h.
#include "gil.h"

#include <atomic>
#include <chrono>
#include <thread>

namespace flashcore {
namespace {

std::atomic<int> taking{0};  // threads that are taking the GIL back
std::atomic<bool> closed{false};
std::thread::id last_thread;  // written before `closed`

}  // namespace

void take_gil(PyThreadState* state) {
  ++taking;
  if (closed && std::this_thread::get_id() != last_thread) {
    --taking;
    for (;;) std::this_thread::sleep_for(std::chrono::hours(1));
  }
  PyEval_RestoreThread(state);
  --taking;
}

void close_gil() {
  last_thread = std::this_thread::get_id();
  closed = true;
  // Those that saw the door open get through it. Not for ever: after a fork the child counts threads that it does not
  // have.
  PyThreadState* const state = PyEval_SaveThread();
  auto const end = std::chrono::steady_clock::now() + std::chrono::seconds(1);
  while (taking > 0 && std::chrono::steady_clock::now() < end) std::this_thread::yield();
  PyEval_RestoreThread(state);
}

}  // namespace flashcore

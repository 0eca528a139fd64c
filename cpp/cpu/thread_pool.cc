// SPDX-License-Identifier: Apache-2.0
#include "cpu/thread_pool.h"

#include <algorithm>
#include <atomic>
#include <chrono>
#include <condition_variable>
#include <cstdlib>
#include <exception>
#include <memory>
#include <mutex>
#include <string>
#include <system_error>
#include <thread>
#include <utility>

#include "cpu/cpu.h"

#if defined(__linux__)
#include <sched.h>
#endif
#if !defined(_WIN32)
#include <pthread.h>
#endif

namespace flashcore::cpu {
namespace {

// That this process may run on.
int processors() {
  static int const count = [] {
#if defined(__linux__)
    cpu_set_t set;
    if (sched_getaffinity(0, sizeof set, &set) == 0) return std::max(1, CPU_COUNT(&set));
#endif
    return std::max(1, static_cast<int>(std::thread::hardware_concurrency()));
  }();
  return count;
}

int default_threads() {
  if (const char* text = std::getenv("OMP_NUM_THREADS")) {
    long const threads = std::strtol(text, nullptr, 10);  // stops at the comma of a list
    if (threads >= 1 && threads <= 1 << 16) return static_cast<int>(threads);
  }
  return processors();
}

std::atomic<int>& thread_limit() {
  static std::atomic<int> threads{default_threads()};
  return threads;
}

thread_local bool inside_a_loop = false;

// Lets the processor's other thread run, for a few nanoseconds.
void pause() {
#if defined(__GNUC__) && defined(__x86_64__)
  __builtin_ia32_pause();
#elif defined(__GNUC__) && defined(__aarch64__)
  asm volatile("yield");
#endif
}

// Waits for `ready` without sleeping, but not for long: waking a sleeping thread takes 50 us and more on a virtual
// machine, a third of a small problem.
template <class Ready>
void spin(Ready ready) {
  auto const until = std::chrono::steady_clock::now() + std::chrono::microseconds(100);
  do {
    for (int i = 0; i < 32; ++i) {
      if (ready()) return;
      pause();
    }
  } while (std::chrono::steady_clock::now() < until);
}

class Pool {
 public:
  void run(int64_t count, void (*body)(void*, int64_t), void* context, int threads, HandOut hand_out) {
    std::lock_guard turn(turn_);
    {
      std::lock_guard lock(mutex_);
      body_ = body;
      context_ = context;
      error_ = nullptr;
      wanted_ = start_workers(threads - 1);
      divide(count, hand_out == HandOut::one_by_one ? 1 : wanted_ + 1);
      loops_.fetch_add(1, std::memory_order_release);
    }
    wake_.notify_all();
    work(0);
    // Threads that outnumber the processors must not keep each other from them.
    if (threads <= processors()) spin([&] { return working_ == 0; });
    std::exception_ptr error;
    {
      std::unique_lock lock(mutex_);
      wanted_ = 0;  // who has not started by now need not
      done_.wait(lock, [&] { return working_ == 0; });
      error = std::exchange(error_, nullptr);
    }
    if (error) std::rethrow_exception(error);
  }

 private:
  // Has as many workers as `wanted`, if the system lets us, and returns how many of those there are. They are never
  // joined: they sleep until the process ends, and the pool is never destroyed.
  int start_workers(int wanted) {
    try {
      for (; workers_ < wanted; ++workers_) std::thread(&Pool::wait_for_work, this).detach();
    } catch (const std::system_error&) {
      // Fewer threads do the same work.
    }
    return std::min(wanted, workers_);
  }

  void wait_for_work() {
    std::unique_lock lock(mutex_);
    for (;;) {
      wake_.wait(lock, [&] { return wanted_ > 0; });
      --wanted_;
      ++working_;
      int const own = ++joined_ % runs_;
      uint32_t const loop = loops_.load(std::memory_order_relaxed);
      lock.unlock();
      work(own);
      lock.lock();
      if (--working_ == 0) done_.notify_one();
      if (workers_ < processors()) {
        lock.unlock();
        spin([&] { return loops_.load(std::memory_order_acquire) != loop; });
        lock.lock();
      }
    }
  }

  // A part of the iterations, taken in order, on cache lines of its own.
  struct alignas(64) Run {
    std::atomic<int64_t> next{0};
    int64_t end = 0;
  };

  void divide(int64_t count, int runs) {
    if (runs > most_runs_) {
      run_ = std::make_unique<Run[]>(static_cast<size_t>(runs));
      most_runs_ = runs;
    }
    runs_ = runs;
    joined_ = 0;
    for (int i = 0; i < runs; ++i) {
      run_[i].next.store(count / runs * i + std::min<int64_t>(count % runs, i), std::memory_order_relaxed);
      run_[i].end = count / runs * (i + 1) + std::min<int64_t>(count % runs, i + 1);
    }
  }

  // The iterations of run `own`, then what the others have left.
  void work(int own) {
    inside_a_loop = true;
    try {
      for (int i = 0; i < runs_; ++i) {
        Run& run = run_[(own + i) % runs_];
        for (int64_t at; (at = run.next.fetch_add(1, std::memory_order_relaxed)) < run.end;) body_(context_, at);
      }
    } catch (...) {
      for (int i = 0; i < runs_; ++i) run_[i].next.store(run_[i].end, std::memory_order_relaxed);
      std::lock_guard lock(mutex_);
      if (!error_) error_ = std::current_exception();
    }
    inside_a_loop = false;
  }

  std::mutex turn_;   // held by the caller whose loop runs
  std::mutex mutex_;  // guards what follows; the loop's description changes only while no worker works
  std::condition_variable wake_, done_;
  int workers_ = 0;              // threads started
  int wanted_ = 0;               // of them, to join the loop still
  std::atomic<int> working_{0};  // in the loop now, the caller not counted; changed under the mutex, read by who spins
  std::exception_ptr error_;
  void (*body_)(void*, int64_t) = nullptr;
  void* context_ = nullptr;
  std::unique_ptr<Run[]> run_;
  int most_runs_ = 0, runs_ = 1, joined_ = 0;
  std::atomic<uint32_t> loops_{0};  // counts them, for workers that spin
};

std::atomic<Pool*> current_pool{nullptr};

// The pool, made at first use. A forked child has none of its parent's threads and locks in whatever state they were
// in: it forgets the parent's pool and makes its own.
Pool& pool() {
  Pool* existing = current_pool.load(std::memory_order_acquire);
  if (existing) return *existing;
#if !defined(_WIN32)
  static int const registered =
      pthread_atfork(nullptr, nullptr, [] { current_pool.store(nullptr, std::memory_order_release); });
  static_cast<void>(registered);
#endif
  auto* const made = new Pool;
  if (current_pool.compare_exchange_strong(existing, made, std::memory_order_acq_rel)) return *made;
  delete made;
  return *existing;
}

}  // namespace

int num_threads() { return thread_limit().load(std::memory_order_relaxed); }

void set_num_threads(int threads) {
  if (threads < 1) throw ValueError("threads: got " + std::to_string(threads) + ", expected 1 or more");
  thread_limit().store(threads, std::memory_order_relaxed);
}

void parallel_for(int64_t count, void (*body)(void*, int64_t), void* context, HandOut hand_out) {
  int const threads = static_cast<int>(std::min<int64_t>(num_threads(), count));
  if (threads <= 1 || inside_a_loop) {
    for (int64_t i = 0; i < count; ++i) body(context, i);
    return;
  }
  pool().run(count, body, context, threads, hand_out);
}

}  // namespace flashcore::cpu

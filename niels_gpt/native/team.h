// A team of threads that lives as long as its owner. Between calls the others sleep; inside a call all go through the
// same stages together, each stage a number of tasks that whoever is free takes. A stage ends when its tasks are done,
// not when every thread has come: on a busy machine a thread that does not get a core holds nobody up.

#pragma once

#include <atomic>
#include <condition_variable>
#include <functional>
#include <memory>
#include <mutex>
#include <thread>
#include <vector>

#if defined(__x86_64__) || defined(__i386__)
static inline void pause_core() { __builtin_ia32_pause(); }
#elif defined(__aarch64__)
static inline void pause_core() { __asm__ __volatile__("yield"); }
#else
static inline void pause_core() {}
#endif

struct Team {
  const int size;
  std::mutex turn;  // whoever calls run()

  Team(int threads, int stages) : size(threads), progress(new Stage[stages]), count(stages) {
    for (int i = 1; i < size; i++) others.emplace_back([this, i] { live(i); });
  }

  ~Team() {
    {
      std::lock_guard<std::mutex> guard(lock);
      ending = true;
    }
    called.notify_all();
    for (std::thread& t : others) t.join();
  }

  // Waits until nobody is left in the call before: only then may what they look at be changed.
  void settle() {
    until([this] { return inside.load(std::memory_order_acquire) == 0; });
  }

  // After settle(): what(me) on the caller's thread (me = 0) and on all others that are free; returns when the caller's
  // has returned.
  void run(std::function<void(int)> what) {
    for (int i = 0; i < count; i++) progress[i].next = progress[i].done = 0;
    work = std::move(what);
    {
      std::lock_guard<std::mutex> guard(lock);
      calls.fetch_add(1, std::memory_order_release);
      open = true;
    }
    if (size > 1) called.notify_all();
    work(0);
    std::lock_guard<std::mutex> guard(lock);
    open = false;
  }

  // Stage number `index` of this call: task(0) .. task(n - 1), each once, in runs of neighbours so that memory is read in
  // long strides; prepare() before a thread's first. Returns when all n are done, by whomever.
  template <class Prepare, class Task>
  void stage(int index, int n, Prepare prepare, Task task) {
    Stage& s = progress[index];
    const int run = n / (size * 8) > 1 ? n / (size * 8) : 1;
    bool ready = false;
    while (s.next.load(std::memory_order_relaxed) < n) {
      if (!ready) prepare();
      ready = true;
      const int first = s.next.fetch_add(run, std::memory_order_relaxed), end = first + run < n ? first + run : n;
      if (first >= n) break;
      for (int i = first; i < end; i++) task(i);
      s.done.fetch_add(end - first, std::memory_order_release);
    }
    until([&s, n] { return s.done.load(std::memory_order_acquire) >= n; });
  }

 private:
  static constexpr int PATIENCE = 2000;  // pauses before the core is offered to others

  struct alignas(64) Stage {
    std::atomic<int> next{0}, done{0};
  };

  std::unique_ptr<Stage[]> progress;
  const int count;
  std::vector<std::thread> others;
  std::function<void(int)> work;
  std::mutex lock;
  std::condition_variable called;
  bool open = false, ending = false;  // under the lock
  alignas(64) std::atomic<unsigned> calls{0};
  alignas(64) std::atomic<int> inside{0};

  template <class Condition>
  static void until(Condition met) {
    for (int spins = 0; !met(); spins++) {
      if (spins < PATIENCE)
        pause_core();
      else
        std::this_thread::yield();
    }
  }

  void live(int me) {
    unsigned seen = 0;
    for (;;) {
      for (int spins = 0; calls.load(std::memory_order_acquire) == seen && spins < PATIENCE; spins++) pause_core();
      {
        std::unique_lock<std::mutex> guard(lock);
        called.wait(guard, [&] { return ending || (open && calls.load(std::memory_order_relaxed) != seen); });
        if (ending) return;
        seen = calls.load(std::memory_order_relaxed);
        inside.fetch_add(1, std::memory_order_acq_rel);
      }
      work(me);
      inside.fetch_sub(1, std::memory_order_release);
    }
  }
};

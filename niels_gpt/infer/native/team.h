// A team of threads that lives as long as its owner: between calls the others sleep, inside a call they meet at barriers
// that cost a fraction of a microsecond.

#pragma once

#include <atomic>
#include <condition_variable>
#include <functional>
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

  explicit Team(int threads) : size(threads) {
    for (int i = 1; i < size; i++) others.emplace_back([this, i] { live(i); });
  }

  ~Team() {
    ending = true;
    wake();
    for (std::thread& t : others) t.join();
  }

  // work(me) on every thread, me = 0 on the caller's; returns when all are done.
  void run(std::function<void(int)> what) {
    work = std::move(what);
    shares[0] = shares[1] = 0;
    wake();
    work(0);
    wait(0);
  }

  // Everyone gets here before anyone goes on; the tasks of the next share() start at 0 again.
  void wait(int) {
    const int now = round.load(std::memory_order_relaxed);
    if (arrived.fetch_add(1, std::memory_order_acq_rel) == size - 1) {
      arrived.store(0, std::memory_order_relaxed);
      shares[(now + 1) & 1].store(0, std::memory_order_relaxed);
      round.store(now + 1, std::memory_order_release);
      return;
    }
    for (int spins = 0; round.load(std::memory_order_acquire) == now; spins++) spins < PATIENCE ? pause_core() : rest();
  }

  // task(0) .. task(n - 1), each once, by whoever is free; in runs of neighbours, so that memory is read in long strides.
  template <class Task>
  void share(int n, Task task) {
    std::atomic<int>& next = shares[round.load(std::memory_order_relaxed) & 1];
    const int run = n / (size * 8) > 1 ? n / (size * 8) : 1;
    for (int first; (first = next.fetch_add(run, std::memory_order_relaxed)) < n;)
      for (int i = first; i < n && i < first + run; i++) task(i);
  }

 private:
  static constexpr int PATIENCE = 4000;  // pauses before the core is offered to others

  std::vector<std::thread> others;
  std::function<void(int)> work;
  std::mutex lock;
  std::condition_variable called;
  alignas(64) std::atomic<int> arrived{0};
  alignas(64) std::atomic<int> round{0};
  alignas(64) std::atomic<int> shares[2] = {};
  alignas(64) std::atomic<unsigned> calls{0};
  std::atomic<bool> ending{false};

  static void rest() { std::this_thread::yield(); }

  void wake() {
    {
      std::lock_guard<std::mutex> guard(lock);
      calls.fetch_add(1, std::memory_order_release);
    }
    called.notify_all();
  }

  void live(int me) {
    for (unsigned seen = 0;;) {
      for (int spins = 0; calls.load(std::memory_order_acquire) == seen && spins < PATIENCE; spins++) pause_core();
      if (calls.load(std::memory_order_acquire) == seen) {
        std::unique_lock<std::mutex> guard(lock);
        called.wait(guard, [&] { return calls.load(std::memory_order_acquire) != seen; });
      }
      seen++;
      if (ending) return;
      work(me);
      wait(me);
    }
  }
};

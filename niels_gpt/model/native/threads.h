// Parts of a job, shared out among the threads that PyTorch computes with, so that two sets never compete for the cores.

#pragma once

#include <sys/types.h>
#include <unistd.h>

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <memory>

#include "team.h"

typedef void (*Region)(void (*)(void*), void*, unsigned, unsigned);  // libgomp's GOMP_parallel

struct Threads {
  Region region = nullptr;  // null: PyTorch has other threads; a team of our own
  int count = 1;
  std::unique_ptr<Team> team;
  pid_t pid = 0;  // the team's: a forked child has none of its threads
};

static Threads threads;

// task(0) .. task(n - 1), each once, by whoever is free.
template <class Task>
static void share(int n, Task task) {
  struct Job {
    Task& task;
    const int n;
    std::atomic<int> next{0};
  } job{task, n};
  const auto work = [](void* given) {
    Job& job = *static_cast<Job*>(given);
    for (int i; (i = job.next.fetch_add(1, std::memory_order_relaxed)) < job.n;) job.task(i);
  };
  const int count = std::min(threads.count, n);
  if (count > 1 && threads.region) return threads.region(work, &job, count, 0);
  if (count > 1 && (!threads.team || threads.pid == getpid())) {
    if (!threads.team || threads.team->size != threads.count) {
      threads.team.reset(new Team(threads.count, 1));
      threads.pid = getpid();
    }
    std::lock_guard<std::mutex> turn(threads.team->turn);
    threads.team->settle();
    threads.team->run([&](int) { threads.team->stage(0, n, [] {}, [&](int i) { job.task(i); }); });
    return;
  }
  work(&job);
}

// How many parts rows of this width are cut into: the same for any number of threads, so that sums over parts are, too.
static inline int parts_of(int64_t rows, int64_t width) {
  return (int)std::max<int64_t>(1, std::min<int64_t>({32, rows, rows * width / 8192}));
}

// task(part, first row, row after the last).
template <class Task>
static void share_rows(int64_t rows, int n, Task task) {
  share(n, [&](int part) { task(part, rows * part / n, rows * (part + 1) / n); });
}

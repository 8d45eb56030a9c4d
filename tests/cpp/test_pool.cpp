// What run_chunks promises: every chunk once, whoever calls from where, and no wait for threads
// that have no chunk.
#include "test_pool.h"

#include <sys/wait.h>
#include <unistd.h>

#include <atomic>
#include <chrono>
#include <stdexcept>
#include <string>
#include <thread>
#include <vector>

#include "../../csrc/cpu/pool.h"
#include "guarded.h"

namespace onebit::cpu {
namespace {

// Chunk i adds 1 to plain counter i: a chunk that ran twice or not at all shows, and one whose
// writes are not seen by the caller is a race.
bool runs_each_once(int64_t chunks, int64_t threads) {
  std::vector<int> runs(chunks);
  run_chunks(chunks, threads, [&](int64_t i) { ++runs[i]; });
  for (const int count : runs) {
    if (count != 1) return false;
  }
  return true;
}

// Distinct threads that had a chunk, of which each takes long enough for all to come.
int64_t threads_used(int64_t chunks, int64_t threads) {
  std::vector<std::thread::id> by(chunks);
  run_chunks(chunks, threads, [&](int64_t i) {
    by[i] = std::this_thread::get_id();
    std::this_thread::sleep_for(std::chrono::milliseconds(5));
  });
  int64_t distinct = 0;
  for (int64_t i = 0; i < chunks; ++i) {
    bool first = true;
    for (int64_t j = 0; j < i; ++j) first &= by[j] != by[i];
    distinct += first;
  }
  return distinct;
}

struct Case {
  int64_t chunks, threads;
  const char* reason;
};

const Case kCases[] = {
    {0, 4, "no chunk"},
    {1, 4, "one chunk needs no worker"},
    {2, 2, "a chunk each"},
    {7, 1, "one thread: the caller"},
    {1000, 4, "more chunks than threads"},
    {3, 100000, "more threads than there will ever be"},
    {50, 2, "fewer threads than before: the others stay out"},
};

void test_errors() {
  for (const int64_t bad : {0, 37}) {
    std::string caught;
    try {
      run_chunks(64, 4, [&](int64_t i) {
        if (i == bad) throw std::runtime_error("of chunk " + std::to_string(i));
      });
    } catch (const std::runtime_error& error) {
      caught = error.what();
    }
    expect(caught == "of chunk " + std::to_string(bad),
           "pool: the caller gets what a chunk throws");
  }
  expect(runs_each_once(64, 4), "pool: goes on after an error");
}

void test_nested() {
  std::vector<std::vector<int>> runs(8, std::vector<int>(16));
  run_chunks(8, 4, [&](int64_t i) { run_chunks(16, 4, [&](int64_t j) { ++runs[i][j]; }); });
  expect(runs == std::vector<std::vector<int>>(8, std::vector<int>(16, 1)),
         "pool: calls in a call");
}

void test_callers() {
  std::atomic<int> good{0};
  std::vector<std::thread> callers;
  for (int c = 0; c < 4; ++c) {
    callers.emplace_back([&] {
      for (int i = 0; i < 200; ++i) good += runs_each_once(1 + i % 9, 1 + i % 4);
    });
  }
  for (auto& caller : callers) caller.join();
  expect(good == 800, "pool: several callers at once");
}

// A worker that is not there, here because it is kept in another call's chunk, holds nobody up.
void test_absent_worker() {
  std::atomic<int> inside{0};
  std::atomic<bool> release{false};
  std::thread other([&] {
    run_chunks(2, 2, [&](int64_t) {
      ++inside;
      while (!release) std::this_thread::yield();
    });
  });
  while (inside != 2) std::this_thread::yield();
  expect(runs_each_once(100, 2), "pool: a call while the workers are busy");
  release = true;
  other.join();
}

#ifndef __SANITIZE_THREAD__  // which starts no thread in a child
// Calls f in a child and says whether it returned true, in time.
template <class F>
bool in_child(const F& f) {
  const pid_t child = fork();
  if (child == 0) {
    alarm(20);
    _exit(f() ? 0 : 1);
  }
  int status = 1;
  waitpid(child, &status, 0);
  return status == 0;
}

void test_fork() {
  runs_each_once(8, 4);
  const auto works = [] { return runs_each_once(100, 4) && threads_used(4, 4) == 4; };
  expect(in_child(works), "pool: a child has workers of its own");
  expect(in_child([&] { return works() && in_child(works); }), "pool: a child's child");
  std::atomic<bool> stop{false};
  std::thread other([&] {
    while (!stop) runs_each_once(64, 4);
  });
  for (int i = 0; i < 20; ++i) {
    expect(in_child([] { return runs_each_once(100, 4); }), "pool: a fork during another's call");
  }
  stop = true;
  other.join();
  expect(threads_used(4, 4) == 4, "pool: the parent keeps its workers");
}
#endif

}  // namespace

void test_pool() {
  for (const Case& c : kCases) {
    expect(runs_each_once(c.chunks, c.threads), std::string("pool: ") + c.reason);
  }
  expect(threads_used(8, 4) == 4, "pool: all threads asked for come");
  expect(threads_used(8, 2) == 2, "pool: no more threads than asked for");
  for (int i = 0; i < 2000; ++i) {
    expect(runs_each_once(1 + i % 5, 2 + i % 3), "pool: one call after the other");
  }
  test_errors();
  test_nested();
  test_callers();
  test_absent_worker();
#ifndef __SANITIZE_THREAD__
  test_fork();
#endif
}

}  // namespace onebit::cpu

#include "parallel.h"

#include <pthread.h>
#include <unistd.h>

#include <atomic>
#include <chrono>
#include <cstdint>
#include <limits>
#include <thread>

namespace onebit::cpu {
namespace {

// A thread that has a core comes within 50 us.
constexpr int64_t kLate = 1'000'000;
constexpr int64_t kRemembered = 1'000'000'000;

std::atomic<int64_t> shared_until{0};

// libgomp's threads look for work for 300,000 pauses, 16 ms on recent processors, in which no other
// thread of the process gets their core, and for 1,000 if it counts more threads than cores. It
// counts those of every thread that had a parallel region: here is one that does nothing else.
void let_openmp_sleep() {
#if defined(__linux__) && defined(_OPENMP)
  static const bool done = [] {
    std::thread([] {
#pragma omp parallel num_threads(2)
      {
      }
      for (;;) pause();
    }).detach();
    return true;
  }();
  (void)done;
#endif
}

}  // namespace

int64_t nanoseconds() {
  return std::chrono::steady_clock::now().time_since_epoch() / std::chrono::nanoseconds(1);
}

bool cores_are_shared(int64_t now) {
  // A child has none of OpenMP's threads, and OpenMP waits for them.
  static const int registered =
      pthread_atfork(nullptr, nullptr, [] { shared_until = std::numeric_limits<int64_t>::max(); });
  (void)registered;
  return now < shared_until.load(std::memory_order_relaxed);
}

void note_wait(int64_t worked, int64_t waited, int64_t now) {
  if (waited < kLate || waited < worked) return;
  let_openmp_sleep();
  shared_until.store(now + kRemembered, std::memory_order_relaxed);
}

}  // namespace onebit::cpu

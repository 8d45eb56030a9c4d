#include "parallel.h"

#include <atomic>
#include <chrono>

namespace onebit::cpu {
namespace {

// In nanoseconds. A thread that has a core comes within 50 us; one that waits for another process
// comes a time slice later, 4 to 8 ms.
constexpr int64_t kLate = 1'000'000;
constexpr int64_t kRemembered = 250'000'000;

std::atomic<int64_t> shared_until{0};

}  // namespace

int64_t nanoseconds() {
  return std::chrono::steady_clock::now().time_since_epoch() / std::chrono::nanoseconds(1);
}

bool cores_are_shared() {
  const int64_t until = shared_until.load(std::memory_order_relaxed);
  return until != 0 && nanoseconds() < until;
}

void note_wait(int64_t waited) {
  if (waited < kLate) return;
  shared_until.store(nanoseconds() + kRemembered, std::memory_order_relaxed);
}

}  // namespace onebit::cpu

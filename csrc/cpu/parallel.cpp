#include "parallel.h"

#include <algorithm>
#include <atomic>
#include <chrono>

namespace onebit::cpu {
namespace {

// In nanoseconds. A thread that has a core comes within 50 us; one that waits for another process
// comes a time slice later, 4 to 8 ms. So may one that slept, but only once.
constexpr int64_t kLate = 1'000'000;
constexpr int kTimes = 2;  // one after the other
constexpr int64_t kLongest = 500'000'000;

std::atomic<int> times{0};
std::atomic<int64_t> shared_until{0}, shared_for{0};

}  // namespace

int64_t nanoseconds() {
  return std::chrono::steady_clock::now().time_since_epoch() / std::chrono::nanoseconds(1);
}

bool cores_are_shared() {
  const int64_t until = shared_until.load(std::memory_order_relaxed);
  return until != 0 && nanoseconds() < until;
}

// Four times what was lost; twice as long as before if threads are late again sooner than that.
void note_wait(int64_t waited) {
  const int late = times.load(std::memory_order_relaxed);
  if (waited < kLate) {
    if (late != 0) times.store(0, std::memory_order_relaxed);
    return;
  }
  const bool often = late + 1 == kTimes;
  times.store(often ? 0 : late + 1, std::memory_order_relaxed);
  if (!often) return;
  const int64_t now = nanoseconds(), before = shared_for.load(std::memory_order_relaxed);
  const bool again = now - shared_until.load(std::memory_order_relaxed) < before;
  const int64_t span = std::min(again ? 2 * before : 4 * waited, kLongest);
  shared_for.store(span, std::memory_order_relaxed);
  shared_until.store(now + span, std::memory_order_relaxed);
}

}  // namespace onebit::cpu

#include "pool.h"

#include <pthread.h>

#include <algorithm>
#include <atomic>
#include <chrono>
#include <exception>
#include <new>
#include <system_error>
#include <thread>

#if defined(__x86_64__)
#include <xmmintrin.h>
#endif

namespace onebit::cpu {
namespace {

constexpr int64_t kMaxWorkers = 511;
constexpr int64_t kMaxChunks = int64_t(1) << 30;

// How long a worker without work, and a caller whose workers are still at it, look before they
// sleep. To wake a thread takes 5 us of the waker and 50 of the sleeper; the next layer's product
// is as far away. A thread that looks is itself what others share their cores with.
constexpr auto kSpin = std::chrono::microseconds(50);

inline void relax() {
#if defined(__x86_64__)
  _mm_pause();
#elif defined(__aarch64__)
  asm volatile("isb");
#endif
}

// Until value differs from `old`; returns what it is.
template <class T>
T wait_for_change(const std::atomic<T>& value, T old) {
  const auto end = std::chrono::steady_clock::now() + kSpin;
  do {
    for (int i = 0; i < 8; ++i) {
      const T now = value.load(std::memory_order_acquire);
      if (now != old) return now;
      relax();
    }
  } while (std::chrono::steady_clock::now() < end);
  value.wait(old, std::memory_order_acquire);
  return value.load(std::memory_order_acquire);
}

// One job at a time. Its chunks are taken from `open_`; who has taken one knows that the job is not
// over, and looks at the job's other members only then.
class Pool {
 public:
  bool try_run(int64_t chunks, int64_t threads, ChunkFunction f, const void* context) {
    if (busy_.exchange(true, std::memory_order_acquire)) return false;
    const int64_t helpers = start_workers(std::min({threads, chunks, kMaxWorkers + 1}) - 1);
    f_ = f;
    context_ = context;
    chunks_ = chunks;
    error_ = nullptr;
    failed_.store(false, std::memory_order_relaxed);
    unfinished_.store(int32_t(chunks), std::memory_order_relaxed);
    open_.store(uint64_t(helpers) << 32 | uint64_t(chunks), std::memory_order_release);
    for (int64_t i = 0; i < helpers; ++i) {
      workers_[i].calls.fetch_add(1);
      workers_[i].calls.notify_one();
    }
    work(-1);
    for (int32_t left; (left = unfinished_.load(std::memory_order_acquire)) != 0;) {
      wait_for_change(unfinished_, left);
    }
    const std::exception_ptr error = std::move(error_);
    error_ = nullptr;
    busy_.store(false, std::memory_order_release);
    if (error) std::rethrow_exception(error);
    return true;
  }

 private:
  struct alignas(64) Worker {
    std::atomic<uint32_t> calls{0};
  };

  // How many of `wanted` there are: a system without room for more threads works with fewer.
  int64_t start_workers(int64_t wanted) {
    while (count_ < wanted) {
      try {
        std::thread([this, i = count_] { serve(i); }).detach();
      } catch (const std::system_error&) {
        break;
      }
      ++count_;
    }
    return std::min(count_, wanted);
  }

  void serve(int64_t index) {
    auto& calls = workers_[index].calls;
    for (uint32_t seen = 0;;) {
      seen = wait_for_change(calls, seen);
      work(index);
    }
  }

  // Takes chunks until none is left for this thread.
  void work(int64_t worker) {
    for (int64_t chunk; (chunk = take(worker)) >= 0;) {
      try {
        f_(context_, chunk);
      } catch (...) {
        if (!failed_.exchange(true)) error_ = std::current_exception();
      }
      if (unfinished_.fetch_sub(1, std::memory_order_acq_rel) == 1) unfinished_.notify_one();
    }
  }

  int64_t take(int64_t worker) {
    uint64_t open = open_.load(std::memory_order_acquire);
    do {
      if (uint32_t(open) == 0 || worker >= int64_t(open >> 32)) return -1;
    } while (!open_.compare_exchange_weak(open, open - 1, std::memory_order_acq_rel,
                                          std::memory_order_acquire));
    return chunks_ - int64_t(uint32_t(open));
  }

  std::atomic<bool> busy_{false};
  int64_t count_ = 0;  // of workers
  ChunkFunction f_ = nullptr;
  const void* context_ = nullptr;
  int64_t chunks_ = 0;
  std::exception_ptr error_;
  std::atomic<bool> failed_{false};
  alignas(64) std::atomic<uint64_t> open_{0};  // how many workers may help, chunks not yet taken
  alignas(64) std::atomic<int32_t> unfinished_{0};
  Worker workers_[kMaxWorkers];
};

// Never destroyed: workers may wake while the process ends.
Pool& pool() {
  static Pool* const pool = [] {
    static Pool* made = new Pool;
    // A child has the pool's memory and none of its threads, in the middle of what they did.
    pthread_atfork(nullptr, nullptr, [] { new (made) Pool; });
    return made;
  }();
  return *pool;
}

}  // namespace

void run_chunks(int64_t chunks, int64_t threads, ChunkFunction f, const void* context) {
  const bool shared = chunks > 1 && threads > 1 && chunks <= kMaxChunks;
  if (shared && pool().try_run(chunks, threads, f, context)) return;
  for (int64_t i = 0; i < chunks; ++i) f(context, i);
}

}  // namespace onebit::cpu

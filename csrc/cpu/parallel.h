// How work is split among as many threads as torch.set_num_threads says.
#pragma once

#include <ATen/Parallel.h>

#include <algorithm>
#include <cstdint>

#include "pool.h"

#if defined(__x86_64__)
#include <xmmintrin.h>
#endif

namespace onebit::cpu {

// Multiply-adds below which a second thread costs more than it saves: fork and join take up to 50
// us when the other threads sleep, and a fast table does this many in 20.
constexpr int64_t kMacsPerThread = 1 << 21;
constexpr int64_t kRangesPerThread = 8;

// Tiles of outputs that a product splits a thread's share into. From 64 rows of x on, as many as
// share packed weights, 1024 outputs cost nothing. With fewer rows they cost up to 40 %: x becomes
// tables once more, and prefetched weights are another's.
inline int64_t least_tiles(int64_t rows, int64_t tiles, int64_t tile) {
  return rows < 64 ? tiles : std::max<int64_t>(1024 / tile, 1);
}

inline int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

// On every thread with subnormals, which torch.set_flush_denormal and -ffast-math libraries switch
// off on some threads and not on others. Results depend on neither.
class WithSubnormals {
 public:
  WithSubnormals() : mode_(get()) { set(mode_ & ~kFlush); }
  ~WithSubnormals() { set(mode_); }
  WithSubnormals(const WithSubnormals&) = delete;
  WithSubnormals& operator=(const WithSubnormals&) = delete;

 private:
#if defined(__x86_64__)
  using Mode = unsigned;
  static constexpr Mode kFlush = 0x8040;  // flush to zero, denormals are zero
  static Mode get() { return _mm_getcsr(); }
  static void set(Mode mode) { _mm_setcsr(mode); }
#elif defined(__aarch64__)
  using Mode = uint64_t;
  static constexpr Mode kFlush = uint64_t(1) << 24;  // FZ
  static Mode get() {
    Mode mode;
    asm volatile("mrs %0, fpcr" : "=r"(mode));
    return mode;
  }
  static void set(Mode mode) { asm volatile("msr fpcr, %0" : : "r"(mode)); }
#else
  using Mode = unsigned;
  static constexpr Mode kFlush = 0;
  static Mode get() { return 0; }
  static void set(Mode) {}
#endif

  Mode mode_;
};

int64_t nanoseconds();
// Whether a thread had to be waited for within the last second: the system gave it no core.
bool cores_are_shared(int64_t now);
// The caller of a parallel region worked, then waited for the others, until now.
void note_wait(int64_t worked, int64_t waited, int64_t now);

// f(first, last) of ranges that make up [0, count). A thread is worth at least `grain`; where cores
// are shared, its share is split into ranges of at least `least`, of which a late one takes fewer.
template <class F>
void in_parallel(int64_t count, int64_t grain, int64_t least, const F& f) {
  if (count <= 0) return;
  const int64_t allowed = at::in_parallel_region() ? 1 : at::get_num_threads();
  const int64_t threads = std::min(allowed, ceil_div(count, std::max<int64_t>(grain, 1)));
  const int64_t share = ceil_div(count, threads);
  const auto run = [&](int64_t range, int64_t step) {
    const WithSubnormals mode;
    f(range * step, std::min((range + 1) * step, count));
  };
  if (threads == 1) return run(0, count);
  const int64_t begin = nanoseconds();
  if (cores_are_shared(begin)) {
    const int64_t step = ceil_div(share, std::clamp<int64_t>(share / least, 1, kRangesPerThread));
    return run_chunks(ceil_div(count, step), threads, [&](int64_t range) { run(range, step); });
  }
  int64_t worked = 0;
  at::parallel_for(0, ceil_div(count, share), 1, [&](int64_t first, int64_t last) {
    for (int64_t range = first; range < last; ++range) run(range, share);
    if (first == 0) worked = nanoseconds() - begin;  // the caller
  });
  const int64_t end = nanoseconds();
  note_wait(worked, end - begin - worked, end);
}

template <class F>
void in_parallel(int64_t count, int64_t grain, const F& f) {
  in_parallel(count, grain, grain, f);
}

}  // namespace onebit::cpu

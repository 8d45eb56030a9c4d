// at::parallel_for for kernels: on every thread with subnormals, which torch.set_flush_denormal and
// -ffast-math libraries switch off on some threads and not on others. Results depend on neither.
#pragma once

#include <ATen/Parallel.h>

#include <cstdint>
#include <thread>

#if defined(__x86_64__)
#include <xmmintrin.h>
#endif

namespace onebit::cpu {

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
// Whether a thread was lately kept from its core by another process.
bool cores_are_shared();
// After a parallel region of short work: how long its caller waited to begin, for the thread it
// woke may take its core, and for the other threads to end.
void note_wait(int64_t waited);

// Grains that one thread does sooner than it waits for one that has no core.
constexpr int64_t kShortWork = 256;

// `grain`: what is worth a second thread, 20 us or more. A region ends when all of its threads have
// come: where one had to wait for another process, short work stays with its caller for a while.
template <class F>
void in_parallel(int64_t begin, int64_t end, int64_t grain, const F& f) {
  const auto run = [&](int64_t first, int64_t last) {
    const WithSubnormals mode;
    f(first, last);
  };
  if (begin >= end) return;
  const bool is_short = end - begin <= kShortWork * grain;
  if (end - begin <= grain || (is_short && cores_are_shared())) return run(begin, end);
  const auto caller = std::this_thread::get_id();
  const int64_t start = nanoseconds();
  int64_t worked = 0;  // the caller
  at::parallel_for(begin, end, grain, [&](int64_t first, int64_t last) {
    const bool is_caller = is_short && std::this_thread::get_id() == caller;
    const int64_t begun = is_caller ? nanoseconds() : 0;
    run(first, last);
    if (is_caller) worked = nanoseconds() - begun;
  });
  if (is_short) note_wait(nanoseconds() - start - worked);
}

}  // namespace onebit::cpu

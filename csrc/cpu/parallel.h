// at::parallel_for for kernels: on every thread with subnormals, which torch.set_flush_denormal and
// -ffast-math libraries switch off on some threads and not on others. Results depend on neither.
#pragma once

#include <ATen/Parallel.h>

#include <cstdint>

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

template <class F>
void in_parallel(int64_t begin, int64_t end, int64_t grain, const F& f) {
  at::parallel_for(begin, end, grain, [&](int64_t first, int64_t last) {
    const WithSubnormals mode;
    f(first, last);
  });
}

}  // namespace onebit::cpu

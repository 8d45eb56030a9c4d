// One product by the kernels of the commit this is compiled with, timed: compare_kernels.py.
#include "kernels.h"

#include <chrono>
#include <cstring>

using namespace onebit;
using namespace onebit::cpu;

// Microseconds of x [m, k] times weights [n, k]; scales and biases are of x's dtype, a number of
// DType. Negative: there is no such instruction set.
extern "C" __attribute__((visibility("default"))) double time_product(const char* isa,
                                                                      int64_t m,
                                                                      int64_t n,
                                                                      int64_t k,
                                                                      int group,
                                                                      int dtype,
                                                                      const void* x,
                                                                      const uint32_t* packed,
                                                                      const void* scales,
                                                                      const void* biases,
                                                                      void* y) {
  using Clock = std::chrono::steady_clock;
  int count;
  const Kernels* const* all = available_kernels(&count);
  for (int i = 0; i < count; ++i) {
    if (std::strcmp(all[i]->name, isa) != 0) continue;
    const QmmArgs a = {
        x, y, DType(dtype), m, n, k, {packed, scales, biases, DType(dtype), n, k, group}};
    const auto start = Clock::now();
    all[i]->qmm_t(a, {0, m, 0, n});
    return std::chrono::duration<double, std::micro>(Clock::now() - start).count();
  }
  return -1;
}

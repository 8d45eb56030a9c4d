// What the kernel tests share: buffers that end at a page nobody may touch, and comparisons.
#pragma once

#include <sys/mman.h>
#include <unistd.h>

#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <iterator>
#include <random>
#include <string>
#include <type_traits>

#include "../../csrc/cpu/kernels/float_types.h"

namespace onebit::cpu {

inline int failures = 0;
inline std::mt19937 rng(0);

inline void expect(bool ok, const std::string& what) {
  if (ok) return;
  ++failures;
  std::printf("FAIL %s\n", what.c_str());
}

// Bytes that end where a page begins that may not be touched, as does the page before the first: a
// kernel that reads or writes past the end dies here.
class Guarded {
 public:
  explicit Guarded(int64_t bytes) {
    const size_t page = size_t(sysconf(_SC_PAGESIZE)), size = size_t(bytes);
    length_ = (size + page - 1) / page * page + 2 * page;
    void* memory = mmap(nullptr, length_, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (memory == MAP_FAILED) std::abort();
    base_ = static_cast<char*>(memory);
    // Nothing to open is an error to some kernels.
    if (size && mprotect(base_ + page, length_ - 2 * page, PROT_READ | PROT_WRITE)) std::abort();
    data_ = base_ + length_ - page - size;
  }
  ~Guarded() { munmap(base_, length_); }
  Guarded(const Guarded&) = delete;
  Guarded& operator=(const Guarded&) = delete;

  char* data() const { return data_; }
  template <class T>
  T* as() const {
    return reinterpret_cast<T*>(data_);
  }

 private:
  char *base_, *data_;
  size_t length_;
};

inline double get(const Guarded& b, DType t, int64_t i) {
  double value = 0;
  with_type(
      t, [&](auto* type) { value = double(to_float(b.as<std::decay_t<decltype(*type)>>()[i])); });
  return value;
}

inline void put(const Guarded& b, DType t, int64_t i, double v) {
  with_type(t, [&](auto* type) {
    using T = std::decay_t<decltype(*type)>;
    if constexpr (sizeof(T) == sizeof(double)) {
      b.as<T>()[i] = v;
    } else {
      from_float(float(v), b.as<T>()[i]);
    }
  });
}

inline void fill(const Guarded& b, DType t, int64_t count, double mean, double deviation) {
  std::normal_distribution<double> normal(mean, deviation);
  for (int64_t i = 0; i < count; ++i) put(b, t, i, normal(rng));
}

// Relative error of the whole, in L2.
inline double error(const Guarded& got, const Guarded& want, DType t, int64_t count) {
  double difference = 0, norm = 0;
  for (int64_t i = 0; i < count; ++i) {
    const double w = get(want, t, i), d = get(got, t, i) - w;
    difference += d * d;
    norm += w * w;
  }
  return norm > 0 ? std::sqrt(difference / norm) : std::sqrt(difference);
}

// Half a unit in the last place, as a relative error of evenly spread values, with room for sums.
inline double tolerance(DType t) {
  switch (t) {
    case DType::kHalf:
      return 6e-4;
    case DType::kBFloat16:
      return 5e-3;
    case DType::kDouble:
      return 4e-15;
    default:
      return 2e-6;
  }
}

// Values that rules for weights are about: the i-th of an endless row.
inline double special(uint64_t i) {
  constexpr double kValues[] = {
      0.0, -0.0, double(INFINITY), -double(INFINITY), double(NAN), 1e-8, 1e-40, 65504, 1e38};
  return kValues[i % std::size(kValues)];
}

}  // namespace onebit::cpu

// What the machine can do at most, for benchmarks: bytes read and multiply-adds done by the same
// vectors the kernels use.
#pragma once

#include "kernels.h"
#include "target.h"

namespace onebit::cpu {
namespace {

// The largest of `count` floats: one load and one comparison per vector, four at a time.
template <class V>
float read_floats(const float* p, int64_t count) {
  auto a = V::load(p), b = a, c = a, d = a;
  for (int64_t i = 0; i + 4 * V::kLanes <= count; i += 4 * V::kLanes) {
    a = V::larger(V::load(p + i), a);
    b = V::larger(V::load(p + i + V::kLanes), b);
    c = V::larger(V::load(p + i + 2 * V::kLanes), c);
    d = V::larger(V::load(p + i + 3 * V::kLanes), d);
  }
  return V::max_of(V::larger(V::larger(a, b), V::larger(c, d)));
}

// `steps` fused multiply-adds of 12 independent vectors: more than two units of four cycles need.
template <class V>
float multiply_adds(int64_t steps, int64_t* count) {
  typename V::Vec v[12];
  const auto factor = V::set(0.999f), term = V::set(0.001f);
  for (int i = 0; i < 12; ++i) v[i] = V::set(float(i));
  ONEBIT_NO_UNROLL
  for (int64_t s = 0; s < steps; ++s) {
    ONEBIT_UNROLL
    for (int i = 0; i < 12; ++i) v[i] = V::fma(v[i], factor, term);
  }
  auto sum = v[0];
  for (int i = 1; i < 12; ++i) sum = V::add(sum, v[i]);
  *count = steps * 12 * V::kLanes;
  return V::sum(sum);
}

}  // namespace
}  // namespace onebit::cpu

// Activations of a group as int16, for tables of their sums: scaled so that no subset sum
// overflows. A relative error of 1.6e-4 (group 32) to 6e-4 (group 128), a third of what rounding
// the result to bfloat16 costs; `has_int16_tables` says where it may be used.
#pragma once

#include "target.h"

namespace onebit::cpu {
namespace {

// Returns what a unit of `out` stands for; NaN for a group with an infinity. A NaN in x reaches the
// result through the sum of the group.
template <class V, int kCount>
ONEBIT_INLINE float block_scale(const float* x, int16_t* out) {
  constexpr float kLimit = 32767.0f - kCount / 2;  // each value may round up by half
  auto above = V::zero(), below = V::zero();
  ONEBIT_UNROLL
  for (int i = 0; i < kCount; i += V::kLanes) {
    above = V::add(above, V::larger(V::load(x + i), V::zero()));
    below = V::add(below, V::smaller(V::load(x + i), V::zero()));
  }
  const float high = V::sum(above), low = -V::sum(below), most = high > low ? high : low;
  const bool finite = V::sum(V::sub(above, below)) < __builtin_inff();
  // Tiny groups are enlarged first: kLimit / most would overflow.
  const float enlarge = most < 1e-30f ? 0x1p100f : 1.0f;
  const auto first = V::set(enlarge), second = V::set(most > 0 ? kLimit / (most * enlarge) : 0.0f);
  ONEBIT_UNROLL
  for (int i = 0; i < kCount; i += V::kLanes) {
    V::store_int16(out + i, V::mul(V::mul(V::load(x + i), first), second));
  }
  return finite ? most / kLimit : __builtin_nanf("");
}

}  // namespace
}  // namespace onebit::cpu

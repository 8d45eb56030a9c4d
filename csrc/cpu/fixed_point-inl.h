// Activations of a group as integers, so that sums of them are exact: what is looked up, and the
// sum of the group less that, then agree to the last bit, however much of them cancels.
//
//   x[j] = step * q[j] + rest[j],  step a power of two,  no sum of some of the q overflows
//
// A power of two, for the largest values then have no rest: constants and bfloat16 values within
// 2^7 of each other are exact even in 16 bits. Where an outlier makes the step too coarse for the
// others, the rests make a second plane.
#pragma once

#include "float_types.h"
#include "kernels.h"
#include "target.h"

namespace onebit::cpu {
namespace {

// Half of the unit roundoff of x: a rest below it is less than what rounding x has cost.
ONEBIT_INLINE float tolerance_of(DType x) {
  return x == DType::kBFloat16 ? 0x1p-9f : x == DType::kHalf ? 0x1p-12f : 0x1p-25f;
}

template <class Integer, int kCount>
struct Planes {
  static constexpr int kMost = 2;

  int count;  // 0: not for tables; the values are infinite, NaN, extreme, or spread too far
  // Wide ones doubled, modulo 2^32: sums of them, less the sum of the group, are set - clear.
  alignas(64) Integer q[kMost][kCount];
  float step[kMost];
  int32_t sum[kMost];  // of q
};

// Groups beyond are multiplied value by value: nothing in between over- or underflows.
constexpr float kLeastSum = 0x1p-90f, kMostSum = 0x1p90f;

enum class Fit { kNone, kCoarse, kGood };

// One plane of x. It is coarse when the rests are more of x than the tolerance, or when 3 of 4
// values have a rest above it: measured by their number too, for weights may be zero where the
// large ones are. Few values count as if they were 2 less.
template <class L, class Integer, int kCount>
ONEBIT_INLINE Fit make_plane(const float* x,
                             const float* original,
                             float tolerance,
                             Planes<Integer, kCount>& planes,
                             int plane,
                             float* rest) {
  constexpr bool kWide = sizeof(Integer) == 4;
  // Each value may round up by half. Sums of 16-bit planes are widened before they are subtracted
  // from each other, so that only those of one sign must fit.
  constexpr float kLimit = kWide ? 0x1p31f - 8192 : 32767 - kCount / 2 - 1;
  auto sizes = L::zero(), values = L::zero();
  ONEBIT_UNROLL
  for (int i = 0; i < kCount; i += L::kLanes) {
    const auto v = L::load(x + i);
    sizes = L::add(sizes, L::abs(v));
    if (!kWide) values = L::add(values, v);
  }
  const float size_of_all = L::sum(sizes);
  float most = size_of_all;
  if (!kWide) most = 0.5f * (most + __builtin_fabsf(L::sum(values)));
  if (!(most == 0 || (most >= kLeastSum && most <= kMostSum))) return Fit::kNone;
  const uint32_t exponent = (bits_of(most * (1 / kLimit)) + 0x7fffff) & 0x7f800000;
  const auto step = L::set(float_of(exponent)), inverse = L::set(float_of(0x7f000000 - exponent));
  auto sum = L::ints(0);
  auto lost = L::zero();
  int coarse = 0, all = 0;
  ONEBIT_UNROLL
  for (int i = 0; i < kCount; i += L::kLanes) {
    const auto v = L::load(x + i);
    const auto q = L::round(L::mul(v, inverse));
    const auto left = L::fnma(step, L::to_floats(q), v);
    const auto size = L::abs(L::load(original + i)), loss = L::abs(left);
    L::store_ints(planes.q[plane] + i, kWide ? L::add_ints(q, q) : q);
    L::store(rest + i, left);
    sum = L::add_ints(sum, q);
    lost = L::add(lost, loss);
    coarse += __builtin_popcount(L::greater_bits(loss, L::mul(size, L::set(tolerance))));
    all += __builtin_popcount(L::greater_bits(size, L::zero()));
  }
  planes.step[plane] = float_of(exponent);
  planes.sum[plane] = L::sum_ints(sum);
  const bool many = coarse > 0 && 4 * coarse + 8 > 3 * all;
  // Sums of a wide plane lose nothing where values are alike: those have no rest.
  const bool much = !kWide && L::sum(lost) > 0.5f * tolerance * size_of_all;
  return many || much ? Fit::kCoarse : Fit::kGood;
}

template <class L, class Integer, int kCount>
ONEBIT_INLINE void to_planes(const float* x, DType dtype, Planes<Integer, kCount>& planes) {
  alignas(64) float rest[kCount];
  const float tolerance = tolerance_of(dtype);
  const Fit first = make_plane<L>(x, x, tolerance, planes, 0, rest);
  planes.count = first == Fit::kGood;
  if (__builtin_expect(first == Fit::kCoarse, 0)) {
    planes.count = make_plane<L>(rest, x, tolerance, planes, 1, rest) == Fit::kGood ? 2 : 0;
  }
}

// With the two levels of a weight low = bias and high = scale + bias, and the sums of a group over
// clear and set bits, a product is low * clear + high * set. If either is large and meets a level
// near zero, or both are and their products cancel, it must not be computed from a sum and a
// difference that were rounded. Levels of about one size, the usual ones:
//
//   product = scale / 2 * (set - clear) + (low + high) / 2 * (sum of the group)
//
// where wide sums come as the difference, exact (16-bit sums are short enough for scale * set +
// bias
// * all). Others, with v the sum that the larger level meets:
//
//   product = (low + high) * v - smaller * (v - (sum of the group - v))
//
// A level of zero then leaves the first term.
template <class L>
class Levels {
 public:
  using Vec = typename L::Vec;
  using Ints = typename L::Ints;
  static constexpr bool kWide = sizeof(typename L::Integer) == 4;

  ONEBIT_INLINE Levels(Vec scale, Vec bias) : scale_(scale), bias_(bias) {
    const Vec middle = L::fma(L::set(0.5f), scale, bias);
    lopsided_ = L::greater_bits(L::abs(middle), L::mul(L::set(0.25f), L::abs(scale))) != 0;
    first_ = kWide ? L::mul(L::set(0.5f), scale) : scale;
    second_ = kWide ? middle : bias;
  }

  // to + step * the product of one group, whose sum is `all`; `sums` is what L::tile emits: set -
  // clear if wide, set if not.
  ONEBIT_INLINE Vec add_to(Vec to, Ints sums, int32_t all, float step) const {
    if (__builtin_expect(lopsided_, 0)) return add_lopsided(to, sums, all, step);
    const Vec product = L::mul(first_, L::to_floats(sums));
    return L::fma(second_, L::set(step * float(all)), L::fma(L::set(step), product, to));
  }

 private:
  ONEBIT_INLINE Vec add_lopsided(Vec to, Ints sums, int32_t group, float step) const {
    const Ints all = L::ints(group), set = kWide ? L::half_sum(sums, all) : sums;
    const Vec both = L::fma(L::set(2), bias_, scale_);
    const auto low_larger = L::negative(L::exclusive_or(scale_, both));  // high^2 - low^2 < 0
    const Vec smaller = L::choose(low_larger, L::add(scale_, bias_), bias_);
    const Ints v = L::choose(low_larger, L::sub_ints(all, set), set);
    const Ints difference = L::sub_ints(L::add_ints(v, v), all);
    const Vec product = L::mul(both, L::to_floats(v));
    return L::fma(L::set(step), L::fnma(smaller, L::to_floats(difference), product), to);
  }

  Vec scale_, bias_, first_, second_;
  bool lopsided_;
};

}  // namespace
}  // namespace onebit::cpu

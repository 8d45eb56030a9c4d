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
  bool one_sided;      // of float32 only: sums of others are rounded more anyway
};

// Groups beyond are multiplied value by value: nothing in between over- or underflows.
constexpr float kLeastSum = 0x1p-90f, kMostSum = 0x1p90f;

// Whether values, whose sizes add up to `sizes`, are of one sign and alike: the square of their
// mean is more than half the mean of their squares. Zeros for half of them make less, normally
// distributed ones do once in 10^4 groups.
template <class L, int kCount>
ONEBIT_INLINE bool is_one_sided(const float* x, float sum, float sizes) {
  if (!(2 * sum * sum > sizes * sizes)) return false;
  auto squares = L::zero();
  ONEBIT_UNROLL
  for (int i = 0; i < kCount; i += L::kLanes) {
    const auto v = L::load(x + i);
    squares = L::fma(v, v, squares);
  }
  return 2 * sum * sum > kCount * L::sum(squares);
}

enum class Fit { kNone, kCoarse, kGood };

// x[i] - step * q[i]
template <class L>
ONEBIT_INLINE typename L::Vec rest_of(typename L::Vec x, float step) {
  const auto q = L::to_floats(L::round(L::mul(x, L::set(1 / step))));
  return L::fnma(L::set(step), q, x);
}

// Whether a step is too coarse: the rests are more of x than half the tolerance, or 3 of 4 values
// have a rest above it; measured by their number too, for weights may be zero where the large ones
// are. Few values count as if they were 2 less. Sums of a wide plane lose nothing where values are
// alike: those have no rest.
template <class L, int kCount, bool kWide>
__attribute__((noinline)) bool is_coarse(
    const float* x, const float* original, float tolerance, float step, float size_of_all) {
  auto lost = L::zero();
  int coarse = 0, all = 0;
  ONEBIT_UNROLL
  for (int i = 0; i < kCount; i += L::kLanes) {
    const auto size = L::abs(L::load(original + i));
    const auto loss = L::abs(rest_of<L>(L::load(x + i), step));
    lost = L::add(lost, loss);
    coarse += __builtin_popcount(L::greater_bits(loss, L::mul(size, L::set(tolerance))));
    all += __builtin_popcount(L::greater_bits(size, L::zero()));
  }
  if (coarse > 0 && 4 * coarse + 8 > 3 * all) return true;
  return !kWide && L::sum(lost) > 0.5f * tolerance * size_of_all;
}

// One plane of x.
template <class L, class Integer, int kCount>
ONEBIT_INLINE Fit make_plane(const float* x,
                             const float* original,
                             float tolerance,
                             Planes<Integer, kCount>& planes,
                             int plane) {
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
  const float step = float_of(exponent), largest_rest = 0.5f * step;
  const auto inverse = L::set(float_of(0x7f000000 - exponent));
  const auto large = L::set(largest_rest * (1 / tolerance));  // has no rest above the tolerance
  auto sum = L::ints(0);
  int good = 0;
  ONEBIT_UNROLL
  for (int i = 0; i < kCount; i += L::kLanes) {
    const auto q = L::round(L::mul(L::load(x + i), inverse));
    L::store_ints(planes.q[plane] + i, kWide ? L::add_ints(q, q) : q);
    sum = L::add_ints(sum, q);
    good += __builtin_popcount(L::greater_bits(L::abs(L::load(original + i)), large));
  }
  planes.step[plane] = step;
  planes.sum[plane] = L::sum_ints(sum);
  if (kWide && plane == 0 && tolerance == tolerance_of(DType::kFloat)) {
    planes.one_sided = is_one_sided<L, kCount>(x, step * planes.sum[0], size_of_all);
  }
  // Mostly seen without a look at the rests.
  if (4 * good >= kCount + 8 &&
      (kWide || kCount * largest_rest <= 0.5f * tolerance * size_of_all)) {
    return Fit::kGood;
  }
  return is_coarse<L, kCount, kWide>(x, original, tolerance, step, size_of_all) ? Fit::kCoarse
                                                                                : Fit::kGood;
}

template <class L, class Integer, int kCount>
ONEBIT_INLINE void to_planes(const float* x, DType dtype, Planes<Integer, kCount>& planes) {
  const float tolerance = tolerance_of(dtype);
  planes.one_sided = false;
  const Fit first = make_plane<L>(x, x, tolerance, planes, 0);
  planes.count = first == Fit::kGood;
  if (__builtin_expect(first == Fit::kCoarse, 0)) {
    alignas(64) float rest[kCount];
    for (int i = 0; i < kCount; i += L::kLanes) {
      L::store(rest + i, rest_of<L>(L::load(x + i), planes.step[0]));
    }
    planes.count = make_plane<L>(rest, x, tolerance, planes, 1) == Fit::kGood ? 2 : 0;
  }
}

// Sums of integers, as `tile` emits them: some instruction sets have them as floats, exact as well.
template <class L>
ONEBIT_INLINE typename L::Vec floats_of(typename L::Ints sums) {
  return L::to_floats(sums);
}
template <class L>
ONEBIT_INLINE typename L::Vec floats_of(typename L::Vec sums) {
  return sums;
}
template <class L>
ONEBIT_INLINE typename L::Ints ints_of(typename L::Ints sums) {
  return sums;
}
template <class L>
ONEBIT_INLINE typename L::Ints ints_of(typename L::Vec sums) {
  return L::round(sums);
}

// With the two levels of a weight low = bias and high = scale + bias, and the sums of a group over
// clear and set bits, a product is low * clear + high * set. If either is large and meets a level
// near zero, or both are and their products cancel, it must not be computed from a sum and a
// difference that were rounded. Levels on both sides of 0, neither 3 times the other, the usual
// ones:
//
//   product = scale / 2 * (set - clear) + (low + high) / 2 * (sum of the group)
//
// where wide sums come as the difference, exact (16-bit sums are short enough for scale * set +
// bias * all). Others, with v the sum that the larger level meets:
//
//   product = (low + high) * v - smaller * (v - (sum of the group - v))
//
// A level of zero then leaves the first term. A product is rounded once more when it is added.
template <class L>
class Levels {
 public:
  using Vec = typename L::Vec;
  using Ints = typename L::Ints;
  static constexpr bool kWide = sizeof(typename L::Integer) == 4;

  ONEBIT_INLINE Levels(Vec scale, Vec bias) : scale_(scale), bias_(bias) {}

  // Negative in the lanes where `usual` was and these levels are usual.
  ONEBIT_INLINE Vec keep_usual(Vec usual) const {
    return L::keep_negative(usual, L::fma(L::set(0.75f), scale_, bias_),
                            L::fma(L::set(0.25f), scale_, bias_));
  }
  ONEBIT_INLINE bool are_usual() const { return L::all_negative(keep_usual(L::set(-1))); }

  // to + the product of one group of usual levels. `sums` is what L::tile emits: set - clear if
  // wide, set if not; `unit` what they count, half a step or a step; `all` the sum of the group in
  // units.
  ONEBIT_INLINE Vec add_usual(Vec to, Vec sums, float unit, float all) const {
    const Vec second = kWide ? L::fma(L::set(0.5f), scale_, bias_) : bias_;
    const Vec product = L::fma(second, L::set(all), L::mul(scale_, sums));
    return L::fma(L::set(unit), product, to);
  }

  // The same for any levels, with the sum of the group in steps.
  ONEBIT_INLINE Vec add_any(Vec to, Ints sums, float unit, int32_t group) const {
    const Ints all = L::ints(group), set = kWide ? L::half_sum(sums, all) : sums;
    const Vec both = L::fma(L::set(2), bias_, scale_);
    const auto low_larger = L::negative(L::exclusive_or(scale_, both));  // high^2 - low^2 < 0
    const Vec smaller = L::choose(low_larger, L::add(scale_, bias_), bias_);
    const Ints v = L::choose(low_larger, L::sub_ints(all, set), set);
    const Ints difference = L::sub_ints(L::add_ints(v, v), all);
    const Vec product = L::mul(both, L::to_floats(v));
    return L::fma(L::set(kWide ? 2 * unit : unit),
                  L::fnma(smaller, L::to_floats(difference), product), to);
  }

 private:
  Vec scale_, bias_;
};

// A vector of floats or integers as two of doubles.
template <class L>
struct Halves {
  static constexpr int kCount = L::kLanes / 2;
  typedef double Doubles __attribute__((vector_size(kCount * sizeof(double))));

  Doubles half[2];

  ONEBIT_INLINE explicit Halves(const double* p) { std::memcpy(half, p, sizeof half); }
  ONEBIT_INLINE explicit Halves(typename L::Vec v) { convert<float>(v); }
  ONEBIT_INLINE explicit Halves(typename L::Ints v) { convert<int32_t>(v); }

  ONEBIT_INLINE void store(double* p) const { std::memcpy(p, half, sizeof half); }
  ONEBIT_INLINE void add(const Halves& v, double factor) {
    for (int i = 0; i < 2; ++i) half[i] += v.half[i] * factor;
  }
  ONEBIT_INLINE void add(const Halves& v, const Halves& factor) {
    for (int i = 0; i < 2; ++i) half[i] += v.half[i] * factor.half[i];
  }

 private:
  template <class T, class V>
  ONEBIT_INLINE void convert(V v) {
    typedef T Some __attribute__((vector_size(kCount * sizeof(T))));
    Some some[2];
    std::memcpy(some, &v, sizeof some);
    for (int i = 0; i < 2; ++i) half[i] = __builtin_convertvector(some[i], Doubles);
  }
};

// The same in double, for any levels. Where the values of a group are of one sign, products of
// groups are large and may cancel; what rounding them in float costs is then too much.
template <class L>
class DoubleLevels {
 public:
  ONEBIT_INLINE DoubleLevels(typename L::Vec scale, typename L::Vec bias)
      : scale_(scale), bias_(bias) {}

  // to[L::kLanes] += the product of one group.
  ONEBIT_INLINE void add(double* to, typename L::Ints sums, double unit, double group) const {
    using Doubles = typename Halves<L>::Doubles;
    const Halves<L> difference(sums);
    ONEBIT_UNROLL
    for (int i = 0; i < 2; ++i, to += Halves<L>::kCount) {
      Doubles set = scale_.half[i] * (difference.half[i] + group);
      Doubles all = bias_.half[i] * (2 * group), sum;
      asm("" : ONEBIT_VECTOR(set), ONEBIT_VECTOR(all));  // no fma: what cancels shall give 0
      std::memcpy(&sum, to, sizeof sum);
      sum += unit * (set + all);
      std::memcpy(to, &sum, sizeof sum);
    }
  }

 private:
  Halves<L> scale_, bias_;
};

}  // namespace
}  // namespace onebit::cpu

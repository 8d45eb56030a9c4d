// Two levels for a group of real weights, in the arithmetic of csrc/cpu/kernels/levels-inl.h:
//
//   bit(v) = (v - origin) > threshold,   w_hat(v) = bit(v) ? high : low
//
//   rule      origin  threshold     low, high
//   minmax    min     (max-min)/2   min, max
//   sign      0       0             -+ mean|v|
//   mean      mean    0             mean -+ mean|v - mean|
//   optimal   0       best cut      means of the values below and above
//
// Where a bit or a level comes from, no product is added to anything: a compiler has nothing to
// fuse, and the results have the bits of the CPU's. Products with importance are the exception.
#pragma once
#include "best_cut.h"

struct TwoLevels {
  float origin, threshold, low, high;
};

inline bool bit_of(TwoLevels levels, float value) {
  return value - levels.origin > levels.threshold;
}

// The first of the least and of the greatest values. A group that begins with NaN is NaN, as on the
// CPU; other NaNs are skipped.
struct Extremes {
  uint least, greatest;
};
inline Extremes extremes_of(float4 value) {
  const bool spoilt = isnan(value_at(value, 0));
  Extremes at = {spoilt ? 0 : first_least(value), spoilt ? 0 : first_greatest(value)};
  return at;
}

inline float mean_magnitude(float4 value, float origin, float4 weight, float mass, uint lane) {
  float4 term = float4(0.0f);
  ONEBIT_UNROLL
  for (uint i = 0; i < kGroupWords; i++) term[i] = weight[i] * fabs(value[i] - origin);
  return group_sum(term, lane) / mass;
}

// weight: importance, or ones.
inline TwoLevels levels_of(float4 value, float4 weight, uint lane) {
  TwoLevels levels = {0, 0, 0, 0};
  if (rule_is(Rule::kMinMax)) {
    const Extremes at = extremes_of(value);
    levels.low = levels.origin = value_at(value, at.least);
    levels.high = value_at(value, at.greatest);
    levels.threshold = (levels.high - levels.low) * 0.5f;
  } else if (rule_is(Rule::kOptimal)) {
    const Cut cut = best_cut(value, weight, lane);
    levels.threshold = cut.threshold;
    levels.low = cut.low;
    levels.high = cut.high;
  } else {
    const float mass = kHasImportance ? group_sum(weight, lane) : float(kGroupWords * kLanes);
    if (rule_is(Rule::kMean)) levels.origin = group_sum(value, lane) / mass;
    const float deviation = mean_magnitude(value, levels.origin, weight, mass, lane);
    levels.low = rule_is(Rule::kMean) ? levels.origin - deviation : -deviation;
    levels.high = levels.origin + deviation;
  }
  return levels;
}

// grad, and what flows to the weights through the levels.
inline float4 through_levels(float4 value, TwoLevels levels, float4 grad, uint lane) {
  const float count = float(kGroupWords * kLanes);
  float4 of_high = float4(0.0f);
  ONEBIT_UNROLL
  for (uint i = 0; i < kGroupWords; i++) of_high[i] = bit_of(levels, value[i]) ? grad[i] : 0.0f;
  const float total = group_sum(grad, lane);
  const float high = group_sum(of_high, lane), low = total - high;

  if (rule_is(Rule::kMinMax)) {
    const Extremes at = extremes_of(value);
    ONEBIT_UNROLL
    for (uint i = 0; i < kGroupWords; i++) {
      if (i * kLanes + lane == at.least) grad[i] += low;
      if (i * kLanes + lane == at.greatest) grad[i] += high;
    }
    return grad;
  }
  if (rule_is(Rule::kOptimal)) {
    float above = 0;
    ONEBIT_UNROLL
    for (uint i = 0; i < kGroupWords; i++) {
      above += float(popcount(uint(ulong(simd_ballot(bit_of(levels, value[i]))))));
    }
    const float to_high = above > 0 ? high / above : 0.0f;
    const float to_low = above < count ? low / (count - above) : 0.0f;
    ONEBIT_UNROLL
    for (uint i = 0; i < kGroupWords; i++) {
      grad[i] += bit_of(levels, value[i]) ? to_high : to_low;
    }
    return grad;
  }
  // sign and mean: the levels follow the magnitudes around the origin, and the mean itself.
  float4 side = float4(0.0f);
  ONEBIT_UNROLL
  for (uint i = 0; i < kGroupWords; i++) {
    const float distance = value[i] - levels.origin;
    side[i] = (distance > 0 ? 1.0f : 0.0f) - (distance < 0 ? 1.0f : 0.0f);
  }
  const float slope = (high - low) / count;
  float shift = 0;
  if (rule_is(Rule::kMean)) shift = fma(-slope, group_sum(side, lane) / count, total / count);
  ONEBIT_UNROLL
  for (uint i = 0; i < kGroupWords; i++) grad[i] += shift + slope * side[i];
  return grad;
}

// Where to cut a group in two, as csrc/cpu/kernels/best_cut-inl.h does: sorted, then every cut is
// tried.
#pragma once
#include "group.h"

// What lies `stride` values away, a power of two: in another lane or in another component.
inline float across(float4 value, uint i, uint stride) {
  if (stride < kLanes) return simd_shuffle_xor(value[i], ushort(stride));
  return stride == kLanes ? value[i ^ 1] : value[i ^ 2];
}

// Bitonic: 15, 21 or 28 compare-exchanges of every value. Weights follow their values.
inline void sort_group(thread float4& value, thread float4& weight, uint lane) {
  for (uint block = 2; block <= kGroupWords * kLanes; block *= 2) {
    for (uint stride = block / 2; stride > 0; stride /= 2) {
      const float4 values = value, weights = weight;
      ONEBIT_UNROLL
      for (uint i = 0; i < kGroupWords; i++) {
        const uint at = i * kLanes + lane;
        const bool keeps_less = ((at & stride) == 0) == ((at & block) == 0);
        const float other = across(values, i, stride);
        // Both sides decide alike, so that neither a NaN nor one of two equal values is lost.
        const bool swaps = keeps_less ? other < values[i] : values[i] < other;
        value[i] = swaps ? other : values[i];
        if (kHasImportance) {
          const float other_weight = across(weights, i, stride);
          weight[i] = swaps ? other_weight : weights[i];
        }
      }
    }
  }
}

// Sums of the sorted group up to each value. One value after the other, as the CPU adds: a scan in
// five steps rounds otherwise, and of cuts that are nearly equal would choose another.
struct Running {
  float4 upto;
  float total;
};
inline Running running_sum(float4 term, uint lane) {
  Running sum = {float4(0.0f), 0.0f};
  ONEBIT_UNROLL
  for (uint i = 0; i < kGroupWords; i++) {
    for (uint l = 0; l < kLanes; l++) {
      sum.total += simd_shuffle(term[i], ushort(l));
      sum.upto[i] = l == lane ? sum.total : sum.upto[i];
    }
  }
  return sum;
}

// bit = value > threshold; low and high are the means of the two sides.
struct Cut {
  float threshold, low, high;
};

// The cut with the least squared error. With the mean taken away the sides sum to s and -s, and the
// error falls by s^2 (1 / mass_low + 1 / mass_high): one running sum decides.
inline Cut best_cut(float4 value, float4 weight, uint lane) {
  const uint size = kGroupWords * kLanes;
  sort_group(value, weight, lane);
  Running mass = {float4(0.0f), float(size)};
  if (kHasImportance) mass = running_sum(weight, lane);
  const float total = mass.total;
  const float mean = running_sum(value * weight, lane).total / total;
  const float4 below = running_sum((value - mean) * weight, lane).upto;
  float4 score = float4(0.0f);
  ONEBIT_UNROLL
  for (uint i = 0; i < kGroupWords; i++) {
    const uint at = i * kLanes + lane;
    const float square = below[i] * below[i];
    if (kHasImportance) {
      // No cut leaves a side without importance: its sum is rounding, divided by 0. (When it is the
      // lower one, 0 / 0: NaN is never better.)
      const float rest = total - mass.upto[i];
      score[i] = rest > 0 ? square / (mass.upto[i] * rest) : NAN;
    } else {
      score[i] = square * (1.0f / (float(at + 1) * float(size - 1 - at)));
    }
    if (at == size - 1) score[i] = NAN;  // not a cut
  }
  Cut cut;
  cut.threshold = value_at(value, first_greatest(score));

  // Means are taken from the outermost value on: a side of equal values keeps them exactly, so
  // weights that are already binary lose nothing.
  const float lowest = value_at(value, 0), highest = value_at(value, size - 1);
  float4 above = float4(0.0f), under = above, in_high = above;
  ONEBIT_UNROLL
  for (uint i = 0; i < kGroupWords; i++) {
    in_high[i] = value[i] > cut.threshold ? weight[i] : 0.0f;
    above[i] = (value[i] - lowest) * (weight[i] - in_high[i]);
    under[i] = (highest - value[i]) * in_high[i];
  }
  const float high_mass = running_sum(in_high, lane).total, low_mass = total - high_mass;
  const float low = lowest + running_sum(above, lane).total / low_mass;
  const float high = highest - running_sum(under, lane).total / high_mass;
  // A side without importance takes the other's level.
  cut.low = low_mass > 0 ? low : high;
  cut.high = high_mass > 0 ? high : low;
  return cut;
}

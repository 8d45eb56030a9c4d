// Quantizing by a rule, and training through it: two levels for a group of real weights, in the
// arithmetic of csrc/cpu/levels-inl.h and in its order, so that bits and levels are the CPU's.
// Compiled without contraction to fused multiply-adds.
//
//   rule      origin  threshold     low, high
//   minmax    min     (max-min)/2   min, max
//   sign      0       0             -+ mean|v|
//   mean      mean    0             mean -+ mean|v - mean|
//   optimal   0       best cut      means of the values below and above
//
// A warp owns a group: lane l holds values l, 32 + l, ... in registers, read once, written once.
//   ONEBIT_X      dtype of w, ONEBIT_OUT that of fake-quantized weights and of their gradient
//   ONEBIT_RULE   a Rule
//   ONEBIT_HAS_IMPORTANCE
#include "common.cuh"

using W = ONEBIT_X;
using Level = ONEBIT_LEVELS;
using Other = ONEBIT_OUT;
constexpr Rule kRule = Rule(ONEBIT_RULE);
constexpr bool kHasImportance = ONEBIT_HAS_IMPORTANCE;

struct Group {
  float v[kGroupWords];
  __device__ __forceinline__ float& operator[](int i) { return v[i]; }
  __device__ __forceinline__ float operator[](int i) const { return v[i]; }
};
#define ONEBIT_EACH(i) ONEBIT_UNROLL for (int i = 0; i < kGroupWords; i++)

// --- A group in memory ---

__device__ __forceinline__ int64_t group_of_warp() {
  return int64_t(blockIdx.x) * kGroupWarps + (threadIdx.x >> 5);
}
__device__ __forceinline__ int lane_id() { return threadIdx.x & 31; }

template <class T>
__device__ __forceinline__ Group read_group(const void* values, int64_t group) {
  Group result;
  ONEBIT_EACH(i) {
    result[i] = to_float(static_cast<const T*>(values)[(group * kGroupWords + i) * 32 + lane_id()]);
  }
  return result;
}
template <class T>
__device__ __forceinline__ void write_group(void* values, int64_t group, const Group& g) {
  ONEBIT_EACH(i) {
    static_cast<T*>(values)[(group * kGroupWords + i) * 32 + lane_id()] = from_float<T>(g[i]);
  }
}
__device__ __forceinline__ Group all(float v) {
  Group result;
  ONEBIT_EACH(i) result[i] = v;
  return result;
}

// --- Sums and extremes ---

// The sum in the order of the CPU kernels, 16 partial sums that are then halved: v > mean must not
// depend on the device.
__device__ __forceinline__ float group_sum(const Group& term) {
  const bool first = lane_id() < 16;
  float sum = 0;
  ONEBIT_EACH(i) {
    const float other = __shfl_xor_sync(kAll, term[i], 16);
    sum += first ? term[i] : other;
    sum += first ? other : term[i];
  }
  ONEBIT_UNROLL
  for (int width = 8; width > 0; width /= 2) sum += __shfl_xor_sync(kAll, sum, width);
  return sum;
}

__device__ __forceinline__ float value_at(const Group& value, int at) {
  float found = 0;
  ONEBIT_EACH(i) found = at / 32 == i ? value[i] : found;
  return __shfl_sync(kAll, found, at % 32);
}

// Orders floats as integers: both zeros are 0, and NaN is below all.
__device__ __forceinline__ int order_of(float value, bool descending) {
  if (isnan(value)) return int(0x80000000u);
  const int bits = __float_as_int(value), magnitude = bits & 0x7fffffff;
  return (bits < 0) != descending ? -magnitude : magnitude;
}

// Where the greatest value is, or the least; of equal ones, which a zero's sign tells apart, the
// first. NaN only when there is nothing else.
__device__ __forceinline__ int first_extreme(const Group& value, bool least) {
  int extreme = int(0x80000000u);
  ONEBIT_EACH(i) extreme = max(extreme, order_of(value[i], least));
  extreme = __reduce_max_sync(kAll, extreme);
  int at = 0;
  ONEBIT_UNROLL
  for (int i = kGroupWords; i-- > 0;) {
    const uint32_t hits = __ballot_sync(kAll, order_of(value[i], least) == extreme);
    at = hits != 0 ? i * 32 + __ffs(hits) - 1 : at;
  }
  return at;
}

// The first of the least and of the greatest values. A group that begins with NaN is NaN, as on the
// CPU; other NaNs are skipped.
struct Extremes {
  int least, greatest;
};
__device__ __forceinline__ Extremes extremes_of(const Group& value) {
  const bool spoilt = isnan(value_at(value, 0));
  return {spoilt ? 0 : first_extreme(value, true), spoilt ? 0 : first_extreme(value, false)};
}

// --- Where to cut a group in two, as csrc/cpu/best_cut-inl.h does: sorted, then every cut ---

// Bitonic: 15, 21 or 28 compare-exchanges of every value. Weights follow their values.
__device__ __forceinline__ void sort_group(Group& value, Group& weight) {
  const int lane = lane_id();
  ONEBIT_UNROLL
  for (int block = 2; block <= kGroupSize; block *= 2) {
    ONEBIT_UNROLL
    for (int stride = block / 2; stride > 0; stride /= 2) {
      const Group values = value, weights = weight;
      ONEBIT_EACH(i) {
        const int at = i * 32 + lane;
        const bool keeps_less = ((at & stride) == 0) == ((at & block) == 0);
        const auto across = [&](const Group& g) {
          if (stride < 32) return __shfl_xor_sync(kAll, g[i], stride);
          return g[i ^ (stride / 32)];
        };
        const float other = across(values);
        // Both sides decide alike, so that neither a NaN nor one of two equal values is lost.
        const bool swaps = keeps_less ? other < values[i] : values[i] < other;
        value[i] = swaps ? other : values[i];
        if (kHasImportance) {
          const float other_weight = across(weights);
          weight[i] = swaps ? other_weight : weights[i];
        }
      }
    }
  }
}

// Sums of the sorted group up to each value. One value after the other, as the CPU adds: a scan in
// five steps rounds otherwise, and of cuts that are nearly equal would choose another.
struct Running {
  Group upto;
  float total;
};
__device__ __forceinline__ Running running_sum(const Group& term) {
  Running sum = {all(0.0f), 0.0f};
  ONEBIT_EACH(i) {
#pragma unroll 8  // in full, a rule compiles for 18 s
    for (int l = 0; l < 32; l++) {
      sum.total += __shfl_sync(kAll, term[i], l);
      sum.upto[i] = l == lane_id() ? sum.total : sum.upto[i];
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
__device__ __forceinline__ Cut best_cut(Group value, Group weight) {
  sort_group(value, weight);
  Running mass = {all(0.0f), float(kGroupSize)};
  if (kHasImportance) mass = running_sum(weight);
  const float total = mass.total;
  Group term;
  ONEBIT_EACH(i) term[i] = value[i] * weight[i];
  const float mean = running_sum(term).total / total;
  ONEBIT_EACH(i) term[i] = (value[i] - mean) * weight[i];
  const Group below = running_sum(term).upto;
  Group score;
  ONEBIT_EACH(i) {
    const int at = i * 32 + lane_id();
    const float square = below[i] * below[i];
    if (kHasImportance) {
      // No cut leaves a side without importance: its sum is rounding, divided by 0. (When it is the
      // lower one, 0 / 0: NaN is never better.)
      const float rest = total - mass.upto[i];
      score[i] = rest > 0 ? square / (mass.upto[i] * rest) : nan_value();
    } else {
      score[i] = square * (1.0f / (float(at + 1) * float(kGroupSize - 1 - at)));
    }
    if (at == kGroupSize - 1) score[i] = nan_value();  // not a cut
  }
  Cut cut;
  cut.threshold = value_at(value, first_extreme(score, false));

  // Means are taken from the outermost value on: a side of equal values keeps them exactly, so
  // weights that are already binary lose nothing.
  const float lowest = value_at(value, 0), highest = value_at(value, kGroupSize - 1);
  Group above, under, in_high;
  ONEBIT_EACH(i) {
    in_high[i] = value[i] > cut.threshold ? weight[i] : 0.0f;
    above[i] = (value[i] - lowest) * (weight[i] - in_high[i]);
    under[i] = (highest - value[i]) * in_high[i];
  }
  const float high_mass = running_sum(in_high).total, low_mass = total - high_mass;
  const float low = lowest + running_sum(above).total / low_mass;
  const float high = highest - running_sum(under).total / high_mass;
  // A side without importance takes the other's level.
  cut.low = low_mass > 0 ? low : high;
  cut.high = high_mass > 0 ? high : low;
  return cut;
}

// --- Levels by rule ---

struct TwoLevels {
  float origin, threshold, low, high;
};
__device__ __forceinline__ bool bit_of(const TwoLevels& levels, float value) {
  return value - levels.origin > levels.threshold;
}

__device__ __forceinline__ TwoLevels levels_of(const Group& value, const Group& weight) {
  TwoLevels levels = {0, 0, 0, 0};
  if constexpr (kRule == Rule::kMinMax) {
    const Extremes at = extremes_of(value);
    levels.low = levels.origin = value_at(value, at.least);
    levels.high = value_at(value, at.greatest);
    levels.threshold = (levels.high - levels.low) * 0.5f;
  } else if constexpr (kRule == Rule::kOptimal) {
    const Cut cut = best_cut(value, weight);
    levels.threshold = cut.threshold;
    levels.low = cut.low;
    levels.high = cut.high;
  } else {
    const float mass = kHasImportance ? group_sum(weight) : float(kGroupSize);
    if (kRule == Rule::kMean) levels.origin = group_sum(value) / mass;
    Group term;
    ONEBIT_EACH(i) term[i] = weight[i] * fabsf(value[i] - levels.origin);
    const float deviation = group_sum(term) / mass;
    levels.low = kRule == Rule::kMean ? levels.origin - deviation : -deviation;
    levels.high = levels.origin + deviation;
  }
  return levels;
}

// grad, and what flows to the weights through the levels.
__device__ __forceinline__ Group through_levels(const Group& value,
                                                const TwoLevels& levels,
                                                Group grad) {
  constexpr float kCount = float(kGroupSize);
  Group of_high;
  ONEBIT_EACH(i) of_high[i] = bit_of(levels, value[i]) ? grad[i] : 0.0f;
  const float total = group_sum(grad);
  const float high = group_sum(of_high), low = total - high;
  if constexpr (kRule == Rule::kMinMax) {
    const Extremes at = extremes_of(value);
    ONEBIT_EACH(i) {
      if (i * 32 + lane_id() == at.least) grad[i] += low;
      if (i * 32 + lane_id() == at.greatest) grad[i] += high;
    }
  } else if constexpr (kRule == Rule::kOptimal) {
    float above = 0;
    ONEBIT_EACH(i) above += float(__popc(__ballot_sync(kAll, bit_of(levels, value[i]))));
    const float to_high = above > 0 ? high / above : 0.0f;
    const float to_low = above < kCount ? low / (kCount - above) : 0.0f;
    ONEBIT_EACH(i) grad[i] += bit_of(levels, value[i]) ? to_high : to_low;
  } else {
    // The levels follow the magnitudes around the origin, and the mean itself.
    Group side;
    ONEBIT_EACH(i) {
      const float distance = value[i] - levels.origin;
      side[i] = (distance > 0 ? 1.0f : 0.0f) - (distance < 0 ? 1.0f : 0.0f);
    }
    const float slope = (high - low) / kCount;
    float shift = 0;
    if (kRule == Rule::kMean) shift = fmaf(-slope, group_sum(side) / kCount, total / kCount);
    ONEBIT_EACH(i) grad[i] += shift + slope * side[i];
  }
  return grad;
}

ONEBIT_KERNEL __launch_bounds__(kGroupWarps * 32)
    quantize_levels(const __grid_constant__ GroupArgs p) {
  const int64_t group = group_of_warp();
  if (group >= p.groups) return;
  const Group value = read_group<W>(p.w, group);
  Group weight = all(1.0f);
  if constexpr (kHasImportance) {
    const Group given = read_group<Float>(p.importance, group % p.period);
    // A group that matters to nobody is cut as if all its values mattered.
    if (group_sum(given) > 0) weight = given;
  }
  const TwoLevels levels = levels_of(value, weight);
  ONEBIT_EACH(i) {
    const uint32_t bits = __ballot_sync(kAll, bit_of(levels, value[i]));
    if (lane_id() == 0) p.packed[group * kGroupWords + i] = bits;
  }
  if (lane_id() == 0) {
    static_cast<W*>(p.first)[group] = from_float<W>(levels.high - levels.low);
    static_cast<W*>(p.second)[group] = from_float<W>(levels.low);
  }
}

ONEBIT_KERNEL __launch_bounds__(kGroupWarps * 32)
    fake_quantize(const __grid_constant__ GroupArgs p) {
  const int64_t group = group_of_warp();
  if (group >= p.groups) return;
  Group value = read_group<W>(p.w, group);
  const TwoLevels levels = levels_of(value, all(1.0f));
  // As dequantize adds: a zero loses its sign.
  const float low = 0.0f + levels.low, high = 0.0f + levels.high;
  ONEBIT_EACH(i) value[i] = bit_of(levels, value[i]) ? high : low;
  write_group<Other>(p.out, group, value);
}

// grad_w = grad + (d levels / d w)^T grad: straight through for the bit, exact for the levels.
ONEBIT_KERNEL __launch_bounds__(kGroupWarps * 32)
    fake_quantize_backward(const __grid_constant__ GroupArgs p) {
  const int64_t group = group_of_warp();
  if (group >= p.groups) return;
  const Group value = read_group<W>(p.w, group);
  const TwoLevels levels = levels_of(value, all(1.0f));
  write_group<W>(p.out, group, through_levels(value, levels, read_group<Other>(p.grad, group)));
}

// --- Free levels: w_hat = scale * bit + bias, each weight takes the nearer ---

// A negative scale swaps the levels: the bit still picks the nearer one.
__device__ __forceinline__ bool nearer_high(float value, float scale, float bias) {
  const float distance = value - bias, half_way = scale * 0.5f;
  return scale < 0 ? distance < half_way : distance > half_way;
}

ONEBIT_KERNEL __launch_bounds__(kGroupWarps * 32)
    fake_quantize_affine(const __grid_constant__ GroupArgs p) {
  const int64_t group = group_of_warp();
  if (group >= p.groups) return;
  const float scale = to_float(static_cast<const Level*>(p.scales)[group]);
  const float bias = to_float(static_cast<const Level*>(p.biases)[group]);
  const float low = 0.0f + bias, high = low + scale;
  Group value = read_group<W>(p.w, group);
  ONEBIT_EACH(i) value[i] = nearer_high(value[i], scale, bias) ? high : low;
  write_group<Other>(p.out, group, value);
}

// grad_scale is the sum of grad where the bit is 1, grad_bias all of it.
ONEBIT_KERNEL __launch_bounds__(kGroupWarps * 32)
    fake_quantize_affine_backward(const __grid_constant__ GroupArgs p) {
  const int64_t group = group_of_warp();
  if (group >= p.groups) return;
  const float scale = to_float(static_cast<const Level*>(p.scales)[group]);
  const float bias = to_float(static_cast<const Level*>(p.biases)[group]);
  const Group value = read_group<W>(p.w, group);
  Group through = read_group<Other>(p.grad, group);
  const float bias_sum = group_sum(through);
  ONEBIT_EACH(i) through[i] = nearer_high(value[i], scale, bias) ? through[i] : 0.0f;
  const float scale_sum = group_sum(through);
  if (lane_id() == 0) {
    static_cast<Level*>(p.first)[group] = from_float<Level>(scale_sum);
    static_cast<Level*>(p.second)[group] = from_float<Level>(bias_sum);
  }
}

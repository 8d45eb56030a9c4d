// Quantizing by a rule, and training through it: two levels for a group of real weights, in the
// arithmetic of csrc/cpu/kernels/levels-inl.h and in its order, so that bits and levels are the
// CPU's. Compiled without contraction to fused multiply-adds.
//
//   rule      origin  threshold     low, high
//   minmax    min     (max-min)/2   min, max
//   sign      0       0             -+ mean|v|
//   mean      mean    0             mean -+ mean|v - mean|
//   optimal   0       best cut      means of the values below and above
//
// A warp owns a group, or several: lane l holds values l, 32 + l, ... in registers, read once,
// written once.
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

constexpr int kTurns =
    groups_of_warp(kRule, kHasImportance);  // groups of a warp, one after another
#define ONEBIT_EACH_TURN(turn) ONEBIT_UNROLL for (int turn = 0; turn < kTurns; turn++)

// --- A group in memory ---

// Past the end the last group is read again, for a block's warps wait for each other. It is not
// written again.
template <int turns = 1>
__device__ __forceinline__ bool past_the_end(const GroupArgs& p, int turn = 0) {
  const int64_t warp = int64_t(blockIdx.x) * kGroupWarps + (threadIdx.x >> 5);
  return warp * turns + turn >= p.groups;
}
template <int turns = 1>
__device__ __forceinline__ int64_t group_of_warp(const GroupArgs& p, int turn = 0) {
  const int64_t warp = int64_t(blockIdx.x) * kGroupWarps + (threadIdx.x >> 5);
  return min(warp * turns + turn, p.groups - 1);
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

// --- Where to cut a group in two, as csrc/cpu/kernels/best_cut-inl.h does: sorted, then every cut
// ---

// Orders floats as integers, and back: nothing is lost, neither a NaN nor the sign of a zero.
__device__ __forceinline__ int sort_key(int bits) { return bits ^ (bits >> 31 & 0x7fffffff); }

// Bitonic: 15, 21 or 28 compare-exchanges of every value, most of them within a lane: lane l holds
// values kGroupWords * l + i of the sorted group. Weights follow their values.
__device__ __forceinline__ void sort_group(Group& value, Group& weight) {
  const int lane = lane_id();
  int key[kGroupWords];
  ONEBIT_EACH(i) key[i] = sort_key(__float_as_int(value[i]));
  ONEBIT_UNROLL
  for (int block = 2; block <= kGroupSize; block *= 2) {
    ONEBIT_UNROLL
    for (int stride = block / 2; stride > 0; stride /= 2) {
      int others[kGroupWords];
      Group weights = weight;
      ONEBIT_EACH(i) {
        const bool near = stride < kGroupWords;
        others[i] = near ? key[i ^ stride] : __shfl_xor_sync(kAll, key[i], stride / kGroupWords);
        if constexpr (kHasImportance) {
          weights[i] =
              near ? weight[i ^ stride] : __shfl_xor_sync(kAll, weight[i], stride / kGroupWords);
        }
      }
      ONEBIT_EACH(i) {
        const int at = kGroupWords * lane + i;
        const bool keeps_less = ((at & stride) == 0) == ((at & block) == 0);
        if constexpr (kHasImportance) {  // both sides decide alike
          const bool swaps = keeps_less ? others[i] < key[i] : key[i] < others[i];
          weight[i] = swaps ? weights[i] : weight[i];
        }
        key[i] = keeps_less ? min(key[i], others[i]) : max(key[i], others[i]);
      }
    }
  }
  ONEBIT_EACH(i) value[i] = __int_as_float(sort_key(key[i]));
}

// bit = value > threshold; low and high are the means of the two sides.
struct Cut {
  float threshold, low, high;
};

// A sorted group is summed by one lane, value after value, as the CPU adds: a scan in five steps
// rounds otherwise, and of cuts that are nearly equal would choose another. One warp sums the
// groups of all, a lane each; the pitch keeps lanes out of each other's banks.
constexpr int kPitch = kGroupSize + 1;
constexpr int kCuts = kGroupWarps * kTurns;
struct Sorted {
  float value[kCuts][kPitch];
  float weight[kHasImportance ? kCuts : 1][kPitch];
  float below[kCuts][kPitch];                      // running sum of value - mean
  float mass[kHasImportance ? kCuts : 1][kPitch];  // running sum of weight
  float total[kCuts];
  Cut cut[kCuts];

  __device__ __forceinline__ float weight_of(int g, int i) const {
    return kHasImportance ? weight[kHasImportance ? g : 0][i] : 1.0f;
  }

  __device__ __forceinline__ void sum_up(int g) {
    float sum = 0, all_mass = 0;
#pragma unroll 8
    for (int i = 0; i < kGroupSize; i++) {
      sum += value[g][i] * weight_of(g, i);
      all_mass += weight_of(g, i);
    }
    const float mean = sum / all_mass;
    float running = 0, running_mass = 0;
#pragma unroll 8
    for (int i = 0; i < kGroupSize; i++) {
      running += (value[g][i] - mean) * weight_of(g, i);
      below[g][i] = running;
      if constexpr (kHasImportance) {
        running_mass += weight_of(g, i);
        mass[g][i] = running_mass;
      }
    }
    total[g] = all_mass;
  }

  // Means are taken from the outermost value on: a side of equal values keeps them exactly, so
  // weights that are already binary lose nothing.
  __device__ __forceinline__ void average_sides(int g) {
    const float threshold = cut[g].threshold;
    const float lowest = value[g][0], highest = value[g][kGroupSize - 1];
    float above = 0, under = 0, high_mass = 0;
#pragma unroll 8
    for (int i = 0; i < kGroupSize; i++) {
      const float v = value[g][i], w = weight_of(g, i), high = v > threshold ? w : 0.0f;
      above += (v - lowest) * (w - high);
      under += (highest - v) * high;
      high_mass += high;
    }
    const float low_mass = total[g] - high_mass;
    const float low = lowest + above / low_mass, high = highest - under / high_mass;
    // A side without importance takes the other's level.
    cut[g].low = low_mass > 0 ? low : high;
    cut[g].high = high_mass > 0 ? high : low;
  }
};

// The cut with the least squared error. With the mean taken away the sides sum to s and -s, and the
// error falls by s^2 (1 / mass_low + 1 / mass_high): one running sum decides. Called by every warp
// of the block.
__device__ __forceinline__ void best_cuts(const Group (&values)[kTurns],
                                          const Group (&weights)[kTurns],
                                          Cut (&cuts)[kTurns]) {
  __shared__ Sorted sorted;
  const int lane = lane_id(), first = (threadIdx.x >> 5) * kTurns;
  ONEBIT_EACH_TURN(turn) {
    Group value = values[turn], weight = weights[turn];
    sort_group(value, weight);
    ONEBIT_EACH(i) {
      sorted.value[first + turn][kGroupWords * lane + i] = value[i];
      if constexpr (kHasImportance) sorted.weight[first + turn][kGroupWords * lane + i] = weight[i];
    }
  }
  __syncthreads();
  if (threadIdx.x < kCuts) sorted.sum_up(threadIdx.x);
  __syncthreads();
#pragma unroll 1
  for (int turn = 0; turn < kTurns; turn++) {
    const int g = first + turn;
    Group score;
    ONEBIT_EACH(i) {
      const int at = i * 32 + lane;
      const float below = sorted.below[g][at], square = below * below;
      if constexpr (kHasImportance) {
        // No cut leaves a side without importance: its sum is rounding, divided by 0. (When it is
        // the lower one, 0 / 0: NaN is never better.)
        const float mass = sorted.mass[g][at], rest = sorted.total[g] - mass;
        score[i] = rest > 0 ? square / (mass * rest) : nan_value();
      } else {
        score[i] = square * (1.0f / (float(at + 1) * float(kGroupSize - 1 - at)));
      }
      if (at == kGroupSize - 1) score[i] = nan_value();  // not a cut
    }
    const int best = first_extreme(score, false);
    if (lane == 0) sorted.cut[g].threshold = sorted.value[g][best];
  }
  __syncthreads();
  if (threadIdx.x < kCuts) sorted.average_sides(threadIdx.x);
  __syncthreads();
  ONEBIT_EACH_TURN(turn) cuts[turn] = sorted.cut[first + turn];
}

// --- Levels by rule ---

struct TwoLevels {
  float origin, threshold, low, high;
};
__device__ __forceinline__ bool bit_of(const TwoLevels& levels, float value) {
  return value - levels.origin > levels.threshold;
}

// Of the groups of a warp. Called by every warp of the block.
__device__ __forceinline__ void levels_of(const Group (&values)[kTurns],
                                          const Group (&weights)[kTurns],
                                          TwoLevels (&found)[kTurns]) {
  if constexpr (kRule == Rule::kOptimal) {
    Cut cuts[kTurns];
    best_cuts(values, weights, cuts);
    ONEBIT_EACH_TURN(turn) {
      found[turn] = {0, cuts[turn].threshold, cuts[turn].low, cuts[turn].high};
    }
  } else {
    const Group &value = values[0], &weight = weights[0];
    TwoLevels levels = {0, 0, 0, 0};
    if constexpr (kRule == Rule::kMinMax) {
      const Extremes at = extremes_of(value);
      levels.low = levels.origin = value_at(value, at.least);
      levels.high = value_at(value, at.greatest);
      levels.threshold = (levels.high - levels.low) * 0.5f;
    } else {
      const float mass = kHasImportance ? group_sum(weight) : float(kGroupSize);
      if (kRule == Rule::kMean) levels.origin = group_sum(value) / mass;
      Group term;
      ONEBIT_EACH(i) term[i] = weight[i] * fabsf(value[i] - levels.origin);
      const float deviation = group_sum(term) / mass;
      levels.low = kRule == Rule::kMean ? levels.origin - deviation : -deviation;
      levels.high = levels.origin + deviation;
    }
    found[0] = levels;
  }
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
  Group value[kTurns], weight[kTurns];
  ONEBIT_EACH_TURN(turn) {
    const int64_t group = group_of_warp<kTurns>(p, turn);
    value[turn] = read_group<W>(p.w, group);
    weight[turn] = all(1.0f);
    if constexpr (kHasImportance) {
      const Group given = read_group<Float>(p.importance, group % p.period);
      // A group that matters to nobody is cut as if all its values mattered.
      if (group_sum(given) > 0) weight[turn] = given;
    }
  }
  TwoLevels levels[kTurns];
  levels_of(value, weight, levels);
  ONEBIT_EACH_TURN(turn) {
    if (past_the_end<kTurns>(p, turn)) return;
    const int64_t group = group_of_warp<kTurns>(p, turn);
    ONEBIT_EACH(i) {
      const uint32_t bits = __ballot_sync(kAll, bit_of(levels[turn], value[turn][i]));
      if (lane_id() == 0) p.packed[group * kGroupWords + i] = bits;
    }
    if (lane_id() == 0) {
      static_cast<W*>(p.first)[group] = from_float<W>(levels[turn].high - levels[turn].low);
      static_cast<W*>(p.second)[group] = from_float<W>(levels[turn].low);
    }
  }
}

// The groups of a warp, and their levels.
struct Leveled {
  Group value[kTurns];
  TwoLevels levels[kTurns];

  __device__ __forceinline__ explicit Leveled(const GroupArgs& p) {
    Group weight[kTurns];
    ONEBIT_EACH_TURN(turn) {
      value[turn] = read_group<W>(p.w, group_of_warp<kTurns>(p, turn));
      weight[turn] = all(1.0f);
    }
    levels_of(value, weight, levels);
  }
};

ONEBIT_KERNEL __launch_bounds__(kGroupWarps * 32)
    fake_quantize(const __grid_constant__ GroupArgs p) {
  const Leveled groups(p);
  ONEBIT_EACH_TURN(turn) {
    if (past_the_end<kTurns>(p, turn)) return;
    const int64_t group = group_of_warp<kTurns>(p, turn);
    const TwoLevels& levels = groups.levels[turn];
    // As dequantize adds: a zero loses its sign.
    const float low = 0.0f + levels.low, high = 0.0f + levels.high;
    Group value;
    ONEBIT_EACH(i) value[i] = bit_of(levels, groups.value[turn][i]) ? high : low;
    write_group<Other>(p.out, group, value);
  }
}

// grad_w = grad + (d levels / d w)^T grad: straight through for the bit, exact for the levels.
ONEBIT_KERNEL __launch_bounds__(kGroupWarps * 32)
    fake_quantize_backward(const __grid_constant__ GroupArgs p) {
  const Leveled groups(p);
  ONEBIT_EACH_TURN(turn) {
    if (past_the_end<kTurns>(p, turn)) return;
    const int64_t group = group_of_warp<kTurns>(p, turn);
    const Group grad = read_group<Other>(p.grad, group);
    write_group<W>(p.out, group, through_levels(groups.value[turn], groups.levels[turn], grad));
  }
}

// --- Free levels: w_hat = scale * bit + bias, each weight takes the nearer ---

// A negative scale swaps the levels: the bit still picks the nearer one.
__device__ __forceinline__ bool nearer_high(float value, float scale, float bias) {
  const float distance = value - bias, half_way = scale * 0.5f;
  return scale < 0 ? distance < half_way : distance > half_way;
}

ONEBIT_KERNEL __launch_bounds__(kGroupWarps * 32)
    fake_quantize_affine(const __grid_constant__ GroupArgs p) {
  if (past_the_end(p)) return;
  const int64_t group = group_of_warp(p);
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
  if (past_the_end(p)) return;
  const int64_t group = group_of_warp(p);
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

// Per group of w: bias = min, scale = max - min, bit = w - bias > scale / 2, by the rule of
// docs/format.md, bit for bit.
// Threadgroup: kQuantizeSimdgroups simdgroups, one group each; lane i holds values i, 32 + i, ...
#include "common.h"

// Orders floats as integers: exact for subnormals, which float comparisons may flush. Both zeros
// are 0.
inline int order_of(float value) {
  const int bits = as_type<int>(value);
  if (bits >= 0) return bits;
  return bits == int(0x80000000u) ? 0 : bits ^ 0x7fffffff;
}
inline float value_of(int order) { return as_type<float>(order < 0 ? order ^ 0x7fffffff : order); }

template <typename T>
[[kernel]] void quantize(const device T* w [[buffer(0)]],    // [groups, 32 * group_words]
                         device uint* packed [[buffer(1)]],  // [groups, group_words]
                         device T* scales [[buffer(2)]],     // [groups]
                         device T* biases [[buffer(3)]],     // [groups]
                         constant QuantizeParams& p [[buffer(4)]],
                         uint threadgroup_index [[threadgroup_position_in_grid]],
                         uint simdgroup [[simdgroup_index_in_threadgroup]],
                         uint lane [[thread_index_in_simdgroup]]) {
  const uint group = threadgroup_index * kQuantizeSimdgroups + simdgroup;
  if (group >= p.groups) return;
  const device T* values = w + group * p.group_words * kLanes;

  // A group has at most 4 words: 4 values a lane, in registers.
  float value[4];
  int order[4];
  int low = order_of(INFINITY), high = order_of(-INFINITY);
  for (uint i = 0; i < 4; i++) {
    value[i] = i < p.group_words ? float(values[i * kLanes + lane]) : NAN;
    const bool number = !isnan(value[i]);
    order[i] = order_of(value[i]);
    low = number ? min(low, order[i]) : low;
    high = number ? max(high, order[i]) : high;
    order[i] = number ? order[i] : 0x7fffffff;
  }
  low = simd_min(low);
  high = simd_max(high);

  // The first of equal minima, so that a zero keeps its sign.
  float bias = value_of(low);
  for (uint i = 4; i-- > 0;) {
    const uint hits = uint(ulong(simd_ballot(order[i] == low)));
    const float first = simd_shuffle(value[i], ushort(ctz(hits) & 31u));
    bias = hits != 0 ? first : bias;
  }
  float scale = value_of(high) - bias;
  scale = scale < kMinScale ? kMinScale : scale;  // a NaN stays

  for (uint i = 0; i < p.group_words; i++) {
    const uint bits = uint(ulong(simd_ballot(value[i] - bias > 0.5f * scale)));
    if (lane == 0) packed[group * p.group_words + i] = bits;
  }
  if (lane == 0) {
    scales[group] = T(scale);
    biases[group] = T(bias);
  }
}

ONEBIT_INSTANTIATE("quantize_float", quantize<float>)
ONEBIT_INSTANTIATE("quantize_half", quantize<half>)
ONEBIT_INSTANTIATE("quantize_bfloat", quantize<bfloat>)

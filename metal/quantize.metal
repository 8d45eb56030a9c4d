// Per group of w: bias = min, scale = max - min, bit = w - bias > scale / 2, by the rule of
// docs/format.md, bit for bit.
// Threadgroup: kGroupSimdgroups simdgroups, one group each.
#include "group.h"

template <typename T>
[[kernel]] void quantize(const device T* w [[buffer(0)]],    // [groups, 32 * kGroupWords]
                         device uint* packed [[buffer(1)]],  // [groups, kGroupWords]
                         device T* scales [[buffer(2)]],     // [groups]
                         device T* biases [[buffer(3)]],     // [groups]
                         constant GroupParams& p [[buffer(4)]],
                         uint threadgroup_index [[threadgroup_position_in_grid]],
                         uint simdgroup [[simdgroup_index_in_threadgroup]],
                         uint lane [[thread_index_in_simdgroup]]) {
  const uint group = group_of(threadgroup_index, simdgroup);
  if (group >= p.groups) return;
  const float4 value = read_group(w, group, lane);
  const float low = value_at(value, first_least(value));
  const float high = value_at(value, first_greatest(value));
  // Nothing but NaN: MLX's extremes of nothing.
  const float bias = isnan(low) ? INFINITY : low;
  float scale = (isnan(high) ? -INFINITY : high) - bias;
  scale = scale < kMinScale ? kMinScale : scale;  // a NaN stays

  ONEBIT_UNROLL
  for (uint i = 0; i < kGroupWords; i++) {
    const uint bits = uint(ulong(simd_ballot(value[i] - bias > 0.5f * scale)));
    if (lane == 0) packed[group * kGroupWords + i] = bits;
  }
  if (lane == 0) {
    scales[group] = T(scale);
    biases[group] = T(bias);
  }
}

ONEBIT_INSTANTIATE("quantize_float", quantize<float>)
ONEBIT_INSTANTIATE("quantize_half", quantize<half>)
ONEBIT_INSTANTIATE("quantize_bfloat", quantize<bfloat>)

// Quantizing by a rule, and training through it: levels.h has the rules.
// Threadgroup: kGroupSimdgroups simdgroups, one group each, read once and written once.
#include "levels.h"

template <typename T>
[[kernel]] void quantize_levels(const device T* w [[buffer(0)]],    // [groups, 32 * kGroupWords]
                                device uint* packed [[buffer(1)]],  // [groups, kGroupWords]
                                device T* scales [[buffer(2)]],     // [groups]
                                device T* biases [[buffer(3)]],     // [groups]
                                const device float* importance [[buffer(4)]],  // [period, ...]
                                constant GroupParams& p [[buffer(5)]],
                                uint threadgroup_index [[threadgroup_position_in_grid]],
                                uint simdgroup [[simdgroup_index_in_threadgroup]],
                                uint lane [[thread_index_in_simdgroup]]) {
  const uint group = group_of(threadgroup_index, simdgroup);
  if (group >= p.groups) return;
  const float4 value = read_group(w, group, lane);
  float4 weight = float4(1.0f);
  if (kHasImportance) {
    const float4 given = read_group(importance, group % p.period, lane);
    // A group that matters to nobody is cut as if all its values mattered.
    weight = group_sum(given, lane) > 0 ? given : weight;
  }
  const TwoLevels levels = levels_of(value, weight, lane);
  ONEBIT_UNROLL
  for (uint i = 0; i < kGroupWords; i++) {
    const uint bits = uint(ulong(simd_ballot(bit_of(levels, value[i]))));
    if (lane == 0) packed[group * kGroupWords + i] = bits;
  }
  if (lane == 0) {
    scales[group] = T(levels.high - levels.low);
    biases[group] = T(levels.low);
  }
}

template <typename T>
[[kernel]] void fake_quantize(const device T* w [[buffer(0)]],  // [groups, 32 * kGroupWords]
                              device void* out [[buffer(1)]],   // as w, in kOtherType
                              constant GroupParams& p [[buffer(2)]],
                              uint threadgroup_index [[threadgroup_position_in_grid]],
                              uint simdgroup [[simdgroup_index_in_threadgroup]],
                              uint lane [[thread_index_in_simdgroup]]) {
  const uint group = group_of(threadgroup_index, simdgroup);
  if (group >= p.groups) return;
  float4 value = read_group(w, group, lane);
  const TwoLevels levels = levels_of(value, float4(1.0f), lane);
  // As dequantize adds: a zero loses its sign.
  const float low = 0.0f + levels.low, high = 0.0f + levels.high;
  ONEBIT_UNROLL
  for (uint i = 0; i < kGroupWords; i++) value[i] = bit_of(levels, value[i]) ? high : low;
  write_group_as(kOtherType, out, group, lane, value);
}

// grad_w = grad + (d levels / d w)^T grad: straight through for the bit, exact for the levels.
template <typename T>
[[kernel]] void fake_quantize_backward(const device void* grad [[buffer(0)]],  // kOtherType, as w
                                       const device T* w [[buffer(1)]],
                                       device T* grad_w [[buffer(2)]],  // as w
                                       constant GroupParams& p [[buffer(3)]],
                                       uint threadgroup_index [[threadgroup_position_in_grid]],
                                       uint simdgroup [[simdgroup_index_in_threadgroup]],
                                       uint lane [[thread_index_in_simdgroup]]) {
  const uint group = group_of(threadgroup_index, simdgroup);
  if (group >= p.groups) return;
  const float4 value = read_group(w, group, lane);
  const TwoLevels levels = levels_of(value, float4(1.0f), lane);
  const float4 direct = read_group_as(kOtherType, grad, group, lane);
  write_group(grad_w, group, lane, through_levels(value, levels, direct, lane));
}

ONEBIT_INSTANTIATE("quantize_levels_float", quantize_levels<float>)
ONEBIT_INSTANTIATE("quantize_levels_half", quantize_levels<half>)
ONEBIT_INSTANTIATE("quantize_levels_bfloat", quantize_levels<bfloat>)
ONEBIT_INSTANTIATE("fake_quantize_float", fake_quantize<float>)
ONEBIT_INSTANTIATE("fake_quantize_half", fake_quantize<half>)
ONEBIT_INSTANTIATE("fake_quantize_bfloat", fake_quantize<bfloat>)
ONEBIT_INSTANTIATE("fake_quantize_backward_float", fake_quantize_backward<float>)
ONEBIT_INSTANTIATE("fake_quantize_backward_half", fake_quantize_backward<half>)
ONEBIT_INSTANTIATE("fake_quantize_backward_bfloat", fake_quantize_backward<bfloat>)

// Training with free levels: w_hat = scale * bit + bias, each weight takes the nearer level.
// Threadgroup: kGroupSimdgroups simdgroups, one group each, read once and written once.
#include "group.h"

// A negative scale swaps the levels: the bit still picks the nearer one.
inline bool nearer_high(float value, float scale, float bias) {
  const float distance = value - bias, half_way = scale * 0.5f;
  return scale < 0 ? distance < half_way : distance > half_way;
}

template <typename T>
[[kernel]] void fake_quantize_affine(const device T* w [[buffer(0)]],  // [groups, 32 * kGroupWords]
                                     const device void* scales [[buffer(1)]],  // [groups]
                                     const device void* biases [[buffer(2)]],  // as scales
                                     device void* out [[buffer(3)]],  // as w, in kOtherType
                                     constant GroupParams& p [[buffer(4)]],
                                     uint threadgroup_index [[threadgroup_position_in_grid]],
                                     uint simdgroup [[simdgroup_index_in_threadgroup]],
                                     uint lane [[thread_index_in_simdgroup]]) {
  const uint group = group_of(threadgroup_index, simdgroup);
  if (group >= p.groups) return;
  const float scale = read_level(scales, group), bias = read_level(biases, group);
  const float low = 0.0f + bias, high = low + scale;  // as dequantize adds: a zero loses its sign
  float4 value = read_group(w, group, lane);
  ONEBIT_UNROLL
  for (uint i = 0; i < kGroupWords; i++) {
    value[i] = nearer_high(value[i], scale, bias) ? high : low;
  }
  write_group_as(kOtherType, out, group, lane, value);
}

// grad_scale is the sum of grad where the bit is 1, grad_bias all of it.
template <typename T>
[[kernel]] void fake_quantize_affine_backward(const device void* grad
                                              [[buffer(0)]],  // as w, in kOtherType
                                              const device T* w
                                              [[buffer(1)]],  // [groups, 32 * kGroupWords]
                                              const device void* scales [[buffer(2)]],  // [groups]
                                              const device void* biases [[buffer(3)]],  // as scales
                                              device void* grad_scales [[buffer(4)]],   // as scales
                                              device void* grad_biases [[buffer(5)]],   // as scales
                                              constant GroupParams& p [[buffer(6)]],
                                              uint threadgroup_index
                                              [[threadgroup_position_in_grid]],
                                              uint simdgroup [[simdgroup_index_in_threadgroup]],
                                              uint lane [[thread_index_in_simdgroup]]) {
  const uint group = group_of(threadgroup_index, simdgroup);
  if (group >= p.groups) return;
  const float scale = read_level(scales, group), bias = read_level(biases, group);
  const float4 value = read_group(w, group, lane);
  float4 through = read_group_as(kOtherType, grad, group, lane);
  const float bias_sum = group_sum(through, lane);
  ONEBIT_UNROLL
  for (uint i = 0; i < kGroupWords; i++) {
    through[i] = nearer_high(value[i], scale, bias) ? through[i] : 0.0f;
  }
  const float scale_sum = group_sum(through, lane);
  if (lane == 0) {
    write_as(kLevelType, grad_scales, group, scale_sum);
    write_as(kLevelType, grad_biases, group, bias_sum);
  }
}

ONEBIT_INSTANTIATE("fake_quantize_affine_float", fake_quantize_affine<float>)
ONEBIT_INSTANTIATE("fake_quantize_affine_half", fake_quantize_affine<half>)
ONEBIT_INSTANTIATE("fake_quantize_affine_bfloat", fake_quantize_affine<bfloat>)
ONEBIT_INSTANTIATE("fake_quantize_affine_backward_float", fake_quantize_affine_backward<float>)
ONEBIT_INSTANTIATE("fake_quantize_affine_backward_half", fake_quantize_affine_backward<half>)
ONEBIT_INSTANTIATE("fake_quantize_affine_backward_bfloat", fake_quantize_affine_backward<bfloat>)

// A group of real weights in the registers of one simdgroup: lane l holds values l, 32 + l, ... as
// the first kGroupWords components of a float4; the others are zeros that nobody looks at.
#pragma once
#include "common.h"

inline uint group_of(uint threadgroup_index, uint simdgroup) {
  return threadgroup_index * kGroupSimdgroups + simdgroup;
}

// Index of component i within a tensor [groups, kGroupWords * 32].
inline uint value_index(uint group, uint i, uint lane) {
  return (group * kGroupWords + i) * kLanes + lane;
}

template <typename T>
inline float4 read_group(const device T* values, uint group, uint lane) {
  float4 value = float4(0.0f);
  ONEBIT_UNROLL
  for (uint i = 0; i < kGroupWords; i++) value[i] = float(values[value_index(group, i, lane)]);
  return value;
}
inline float4 read_group_as(uint type, const device void* values, uint group, uint lane) {
  float4 value = float4(0.0f);
  ONEBIT_UNROLL
  for (uint i = 0; i < kGroupWords; i++) {
    value[i] = read_as(type, values, value_index(group, i, lane));
  }
  return value;
}
template <typename T>
inline void write_group(device T* values, uint group, uint lane, float4 value) {
  ONEBIT_UNROLL
  for (uint i = 0; i < kGroupWords; i++) values[value_index(group, i, lane)] = T(value[i]);
}
inline void write_group_as(uint type, device void* values, uint group, uint lane, float4 value) {
  ONEBIT_UNROLL
  for (uint i = 0; i < kGroupWords; i++) {
    write_as(type, values, value_index(group, i, lane), value[i]);
  }
}

// The sum in the order of the CPU kernels, 16 partial sums that are then halved: v > mean must not
// depend on the device.
inline float group_sum(float4 term, uint lane) {
  float sum = 0;
  ONEBIT_UNROLL
  for (uint i = 0; i < kGroupWords; i++) {
    const float other = simd_shuffle_xor(term[i], 16);
    sum += lane < 16 ? term[i] : other;
    sum += lane < 16 ? other : term[i];
  }
  for (ushort width = 8; width > 0; width /= 2) sum += simd_shuffle_xor(sum, width);
  return sum;
}

inline float value_at(float4 value, uint at) {
  float found = 0;
  ONEBIT_UNROLL
  for (uint i = 0; i < kGroupWords; i++) found = at / kLanes == i ? value[i] : found;
  return simd_shuffle(found, ushort(at % kLanes));
}

// Orders floats as integers: exact for subnormals, which float arithmetic may flush. Both zeros are
// 0, and NaN is below all.
inline int order_of(float value, bool descending) {
  if (isnan(value)) return int(0x80000000u);
  const int bits = as_type<int>(value), magnitude = bits & 0x7fffffff;
  return (bits < 0) != descending ? -magnitude : magnitude;
}

// Where the greatest value is, or the least; of equal ones, which a zero's sign tells apart, the
// first. NaN only when there is nothing else.
inline uint first_extreme(float4 value, bool least) {
  int extreme = int(0x80000000u);
  ONEBIT_UNROLL
  for (uint i = 0; i < kGroupWords; i++) extreme = max(extreme, order_of(value[i], least));
  extreme = simd_max(extreme);
  uint at = 0;
  ONEBIT_UNROLL
  for (uint i = kGroupWords; i-- > 0;) {
    const uint hits = uint(ulong(simd_ballot(order_of(value[i], least) == extreme)));
    at = hits != 0 ? i * kLanes + ctz(hits) : at;
  }
  return at;
}
inline uint first_least(float4 value) { return first_extreme(value, true); }
inline uint first_greatest(float4 value) { return first_extreme(value, false); }

// float16 and bfloat16 as 16-bit patterns, converted as IEEE 754 rounds: to nearest, ties to even.
#pragma once

#include <cstdint>
#include <cstring>

#include "kernels.h"

namespace onebit::cpu {

struct Half {
  uint16_t bits;
};
struct BFloat16 {
  uint16_t bits;
};

inline uint32_t bits_of(float v) {
  uint32_t u;
  std::memcpy(&u, &v, sizeof u);
  return u;
}
inline float float_of(uint32_t u) {
  float v;
  std::memcpy(&v, &u, sizeof v);
  return v;
}

inline float to_float(float v) { return v; }
inline double to_float(double v) { return v; }
inline float to_float(BFloat16 v) { return float_of(uint32_t(v.bits) << 16); }
inline float to_float(Half v) {
  const uint32_t sign = uint32_t(v.bits & 0x8000u) << 16;
  const uint32_t magnitude = v.bits & 0x7fffu;
  if (magnitude >= 0x7c00u) return float_of(sign | 0x7f800000u | (magnitude & 0x3ffu) << 13);
  if (magnitude < 0x0400u) {  // subnormal: magnitude * 2^-24, exact in float
    const float value = float(magnitude) * 5.9604644775390625e-8f;
    return sign ? -value : value;
  }
  return float_of(sign | ((magnitude << 13) + ((127u - 15u) << 23)));
}

inline void from_float(float v, float& out) { out = v; }
inline void from_float(double v, double& out) { out = v; }
inline void from_float(float v, BFloat16& out) {
  const uint32_t u = bits_of(v);
  out.bits = v != v ? uint16_t(u >> 16 | 0x40u) : uint16_t((u + 0x7fffu + (u >> 16 & 1u)) >> 16);
}
inline void from_float(float v, Half& out) {
  const uint32_t u = bits_of(v);
  const uint16_t sign = uint16_t(u >> 16 & 0x8000u);
  const uint32_t magnitude = u & 0x7fffffffu;
  if (magnitude > 0x7f800000u) {
    out.bits = uint16_t(sign | 0x7e00u);
  } else if (magnitude >= 0x477ff000u) {  // 65520 and more round to infinity
    out.bits = uint16_t(sign | 0x7c00u);
  } else if (magnitude <
             0x38800000u) {  // below 2^-14: adding 0.5 rounds at the bit of weight 2^-24
    out.bits = uint16_t(sign | (bits_of(float_of(magnitude) + 0.5f) - 0x3f000000u));
  } else {
    const uint32_t rounded = magnitude + 0xfffu + (magnitude >> 13 & 1u);
    out.bits = uint16_t(sign | ((rounded >> 13) - ((127u - 15u) << 10)));
  }
}

// Calls f with a null pointer of the C++ type that dtype names.
template <class F>
void with_type(DType dtype, const F& f) {
  switch (dtype) {
    case DType::kFloat:
      return f(static_cast<float*>(nullptr));
    case DType::kHalf:
      return f(static_cast<Half*>(nullptr));
    case DType::kBFloat16:
      return f(static_cast<BFloat16*>(nullptr));
    case DType::kDouble:
      return f(static_cast<double*>(nullptr));
  }
}

}  // namespace onebit::cpu

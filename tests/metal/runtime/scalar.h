// half and bfloat: stored in 16 bits, every operation rounds, as on the GPU.
#pragma once
#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>
#include <type_traits>

using uchar = unsigned char;
using ushort = unsigned short;
using uint = unsigned int;
using ulong = unsigned long;

namespace emu {

inline float bits_to_float(uint32_t bits) {
  float value;
  std::memcpy(&value, &bits, sizeof value);
  return value;
}
inline uint32_t float_to_bits(float value) {
  uint32_t bits;
  std::memcpy(&bits, &value, sizeof bits);
  return bits;
}

inline float half_to_float(uint16_t h) {
  const uint32_t sign = static_cast<uint32_t>(h & 0x8000) << 16;
  const uint32_t exponent = (h >> 10) & 31, mantissa = h & 1023;
  if (exponent == 31) return bits_to_float(sign | 0x7F800000u | (mantissa << 13));
  if (exponent) return bits_to_float(sign | ((exponent + 112) << 23) | (mantissa << 13));
  const float magnitude = static_cast<float>(mantissa) * 0x1p-24f;
  return sign ? -magnitude : magnitude;
}

// Round to nearest, ties to even.
inline uint16_t float_to_half(float value) {
  uint32_t u = float_to_bits(value);
  const uint32_t sign = (u >> 16) & 0x8000;
  u &= 0x7FFFFFFF;
  if (u > 0x7F800000u) return sign | 0x7E00;
  if (u >= 0x477FF000u) return sign | 0x7C00;
  if (u >= 0x38800000u) return sign | ((u + 0xFFF + ((u >> 13) & 1) - 0x38000000u) >> 13);
  if (u < 0x33000000u) return sign;
  const uint32_t shift = 126 - (u >> 23), mantissa = (u & 0x7FFFFF) | 0x800000;
  const uint32_t quotient = mantissa >> shift, rest = mantissa & ((1u << shift) - 1);
  const uint32_t tie = 1u << (shift - 1);
  return sign | (quotient + (rest > tie || (rest == tie && (quotient & 1))));
}

inline float bfloat_to_float(uint16_t b) { return bits_to_float(static_cast<uint32_t>(b) << 16); }
inline uint16_t float_to_bfloat(float value) {
  const uint32_t u = float_to_bits(value);
  if ((u & 0x7FFFFFFF) > 0x7F800000u) return (u >> 16) | 0x40;
  return (u + 0x7FFF + ((u >> 16) & 1)) >> 16;
}

enum class Small { kHalf, kBFloat };

template <Small K>
struct SmallFloat {
  uint16_t bits;
  SmallFloat() = default;
  // half converts implicitly from numbers; Apple's compiler refuses it for bfloat.
  template <class T, std::enable_if_t<std::is_arithmetic_v<T> && K == Small::kHalf, int> = 0>
  SmallFloat(T v) : bits(float_to_half(static_cast<float>(v))) {}
  template <class T, std::enable_if_t<std::is_arithmetic_v<T> && K == Small::kBFloat, int> = 1>
  explicit SmallFloat(T v) : bits(float_to_bfloat(static_cast<float>(v))) {}
  operator float() const { return K == Small::kHalf ? half_to_float(bits) : bfloat_to_float(bits); }
  SmallFloat operator-() const {
    SmallFloat negative;
    negative.bits = bits ^ 0x8000;
    return negative;
  }
};

template <class T>
struct is_small : std::false_type {};
template <Small K>
struct is_small<SmallFloat<K>> : std::true_type {};
template <class T>
constexpr bool is_small_v = is_small<std::remove_cv_t<std::remove_reference_t<T>>>::value;
template <class T>
constexpr bool is_scalar_v = std::is_arithmetic_v<std::remove_cv_t<T>> || is_small_v<T>;
template <class T>
constexpr bool is_float_v = std::is_floating_point_v<T> || is_small_v<T>;

// half o half and half o integer are half; half o float falls to the built-in float operation.
// bfloat o half has no common type, hence no operator.
#define EMU_SMALL_OPERATOR(o)                                                                    \
  template <class A, class B, std::enable_if_t<is_small_v<A> && std::is_same_v<A, B>, int> = 0>  \
  A operator o(A a, B b) {                                                                       \
    return A(static_cast<float>(a) o static_cast<float>(b));                                     \
  }                                                                                              \
  template <class A, class B, std::enable_if_t<is_small_v<A> && std::is_integral_v<B>, int> = 0> \
  A operator o(A a, B b) {                                                                       \
    return a o A(b);                                                                             \
  }                                                                                              \
  template <class A, class B, std::enable_if_t<std::is_integral_v<A> && is_small_v<B>, int> = 0> \
  B operator o(A a, B b) {                                                                       \
    return B(a) o b;                                                                             \
  }                                                                                              \
  template <class A, class B,                                                                    \
            std::enable_if_t<is_small_v<A> && is_small_v<B> && !std::is_same_v<A, B>, int> = 0>  \
  void operator o(A a, B b) = delete;                                                            \
  template <Small K>                                                                             \
  SmallFloat<K>& operator o## = (SmallFloat<K> & a, SmallFloat<K> b) {                           \
    return a = a o b;                                                                            \
  }
EMU_SMALL_OPERATOR(+)
EMU_SMALL_OPERATOR(-)
EMU_SMALL_OPERATOR(*)
EMU_SMALL_OPERATOR(/)
#undef EMU_SMALL_OPERATOR

}  // namespace emu

using half = emu::SmallFloat<emu::Small::kHalf>;
using bfloat = emu::SmallFloat<emu::Small::kBFloat>;

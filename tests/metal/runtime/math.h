// The scalar functions of the Metal standard library that the shaders may use.
#pragma once
#include <type_traits>

#include "vector.h"

#undef INFINITY
#undef NAN
#define INFINITY (__builtin_inff())
#define NAN (__builtin_nanf(""))

namespace metal {

using std::conditional_t;
using std::enable_if_t;
using std::is_same_v;

// The library has no bfloat overloads: a bfloat argument becomes a float.
template <class T>
using promoted = std::conditional_t<std::is_same_v<T, bfloat>, float, T>;

// Both operands have one type: mixed types are ambiguous in MSL.
template <class T, std::enable_if_t<emu::is_scalar_v<T>, int> = 0>
promoted<T> min(T a, T b) {
  if constexpr (emu::is_float_v<T>)
    return promoted<T>(std::fmin(float(a), float(b)));
  else
    return b < a ? b : a;
}
template <class T, std::enable_if_t<emu::is_scalar_v<T>, int> = 0>
promoted<T> max(T a, T b) {
  if constexpr (emu::is_float_v<T>)
    return promoted<T>(std::fmax(float(a), float(b)));
  else
    return a < b ? b : a;
}
template <class T>
promoted<T> clamp(T x, T low, T high) {
  return min(max(x, low), high);
}
inline float fma(float a, float b, float c) { return std::fma(a, b, c); }
inline float sqrt(float x) { return std::sqrt(x); }
inline float fabs(float x) { return std::fabs(x); }
inline bool isnan(float x) { return x != x; }
inline bool isinf(float x) { return std::fabs(x) == INFINITY; }
template <class T>
T select(T if_false, T if_true, bool condition) {
  return condition ? if_true : if_false;
}
template <class T>
T popcount(T v) {
  return static_cast<T>(__builtin_popcountll(std::make_unsigned_t<T>(v)));
}
template <class T>
T ctz(T v) {
  return v ? static_cast<T>(__builtin_ctzll(std::make_unsigned_t<T>(v))) : T(8 * sizeof(T));
}
inline uint extract_bits(uint x, uint offset, uint bits) {
  return bits == 0 ? 0 : (x >> offset) & (bits >= 32 ? ~0u : (1u << bits) - 1);
}

template <class T>
struct numeric_limits : std::numeric_limits<T> {};

}  // namespace metal

// Function-style casts between types of one size.
template <class To, class From>
To as_type(const From& from) {
  static_assert(sizeof(To) == sizeof(From), "as_type: the sizes differ");
  To to;
  std::memcpy(static_cast<void*>(&to), &from, sizeof to);
  return to;
}

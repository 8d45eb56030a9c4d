// Shared by the kernels: dtypes, levels of a group, matrices of a batch.
//
// A kernel is compiled at run time for one variant, given as macros:
//   ONEBIT_X, ONEBIT_LEVELS, ONEBIT_OUT   Float, Half or BFloat
//   ONEBIT_GROUP_WORDS                    words in a group: 1, 2 or 4
//   ONEBIT_HAS_BIASES                     0: the symmetric form, bias = -scale / 2
// and those that a file names for itself.
#pragma once
#include "instructions.cuh"

using namespace onebit;

#define ONEBIT_KERNEL extern "C" __global__ void

struct Float {
  float value;
};
struct Half {
  uint16_t bits;
};
struct BFloat {
  uint16_t bits;
};

__device__ __forceinline__ float to_float(Float v) { return v.value; }
__device__ __forceinline__ float to_float(BFloat v) {
  return __uint_as_float(uint32_t(v.bits) << 16);
}
__device__ __forceinline__ float to_float(Half v) { return float_of_half(v.bits); }
template <class T>
__device__ __forceinline__ T from_float(float v);
template <>
__device__ __forceinline__ Float from_float<Float>(float v) {
  return {v};
}
template <>
__device__ __forceinline__ Half from_float<Half>(float v) {
  return {half_of_float(v)};
}
template <>
__device__ __forceinline__ BFloat from_float<BFloat>(float v) {
  return {bfloat_of_float(v)};
}

template <class A, class B>
constexpr bool kSame = false;
template <class A>
constexpr bool kSame<A, A> = true;

constexpr uint32_t kAll = ~0u;  // lanes of a warp
constexpr int kGroupWords = ONEBIT_GROUP_WORDS;
constexpr int kGroupSize = kGroupWords * kWordBits;
constexpr bool kHasBiases = ONEBIT_HAS_BIASES;

__device__ __forceinline__ float nan_value() { return __uint_as_float(0x7fc00000u); }

// A float is the sum of three bfloat16: 8 bits of its 24 each, cut off and not rounded, so that the
// greatest float does not become infinite. Nothing is left of infinity.
__device__ __forceinline__ uint16_t top_part(float v) { return __float_as_uint(v) >> 16; }
__device__ __forceinline__ float rest_of(float v) {
  return isinf(v) ? 0.0f : v - __uint_as_float(__float_as_uint(v) & 0xffff0000u);
}

// A group adds scale * S + bias * X, with S the sum of x where the bit is 1 and X all of it; or
// scale / 2 * D + (bias + scale / 2) * X, with D the sum of x or -x. In float32 the form with the
// smaller factor of X is chosen: bits are 0 and 1 where the lower level is near 0 (an outlier that
// such weights do not see must not enter a sum), 1 and -1 where levels lie around 0 (S and X would
// cancel where x has a mean).
struct Form {
  bool is_signed;
  float of_bits, of_x;
};
__device__ __forceinline__ Form form_of(float scale, float bias) {
  const float middle = bias + 0.5f * scale;
  return fabsf(bias) < fabsf(middle) ? Form{false, scale, bias} : Form{true, 0.5f * scale, middle};
}

// 16 bytes as values of T.
template <class T>
struct Vector {
  static constexpr int kCount = 16 / sizeof(T);
  T values[kCount];
};
template <class T>
__device__ __forceinline__ Vector<T> load_vector(const T* from) {
  union {
    uint4 raw;
    Vector<T> vector;
  } u;
  u.raw = *reinterpret_cast<const uint4*>(from);
  return u.vector;
}
template <class T>
__device__ __forceinline__ uint4 raw_of(const Vector<T>& vector) {
  union {
    Vector<T> vector;
    uint4 raw;
  } u;
  u.vector = vector;
  return u.raw;
}
template <class T>
__device__ __forceinline__ void store_vector(T* to, const Vector<T>& vector) {
  *reinterpret_cast<uint4*>(to) = raw_of(vector);
}

// Four neighbouring levels of a row, as they lie in memory: as floats they took 32 registers more.
template <class T>
struct Four {
  uint32_t raw[sizeof(T)];

  // In one load: the first is a multiple of four.
  __device__ __forceinline__ void load(const T* from) {
    if constexpr (sizeof(T) == 4) {
      const uint4 v = __ldg(reinterpret_cast<const uint4*>(from));
      raw[0] = v.x, raw[1] = v.y, raw[2] = v.z, raw[3] = v.w;
    } else {
      const uint2 v = __ldg(reinterpret_cast<const uint2*>(from));
      raw[0] = v.x, raw[1] = v.y;
    }
  }
  // The first `count` of them, then zeros.
  __device__ __forceinline__ void load(const T* from, uint32_t count) {
    ONEBIT_UNROLL
    for (int i = 0; i < int(sizeof(T)); i++) raw[i] = 0;
    ONEBIT_UNROLL
    for (int i = 0; i < 4; i++) {
      if (i >= count) continue;
      if constexpr (sizeof(T) == 4) {
        raw[i] = __float_as_uint(from[i].value);
      } else {
        raw[i / 2] |= uint32_t(from[i].bits) << i % 2 * 16;
      }
    }
  }
  __device__ __forceinline__ float operator[](int i) const {
    if constexpr (sizeof(T) == 4) {
      return __uint_as_float(raw[i]);
    } else {
      return to_float(T{uint16_t(raw[i / 2] >> i % 2 * 16)});
    }
  }
};

// Which matrices of x and w meet in output matrix b. An index outside its range has no matrix: the
// kernel then writes NaN, for raising an error would make every call wait for the GPU.
struct Matrices {
  int64_t x, w;
  bool valid;
};
__device__ __forceinline__ Matrices find_matrices(const ProductArgs& p, uint32_t b) {
  if (p.x_index == nullptr) return {0, 0, true};
  const int64_t x = p.x_index[b], w = p.w_index[b];
  const bool valid = x >= 0 && x < p.x_matrices && w >= 0 && w < p.w_matrices;
  return {valid ? x : 0, valid ? w : 0, valid};
}

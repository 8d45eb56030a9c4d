// What the kernels that multiply tiles share: levels of a lane's rows, bits as 16-bit weights, the
// tile of y.
#pragma once
#include "common.cuh"

using X = ONEBIT_X;
using Level = ONEBIT_LEVELS;

template <bool partial>
struct OutOf {
  using type = X;
};
template <>
struct OutOf<true> {
  using type = Float;
};
using Out = OutOf<ONEBIT_PARTIAL>::type;

// Levels of the rows g and g + 8 of a lane, of `count` groups.
template <int count>
struct LevelsOf {
  static constexpr int kCount = count;
  static constexpr bool kFours = kCount % 4 == 0;
  struct One {
    float value[kCount];
    __device__ __forceinline__ float get(int i) const { return value[i]; }
    __device__ __forceinline__ void load(const void* levels, int64_t at) {
      ONEBIT_UNROLL
      for (int i = 0; i < kCount; i++)
        value[i] = to_float(static_cast<const Level*>(levels)[at + i]);
    }
  };
  struct InFours {
    Four<Level> value[kFours ? kCount / 4 : 1];
    __device__ __forceinline__ float get(int i) const { return value[i / 4][i % 4]; }
    __device__ __forceinline__ void load(const void* levels, int64_t at) {
      ONEBIT_UNROLL
      for (int i = 0; i < kCount / 4; i++) {
        value[i].load(static_cast<const Level*>(levels) + at + 4 * i);
      }
    }
  };
  template <bool fours, class A, class B>
  struct Choose {
    using type = A;
  };
  template <class A, class B>
  struct Choose<true, A, B> {
    using type = B;
  };
  using Row = typename Choose<kFours, One, InFours>::type;
  Row scales[2], biases[2];

  __device__ __forceinline__ void load(const void* scales_of_w,
                                       const void* biases_of_w,
                                       uint32_t k,
                                       const uint32_t (&row)[2],
                                       uint32_t stage) {
    ONEBIT_UNROLL
    for (int h = 0; h < 2; h++) {
      const int64_t at = int64_t(row[h]) * (k / kGroupSize) + stage * kCount;
      scales[h].load(scales_of_w, at);
      if constexpr (kHasBiases) biases[h].load(biases_of_w, at);
    }
  }
  __device__ __forceinline__ float scale(int h, int i) const { return scales[h].get(i); }
  __device__ __forceinline__ float bias(int h, int i) const {
    return kHasBiases ? biases[h].get(i) : scale(h, i) * -0.5f;
  }
};

template <class T>
__device__ __forceinline__ uint32_t twice(float v) {
  if constexpr (sizeof(T) == 2) {
    const uint32_t bits = from_float<T>(v).bits;
    return bits | bits << 16;
  }
  return 0;
}

// A tile of y, in shared memory with four floats between its rows, as whole lines of y [m, n].
template <int rows, int outputs, int threads>
__device__ __forceinline__ void store_tile(
    const float* tile, Out* y, uint32_t m0, uint32_t n0, uint32_t end_m, uint32_t end_n) {
  constexpr int kVector = Vector<Out>::kCount, kVectors = outputs / kVector;
  for (int i = threadIdx.x; i < rows * kVectors; i += threads) {
    const uint32_t m = i / kVectors, n = i % kVectors * kVector;
    if (m0 + m >= end_m || n0 + n >= end_n) continue;
    Vector<Out> out;
    ONEBIT_UNROLL
    for (int j = 0; j < kVector; j++) {
      out.values[j] = from_float<Out>(tile[m * (outputs + 4) + n + j]);
    }
    Out* to = y + int64_t(m0 + m) * end_n + n0 + n;
    if (end_n % kVector == 0) {
      store_vector(to, out);
    } else {
      ONEBIT_UNROLL
      for (int j = 0; j < kVector; j++) {
        if (n0 + n + j < end_n) to[j] = out.values[j];
      }
    }
  }
}

// simdgroup_matrix: 8 x 8 elements, two per lane. Which two, MSL does not say, and this is another
// choice than Apple's: a shader that depends on it fails here or there.
#pragma once
#include "simdgroup.h"

namespace metal {

template <class T, int C, int R>
class simdgroup_matrix {
  static_assert(C == 8 && R == 8 && emu::is_float_v<T>, "8 x 8 of half, bfloat or float");

 public:
  simdgroup_matrix() { std::memset(static_cast<void*>(&element_), 0xFF, sizeof element_); }
  vec<T, 2>& thread_elements() { return element_; }

  vec<T, 2> element_;  // row lane / 4, columns 2 * (lane % 4) and the next
};
using simdgroup_float8x8 = simdgroup_matrix<float, 8, 8>;
using simdgroup_half8x8 = simdgroup_matrix<half, 8, 8>;

template <class T, int C, int R>
simdgroup_matrix<T, C, R> make_filled_simdgroup_matrix(T value) {
  simdgroup_matrix<T, C, R> m;
  m.element_[0] = m.element_[1] = value;
  return m;
}

template <class T, class P>
void simdgroup_load(simdgroup_matrix<T, 8, 8>& m,
                    const P* source,
                    ulong stride = 8,
                    ulong2 origin = ulong2(0),
                    bool transpose = false,
                    EMU_HERE) {
  static_assert(std::is_same_v<T, P>, "simdgroup_load: the element types differ");
  detail::exchange(stride, detail::kMatrixLoad, line, file);
  const P* p = source + origin[1] * stride + origin[0];
  const ulong row = detail::lane() / 4, column = detail::lane() % 4 * 2;
  if (transpose) {
    for (ulong i = 0; i < 2; i++) m.element_[i] = p[(column + i) * stride + row];
  } else {  // one access
    std::memcpy(static_cast<void*>(m.element_.e), p + row * stride + column, 2 * sizeof(T));
  }
}

template <class T, class P>
void simdgroup_store(const simdgroup_matrix<T, 8, 8>& m,
                     P* destination,
                     ulong stride = 8,
                     ulong2 origin = ulong2(0),
                     bool transpose = false,
                     EMU_HERE) {
  static_assert(std::is_same_v<T, P>, "simdgroup_store: the element types differ");
  detail::exchange(stride, detail::kMatrixStore, line, file);
  P* p = destination + origin[1] * stride + origin[0];
  const ulong row = detail::lane() / 4, column = detail::lane() % 4 * 2;
  if (transpose) {
    for (ulong i = 0; i < 2; i++) p[(column + i) * stride + row] = m.element_[i];
  } else {
    std::memcpy(static_cast<void*>(p + row * stride + column), m.element_.e, 2 * sizeof(T));
  }
}

// d = a . b + c, accumulated in float in ascending k.
template <class D, class A, class B, class C>
void simdgroup_multiply_accumulate(simdgroup_matrix<D, 8, 8>& d,
                                   const simdgroup_matrix<A, 8, 8>& a,
                                   const simdgroup_matrix<B, 8, 8>& b,
                                   const simdgroup_matrix<C, 8, 8>& c,
                                   EMU_HERE) {
  struct Pair {
    float a[2], b[2];
  };
  const Pair mine = {{float(a.element_[0]), float(a.element_[1])},
                     {float(b.element_[0]), float(b.element_[1])}};
  const auto lanes = detail::exchange(mine, detail::kMatrixMultiply, line, file);
  const unsigned row = detail::lane() / 4, quarter = detail::lane() % 4;
  float sum[2] = {float(c.element_[0]), float(c.element_[1])};
  for (unsigned k = 0; k < 8; k++) {
    const float left = lanes.at(row * 4 + k / 2).a[k % 2];
    const Pair right = lanes.at(k * 4 + quarter);
    sum[0] = std::fma(left, right.b[0], sum[0]);
    sum[1] = std::fma(left, right.b[1], sum[1]);
  }
  d.element_[0] = D(sum[0]);
  d.element_[1] = D(sum[1]);
}

}  // namespace metal

// vec<T, N> and the arithmetic of MSL vectors. Swizzles of several components are not translated.
#pragma once
#include "kernel_abi.h"
#include "scalar.h"

namespace metal {

// A vector is aligned to its size (three components to four): a GPU load that is not, is undefined.
template <class T, int N>
struct alignas((N == 3 ? 4 : N) * sizeof(T)) vec_storage {
  T e[N];
  vec_storage() = default;
  vec_storage(const vec_storage& other) { copy(other); }
  vec_storage& operator=(const vec_storage& other) {
    copy(other);
    return *this;
  }

  static void check(const void* p) {
    const size_t excess = reinterpret_cast<uintptr_t>(p) % alignof(vec_storage);
    if (excess) {
      emu::fail("misaligned vector of %zu bytes: address is %zu past a multiple pc=%p",
                sizeof(vec_storage), excess, __builtin_return_address(0));
    }
  }

 private:
  void copy(const vec_storage& other) {
    check(this);
    check(&other);
    if constexpr (N == 3) {
      for (int i = 0; i < N; i++) e[i] = other.e[i];
    } else {
      std::memcpy(static_cast<void*>(e), other.e, sizeof e);  // one access, as of the GPU
    }
  }
};

template <class T, int N>
struct vec : vec_storage<T, N> {
  using vec_storage<T, N>::e;
  vec() = default;
  vec(const vec&) = default;
  vec& operator=(const vec&) = default;
  template <class S, std::enable_if_t<emu::is_scalar_v<S>, int> = 0>
  vec(S s) {
    for (int i = 0; i < N; i++) e[i] = T(s);
  }
  template <class U>
  explicit vec(const vec<U, N>& other) {
    vec<U, N>::check(&other);
    for (int i = 0; i < N; i++) e[i] = T(other.e[i]);
  }
  template <class A,
            class B,
            class... C,
            std::enable_if_t<sizeof...(C) + 2 == N && emu::is_scalar_v<A>, int> = 0>
  vec(A a, B b, C... c) {
    const T all[] = {T(a), T(b), T(c)...};
    for (int i = 0; i < N; i++) e[i] = all[i];
  }
  T& operator[](int i) {
    vec::check(this);
    return e[i];
  }
  const T& operator[](int i) const {
    vec::check(this);
    return e[i];
  }
};

// Named components for the built-in variables and the float vectors the shaders read.
#define EMU_COMPONENTS(T)                           \
  template <>                                       \
  struct alignas(2 * sizeof(T)) vec_storage<T, 2> { \
    union {                                         \
      T e[2];                                       \
      struct {                                      \
        T x, y;                                     \
      };                                            \
    };                                              \
    static void check(const void*) {}               \
  };                                                \
  template <>                                       \
  struct alignas(4 * sizeof(T)) vec_storage<T, 3> { \
    union {                                         \
      T e[3];                                       \
      struct {                                      \
        T x, y, z;                                  \
      };                                            \
    };                                              \
    static void check(const void*) {}               \
  };
EMU_COMPONENTS(uint)
EMU_COMPONENTS(ushort)
#undef EMU_COMPONENTS

#define EMU_VECTOR_OPERATOR(o)                                    \
  template <class T, int N>                                       \
  vec<T, N> operator o(const vec<T, N>& a, const vec<T, N>& b) {  \
    vec<T, N> r;                                                  \
    for (int i = 0; i < N; i++) r.e[i] = a.e[i] o b.e[i];         \
    return r;                                                     \
  }                                                               \
  template <class T, int N>                                       \
  vec<T, N> operator o(const vec<T, N>& a, T b) {                 \
    return a o vec<T, N>(b);                                      \
  }                                                               \
  template <class T, int N>                                       \
  vec<T, N>& operator o## = (vec<T, N> & a, const vec<T, N>& b) { \
    return a = a o b;                                             \
  }
EMU_VECTOR_OPERATOR(+)
EMU_VECTOR_OPERATOR(-)
EMU_VECTOR_OPERATOR(*)
EMU_VECTOR_OPERATOR(/)
#undef EMU_VECTOR_OPERATOR

#define EMU_VECTOR_TYPES(T) \
  using T##2 = vec<T, 2>;   \
  using T##3 = vec<T, 3>;   \
  using T##4 = vec<T, 4>;
EMU_VECTOR_TYPES(char)
EMU_VECTOR_TYPES(uchar)
EMU_VECTOR_TYPES(short)
EMU_VECTOR_TYPES(ushort)
EMU_VECTOR_TYPES(int)
EMU_VECTOR_TYPES(uint)
EMU_VECTOR_TYPES(ulong)
EMU_VECTOR_TYPES(half)
EMU_VECTOR_TYPES(bfloat)
EMU_VECTOR_TYPES(float)
#undef EMU_VECTOR_TYPES

}  // namespace metal

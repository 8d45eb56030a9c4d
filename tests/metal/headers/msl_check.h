// MSL as clang's C++ for OpenCL sees it: declarations only, so that address spaces and the limits
// of a GPU language are enforced. What is not declared here, the shaders may not use.
#pragma OPENCL EXTENSION cl_khr_fp16 : enable
#define device __global
#define constant __constant
#define threadgroup __local
#define thread __private
typedef unsigned char uchar;
typedef unsigned short ushort;
typedef unsigned int uint;
typedef unsigned long ulong;
typedef uint uint32_t;
typedef int int32_t;
typedef ulong size_t;
typedef __bf16 bfloat;
#define INFINITY (__builtin_inff())
#define NAN (__builtin_nanf(""))

namespace metal {

template <class T, int N>
using vec = T __attribute__((ext_vector_type(N)));
#define CHECK_VECTORS(T)  \
  typedef vec<T, 2> T##2; \
  typedef vec<T, 3> T##3; \
  typedef vec<T, 4> T##4;
CHECK_VECTORS(ushort)
CHECK_VECTORS(int)
CHECK_VECTORS(uint)
CHECK_VECTORS(ulong)
CHECK_VECTORS(half)
CHECK_VECTORS(float)

// Exact overloads, none for mixed types: a call that has to choose is ambiguous, as in MSL.
#define CHECK_NUMBER(T) \
  T min(T, T);          \
  T max(T, T);          \
  T clamp(T, T, T);     \
  T select(T, T, bool);
CHECK_NUMBER(float)
CHECK_NUMBER(half)
CHECK_NUMBER(int)
CHECK_NUMBER(uint)
CHECK_NUMBER(short)
CHECK_NUMBER(ushort)
CHECK_NUMBER(long)
CHECK_NUMBER(ulong)
#define CHECK_INTEGER(T) \
  T popcount(T);         \
  T ctz(T);
CHECK_INTEGER(int)
CHECK_INTEGER(uint)
CHECK_INTEGER(ulong)
float fma(float, float, float);
half fma(half, half, half);
float sqrt(float);
float fabs(float);
bool isnan(float);
bool isnan(half);
bool isinf(float);
uint extract_bits(uint, uint, uint);

enum class mem_flags { mem_none = 0, mem_device = 1, mem_threadgroup = 2 };
mem_flags operator|(mem_flags, mem_flags);
void threadgroup_barrier(mem_flags);
void simdgroup_barrier(mem_flags);

// Simdgroup functions exist for numbers of at most 32 bits, and not for bfloat.
#define CHECK_SIMD(T)            \
  T simd_sum(T);                 \
  T simd_max(T);                 \
  T simd_min(T);                 \
  T simd_shuffle(T, ushort);     \
  T simd_broadcast(T, ushort);   \
  T simd_shuffle_xor(T, ushort); \
  T simd_shuffle_up(T, ushort);  \
  T simd_shuffle_down(T, ushort);
CHECK_SIMD(float)
CHECK_SIMD(half)
CHECK_SIMD(int)
CHECK_SIMD(uint)
CHECK_SIMD(short)
CHECK_SIMD(ushort)
#define CHECK_NO_SIMD(T)                   \
  void simd_sum(T) = delete;               \
  void simd_max(T) = delete;               \
  void simd_min(T) = delete;               \
  void simd_shuffle(T, ushort) = delete;   \
  void simd_broadcast(T, ushort) = delete; \
  void simd_shuffle_xor(T, ushort) = delete;
CHECK_NO_SIMD(bfloat)
CHECK_NO_SIMD(long)
CHECK_NO_SIMD(ulong)
uint simd_and(uint);
uint simd_or(uint);
uint simd_xor(uint);
bool simd_all(bool);
bool simd_any(bool);
struct simd_vote {
  explicit operator ulong() const;
};
simd_vote simd_ballot(bool);

template <class T, int C, int R>
struct simdgroup_matrix {
  simdgroup_matrix();
  thread vec<T, 2>& thread_elements();
};
typedef simdgroup_matrix<float, 8, 8> simdgroup_float8x8;
typedef simdgroup_matrix<half, 8, 8> simdgroup_half8x8;
template <class T, int C, int R>
simdgroup_matrix<T, C, R> make_filled_simdgroup_matrix(T);
#define CHECK_MATRIX(space)                                                                     \
  template <class T>                                                                            \
  void simdgroup_load(thread simdgroup_matrix<T, 8, 8>&, const space T*, ulong = 8, ulong2 = 0, \
                      bool = false);                                                            \
  template <class T>                                                                            \
  void simdgroup_store(simdgroup_matrix<T, 8, 8>, space T*, ulong = 8, ulong2 = 0, bool = false);
CHECK_MATRIX(device)
CHECK_MATRIX(threadgroup)
template <class D, class A, class B, class C>
void simdgroup_multiply_accumulate(thread simdgroup_matrix<D, 8, 8>&,
                                   simdgroup_matrix<A, 8, 8>,
                                   simdgroup_matrix<B, 8, 8>,
                                   simdgroup_matrix<C, 8, 8>);

template <class T, int N>
struct array {
  T element[N];
  T operator[](ulong) const;
};
template <class I, int N>
struct dextents {
  dextents(I, I);
};
struct tensor_inline;
template <class T, class Extents, class Kind>
struct tensor {
  typedef T element_type;
  tensor(T*, Extents, array<int, 2>);
};
template <int N>
struct execution_simdgroups;

}  // namespace metal

namespace mpp {
namespace tensor_ops {

// A number, for a class is no template argument here.
struct matmul2d_descriptor {
  enum class mode { multiply, multiply_accumulate };
  int m, n, k;
  constexpr matmul2d_descriptor(
      int m, int n, int k, bool = false, bool = false, bool = false, mode = mode::multiply)
      : m(m), n(n), k(k) {}
  constexpr operator ulong() const { return ulong(m) | ulong(n) << 16 | ulong(k) << 32; }
};

template <class T>
struct cooperative_tensor {
  ushort get_capacity() const;
  bool is_valid_element(ushort) const;
  thread T& operator[](ushort);
  metal::array<int, 2> get_multidimensional_index(ushort) const;
};

// Which types are multiplied, by numbers: float 1, half 2, bfloat 4; none for const and others.
template <class T>
struct tensor_type;
#define CHECK_TENSOR_TYPE(T, n)       \
  template <>                         \
  struct tensor_type<T> {             \
    enum { number = n };              \
  };                                  \
  template <>                         \
  struct tensor_type<device T> {      \
    enum { number = n };              \
  };                                  \
  template <>                         \
  struct tensor_type<threadgroup T> { \
    enum { number = n };              \
  };
CHECK_TENSOR_TYPE(float, 1)
CHECK_TENSOR_TYPE(half, 2)
CHECK_TENSOR_TYPE(bfloat, 4)

template <ulong D, class Scope>
struct matmul2d {
  static_assert((D & 15) == 0 && (D >> 16 & 15) == 0 && (D >> 32) % 32 == 0,
                "extents of the operation");
  template <class L, class R, class T>
  cooperative_tensor<T> get_destination_cooperative_tensor() const {
    enum : int {
      l = tensor_type<typename L::element_type>::number,
      r = tensor_type<typename R::element_type>::number,
      t = tensor_type<T>::number
    };
    static_assert(t == 1 || (l != 1 && r != 1 && (t == l || t == r)),
                  "no operation for these types");
    return cooperative_tensor<T>();
  }
  template <class L, class R, class T>
  void run(thread L&, thread R&, thread cooperative_tensor<T>&) const;
};

}  // namespace tensor_ops
}  // namespace mpp

// `vec<T, 4>(a)` is a cast in MSL and an error in OpenCL: the translator writes construct<vec<T,
// 4>>.
template <class V, class... A>
V construct(A...) {
  return V();
}
template <class To, class From>
To as_type(From) {
  static_assert(sizeof(To) == sizeof(From), "as_type: the sizes differ");
  return To();
}

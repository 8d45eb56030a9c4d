// The emulator's machine, but real: a thread is a thread of an NVIDIA GPU, a threadgroup a block, a
// simdgroup a warp. What lanes exchange goes through shared memory. After this follow the headers
// of the runtime as they are, and the translated shaders.
using uint8_t = unsigned char;
using uint16_t = unsigned short;
using int32_t = int;
using uint32_t = unsigned int;
using int64_t = long long;
using uint64_t = unsigned long long;
using uintptr_t = unsigned long;

#define __builtin_return_address(level) nullptr
#define __builtin_popcountll __popcll
#define __builtin_ctzll(v) (__ffsll(v) - 1)
#define __builtin_inff() __int_as_float(0x7f800000)
#define __builtin_nanf(text) __int_as_float(0x7fc00000)
#define EMU_SCRATCH  // not static: threads run at once

// CUDA has these names too, and every shader says `using namespace metal`.
#define char2 metal_char2
#define char3 metal_char3
#define char4 metal_char4
#define uchar2 metal_uchar2
#define uchar3 metal_uchar3
#define uchar4 metal_uchar4
#define short2 metal_short2
#define short3 metal_short3
#define short4 metal_short4
#define ushort2 metal_ushort2
#define ushort3 metal_ushort3
#define ushort4 metal_ushort4
#define int2 metal_int2
#define int3 metal_int3
#define int4 metal_int4
#define uint2 metal_uint2
#define uint3 metal_uint3
#define uint4 metal_uint4
#define ulong2 metal_ulong2
#define ulong3 metal_ulong3
#define ulong4 metal_ulong4
#define float2 metal_float2
#define float3 metal_float3
#define float4 metal_float4
#define isnan metal_isnan
#define isinf metal_isinf
#define fma metal_fma
#define fabs metal_fabs
#define sqrt metal_sqrt

namespace std {

inline void* memcpy(void* to, const void* from, size_t bytes) { return ::memcpy(to, from, bytes); }
inline void* memset(void* to, int value, size_t bytes) { return ::memset(to, value, bytes); }
inline float fma(float a, float b, float c) { return ::fmaf(a, b, c); }
inline float fmin(float a, float b) { return ::fminf(a, b); }
inline float fmax(float a, float b) { return ::fmaxf(a, b); }
inline float fabs(float v) { return ::fabsf(v); }
inline float sqrt(float v) { return ::sqrtf(v); }

// What the runtime takes from <type_traits> and <limits>, which NVRTC does not have.
template <bool B>
struct bool_constant {
  static constexpr bool value = B;
};
using true_type = bool_constant<true>;
using false_type = bool_constant<false>;
template <bool B, class T = void>
struct enable_if {};
template <class T>
struct enable_if<true, T> {
  using type = T;
};
template <bool B, class T = void>
using enable_if_t = typename enable_if<B, T>::type;
template <bool B, class T, class F>
struct conditional {
  using type = T;
};
template <class T, class F>
struct conditional<false, T, F> {
  using type = F;
};
template <bool B, class T, class F>
using conditional_t = typename conditional<B, T, F>::type;
template <class A, class B>
constexpr bool is_same_v = false;
template <class A>
constexpr bool is_same_v<A, A> = true;
template <class T>
struct remove_cv {
  using type = T;
};
template <class T>
struct remove_cv<const T> {
  using type = T;
};
template <class T>
using remove_cv_t = typename remove_cv<T>::type;
template <class T>
struct remove_reference {
  using type = T;
};
template <class T>
struct remove_reference<T&> {
  using type = T;
};
template <class T>
using remove_reference_t = typename remove_reference<T>::type;
template <class T>
constexpr bool is_floating_point_v =
    is_same_v<remove_cv_t<T>, float> || is_same_v<remove_cv_t<T>, double>;
template <class T>
constexpr bool is_integral_v = false;
#define EMU_INTEGER(S, U)                        \
  template <>                                    \
  inline constexpr bool is_integral_v<S> = true; \
  template <>                                    \
  inline constexpr bool is_integral_v<U> = true; \
  template <>                                    \
  struct make_unsigned<S> {                      \
    using type = U;                              \
  };                                             \
  template <>                                    \
  struct make_unsigned<U> {                      \
    using type = U;                              \
  };
template <class T>
struct make_unsigned;
EMU_INTEGER(signed char, unsigned char)
EMU_INTEGER(short, unsigned short)
EMU_INTEGER(int, unsigned)
EMU_INTEGER(long, unsigned long)
EMU_INTEGER(long long, unsigned long long)
#undef EMU_INTEGER
template <>
inline constexpr bool is_integral_v<bool> = true;
template <>
inline constexpr bool is_integral_v<char> = true;
template <class T>
using make_unsigned_t = typename make_unsigned<T>::type;
template <class T>
constexpr bool is_arithmetic_v = is_floating_point_v<T> || is_integral_v<remove_cv_t<T>>;

template <class T>
struct numeric_limits;
template <>
struct numeric_limits<float> {
  static constexpr float max() { return 3.402823466e+38f; }
  static constexpr float lowest() { return -3.402823466e+38f; }
};

}  // namespace std

namespace emu {

struct Size3 {
  uint32_t x, y, z;
};
struct Bindings {
  char* buffer[31];
  uint64_t length[31];
};
struct Dispatch {
  char* const* buffer;
  const uint64_t* length;
  Size3 group, groups, threads, threads_here, grid;
};
struct Thread {
  Size3 position;
  uint32_t index, lane, simdgroup;
};

__constant__ Bindings bindings;

template <class... A>
[[noreturn]] void fail(const char* format, A... values) {
  printf(format, values...);
  __trap();
}

inline Thread thread_state() {
  const uint32_t index = threadIdx.x + blockDim.x * (threadIdx.y + blockDim.y * threadIdx.z);
  return {{threadIdx.x, threadIdx.y, threadIdx.z}, index, index % 32, index / 32};
}
inline uint32_t threads_here() { return blockDim.x * blockDim.y * blockDim.z; }
// Lanes of this warp that exist.
inline uint32_t lanes_here() {
  const uint32_t rest = threads_here() - thread_state().simdgroup * 32;
  return rest >= 32 ? ~0u : (1u << rest) - 1;
}

inline Dispatch dispatch() {
  const Size3 block = {blockDim.x, blockDim.y, blockDim.z};
  const Size3 grid = {gridDim.x * block.x, gridDim.y * block.y, gridDim.z * block.z};
  return {bindings.buffer,
          bindings.length,
          {blockIdx.x, blockIdx.y, blockIdx.z},
          {gridDim.x, gridDim.y, gridDim.z},
          block,
          block,
          grid};
}

inline void threadgroup_barrier(unsigned, int, const char*) { __syncthreads(); }
inline void simdgroup_barrier(unsigned, int, const char*) { __syncwarp(lanes_here()); }

constexpr size_t kSlotBytes = 64;
extern __shared__ __align__(64) unsigned char exchanged[];  // 2 KB a warp
inline const unsigned char* simd_exchange(
    const void* value, size_t size, uint32_t, int, const char*, uint32_t* active) {
  const Thread thread = thread_state();
  unsigned char* slots = exchanged + thread.simdgroup * 32 * kSlotBytes;
  *active = lanes_here();
  __syncwarp(*active);  // all have read what was exchanged before
  ::memcpy(slots + thread.lane * kSlotBytes, value, size);
  __syncwarp(*active);
  return slots;
}

}  // namespace emu

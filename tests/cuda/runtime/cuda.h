// CUDA C++ for g++: what the kernels use of the language and of its functions, on the emulator of
// tests/metal. Included first by every kernel.
#pragma once
#include <cmath>
#include <cstdint>
#include <cstring>

#include "hardware.h"
#include "scalar.h"

#define EMU_HERE int line = __builtin_LINE(), const char *file = __builtin_FILE()

#define __device__
#define __global__
#define __forceinline__ inline
#define __grid_constant__
#define __launch_bounds__(...)
#define threadIdx (::emu::thread_state().position)
#define blockIdx (::emu::dispatch().group)

using std::isfinite;
using std::isinf;
using std::isnan;

namespace emu {

// A pointer comes as the number of its buffer, or 0.
template <class Argument>
void call(void (*kernel)(Argument)) {
  const LaunchInfo& info = LaunchInfo::get();
  alignas(Argument) char bytes[sizeof(Argument)];
  if (dispatch().length[0] != sizeof bytes) fail("the argument must have %zu bytes", sizeof bytes);
  memcpy(bytes, dispatch().buffer[0], sizeof bytes);
  for (uint32_t i = 0; i < info.pointers; i++) {
    char* at = bytes + info.values[i];
    uint64_t buffer;
    memcpy(&buffer, at, sizeof buffer);
    const char* pointer = buffer ? dispatch().buffer[buffer] : nullptr;
    memcpy(at, &pointer, sizeof pointer);
  }
  start_thread();
  kernel(*reinterpret_cast<Argument*>(bytes));
}

template <class T, class Key>
T& shared(const char* name, Key) {
  static char key;
  void* p = threadgroup_variable(&key, sizeof(T), alignof(T), name);
  if (LaunchInfo::get().shared_bytes == 0) use_window(p);
  return *static_cast<T*>(p);
}
inline uint8_t* dynamic_shared(const char* name) {
  static char key;
  void* p = threadgroup_variable(&key, LaunchInfo::get().shared_bytes, 16, name);
  use_window(p);
  return static_cast<uint8_t*>(p);
}

template <class To, class From>
To bits_as(From from) {
  static_assert(sizeof(To) == sizeof(From));
  To to;
  memcpy(&to, &from, sizeof to);
  return to;
}

}  // namespace emu

// --- Vectors: aligned to their size, read and written at once ---

namespace emu {
template <class V>
[[gnu::noinline]] void check_vector(const V* p) {
  const size_t excess = reinterpret_cast<uintptr_t>(p) % sizeof(V);
  if (excess == 0) return;
  fail("misaligned vector of %zu bytes: address is %zu past a multiple pc=%p", sizeof(V), excess,
       __builtin_return_address(0));
}
template <class V>
void copy_vector(V* to, const V* from) {
  check_vector(to);
  check_vector(from);
  memcpy(static_cast<void*>(to), from, sizeof(V));
}
}  // namespace emu

#define EMU_VECTOR(V, bytes, T, ...)     \
  struct alignas(bytes) V {              \
    T __VA_ARGS__;                       \
    V() = default;                       \
    V(const V& other) { *this = other; } \
    V& operator=(const V& other) {       \
      emu::copy_vector(this, &other);    \
      return *this;                      \
    }                                    \
  };
EMU_VECTOR(uint2, 8, uint32_t, x, y)
EMU_VECTOR(uint4, 16, uint32_t, x, y, z, w)
EMU_VECTOR(float4, 16, float, x, y, z, w)
#undef EMU_VECTOR

inline uint4 make_uint4(uint32_t x, uint32_t y, uint32_t z, uint32_t w) {
  uint4 v;
  v.x = x, v.y = y, v.z = z, v.w = w;
  return v;
}
inline float4 make_float4(float x, float y, float z, float w) {
  float4 v;
  v.x = x, v.y = y, v.z = z, v.w = w;
  return v;
}

// --- Functions of a thread ---

inline float __uint_as_float(uint32_t v) { return emu::bits_as<float>(v); }
inline uint32_t __float_as_uint(float v) { return emu::bits_as<uint32_t>(v); }
inline float __int_as_float(int v) { return emu::bits_as<float>(v); }
inline int __float_as_int(float v) { return emu::bits_as<int>(v); }
inline int __popc(uint32_t v) { return __builtin_popcount(v); }
inline int __ffs(uint32_t v) { return __builtin_ffs(static_cast<int>(v)); }
inline int __float2int_rn(float v) {  // saturates; NaN is 0
  if (!(v == v)) return 0;
  return v >= 0x1p31f ? INT32_MAX : v < -0x1p31f ? INT32_MIN : static_cast<int>(lrintf(v));
}
inline uint32_t __funnelshift_l(uint32_t low, uint32_t high, uint32_t shift) {
  return static_cast<uint32_t>(((uint64_t{high} << 32 | low) << (shift & 31)) >> 32);
}
inline uint32_t __byte_perm(uint32_t x, uint32_t y, uint32_t selector) {
  return emu::permute(x, y, selector & 0x7777);
}
template <class T>
T min(T a, T b) {
  return b < a ? b : a;
}
template <class T>
T max(T a, T b) {
  return a < b ? b : a;
}
template <class T>
T __ldg(const T* p) {
  return *p;
}
template <class T>
T __ldcs(const T* p) {
  return *p;
}
template <class T>
void __stcs(T* p, const T& v) {
  *p = v;
}

// --- Functions of a block and of a warp: every lane must take part ---

inline void __syncthreads(EMU_HERE) {
  emu::threadgroup_barrier(emu::kDeviceMemory | emu::kThreadgroupMemory, line, file);
}

namespace emu {

enum Operation : uint32_t { kShuffle, kShuffleXor, kBallot, kMax, kMma, kBmma, kTiles, kWgmma };

template <class T>
struct Lanes {
  const unsigned char* slots;
  T operator[](uint32_t lane) const {
    T value;
    memcpy(&value, slots + kSlotBytes * lane, sizeof value);
    return value;
  }
};
template <class T>
Lanes<T> exchange(uint32_t mask, const T& value, Operation operation, int line, const char* file) {
  uint32_t active;
  const Lanes<T> lanes = {simd_exchange(&value, sizeof value, operation, line, file, &active)};
  if (active != mask) fail("lanes %08x take part, the mask is %08x", active, mask);
  return lanes;
}

}  // namespace emu

template <class T>
T __shfl_sync(uint32_t mask, T value, uint32_t lane, EMU_HERE) {
  return emu::exchange(mask, value, emu::kShuffle, line, file)[lane & 31];
}
template <class T>
T __shfl_xor_sync(uint32_t mask, T value, uint32_t with, EMU_HERE) {
  const uint32_t lane = emu::thread_state().lane ^ with;
  return emu::exchange(mask, value, emu::kShuffleXor, line, file)[lane & 31];
}
inline uint32_t __ballot_sync(uint32_t mask, int predicate, EMU_HERE) {
  const auto lanes = emu::exchange(mask, predicate, emu::kBallot, line, file);
  uint32_t bits = 0;
  for (uint32_t i = 0; i < 32; i++) bits |= uint32_t(lanes[i] != 0) << i;
  return bits;
}
inline int __all_sync(uint32_t mask, int predicate, EMU_HERE) {
  return __ballot_sync(mask, predicate, line, file) == mask;
}
inline int __any_sync(uint32_t mask, int predicate, EMU_HERE) {
  return __ballot_sync(mask, predicate, line, file) != 0;
}
inline int __reduce_max_sync(uint32_t mask, int value, EMU_HERE) {
  const auto lanes = emu::exchange(mask, value, emu::kMax, line, file);
  for (uint32_t i = 0; i < 32; i++) value = max(value, lanes[i]);
  return value;
}

// Barriers and the operations in which the 32 lanes of a simdgroup exchange values.
#pragma once
#include "math.h"

#define EMU_HERE int line = __builtin_LINE(), const char *file = __builtin_FILE()

namespace metal {

enum class mem_flags : unsigned { mem_none = 0, mem_device = 1, mem_threadgroup = 2 };
constexpr mem_flags operator|(mem_flags a, mem_flags b) {
  return mem_flags(static_cast<unsigned>(a) | static_cast<unsigned>(b));
}
inline void threadgroup_barrier(mem_flags flags, EMU_HERE) {
  emu::threadgroup_barrier(static_cast<unsigned>(flags), line, file);
}
inline void simdgroup_barrier(mem_flags flags, EMU_HERE) {
  emu::simdgroup_barrier(static_cast<unsigned>(flags), line, file);
}

namespace detail {

enum Operation : uint32_t {
  kSum,
  kMax,
  kMin,
  kAnd,
  kOr,
  kXor,
  kShuffle,
  kBroadcast,
  kShuffleXor,
  kShuffleDown,
  kShuffleUp,
  kBallot,
  kAll,
  kAny,
  kMatrixLoad,
  kMatrixStore,
  kMatrixMultiply
};

template <class T>
struct Lanes {
  const unsigned char* slots;
  uint32_t active;
  bool has(unsigned lane) const { return lane < 32 && (active >> lane & 1); }
  T at(unsigned lane) const {
    T value;
    std::memcpy(static_cast<void*>(&value), slots + emu::kSlotBytes * lane, sizeof value);
    return value;
  }
  // What a lane outside the simdgroup holds is undefined; all ones is a NaN and a large integer.
  T pick(unsigned lane) const {
    T value;
    std::memset(static_cast<void*>(&value), 0xFF, sizeof value);
    return has(lane) ? at(lane) : value;
  }
};

template <class T>
Lanes<T> exchange(const T& value, Operation operation, int line, const char* file) {
  Lanes<T> lanes;
  lanes.slots = emu::simd_exchange(&value, sizeof value, operation, line, file, &lanes.active);
  return lanes;
}

// Pairwise, as hardware does it: a serial sum would round worse than the real one.
template <class T, class F>
T reduce(const T& value, Operation operation, int line, const char* file, F combine) {
  static_assert(!std::is_same_v<T, bfloat> && sizeof(T) <= 4,
                "no simdgroup function for this type");
  const Lanes<T> lanes = exchange(value, operation, line, file);
  T tree[32];
  bool valid[32];
  for (unsigned i = 0; i < 32; i++) {
    valid[i] = lanes.has(i);
    if (valid[i]) tree[i] = lanes.at(i);
  }
  for (int half_width = 16; half_width; half_width /= 2) {
    for (int i = 0; i < half_width; i++) {
      if (!valid[i + half_width]) continue;
      tree[i] = valid[i] ? combine(tree[i], tree[i + half_width]) : tree[i + half_width];
      valid[i] = true;
    }
  }
  return tree[0];
}

inline unsigned lane() { return emu::thread_state().lane; }

}  // namespace detail

#define EMU_REDUCTION(name, operation, expression)                   \
  template <class T>                                                 \
  T simd_##name(T value, EMU_HERE) {                                 \
    return detail::reduce(value, detail::operation, line, file,      \
                          [](T a, T b) -> T { return expression; }); \
  }
EMU_REDUCTION(sum, kSum, a + b)
EMU_REDUCTION(max, kMax, a < b ? b : a)
EMU_REDUCTION(min, kMin, b < a ? b : a)
EMU_REDUCTION(and, kAnd, a& b)
EMU_REDUCTION(or, kOr, a | b)
EMU_REDUCTION(xor, kXor, a ^ b)
#undef EMU_REDUCTION

#define EMU_SHUFFLE(name, operation, source)                                       \
  template <class T>                                                               \
  T simd_##name(T value, ushort n, EMU_HERE) {                                     \
    static_assert(!std::is_same_v<T, bfloat>, "no simdgroup function for bfloat"); \
    return detail::exchange(value, detail::operation, line, file).pick(source);    \
  }
EMU_SHUFFLE(shuffle, kShuffle, n)
EMU_SHUFFLE(broadcast, kBroadcast, n)
EMU_SHUFFLE(shuffle_xor, kShuffleXor, detail::lane() ^ n)
EMU_SHUFFLE(shuffle_down, kShuffleDown, detail::lane() + n)
EMU_SHUFFLE(shuffle_up, kShuffleUp, detail::lane() - n)
#undef EMU_SHUFFLE

struct simd_vote {
  ulong bits;
  explicit operator ulong() const { return bits; }
};
inline simd_vote simd_ballot(bool value, EMU_HERE) {
  const auto lanes = detail::exchange(value, detail::kBallot, line, file);
  ulong bits = 0;
  for (unsigned i = 0; i < 32; i++) bits |= static_cast<ulong>(lanes.has(i) && lanes.at(i)) << i;
  return {bits};
}
inline bool simd_all(bool value, EMU_HERE) {
  const auto lanes = detail::exchange(value, detail::kAll, line, file);
  bool all = true;
  for (unsigned i = 0; i < 32; i++) all &= !lanes.has(i) || lanes.at(i);
  return all;
}
inline bool simd_any(bool value, EMU_HERE) {
  const auto lanes = detail::exchange(value, detail::kAny, line, file);
  bool any = false;
  for (unsigned i = 0; i < 32; i++) any |= lanes.has(i) && lanes.at(i);
  return any;
}

}  // namespace metal

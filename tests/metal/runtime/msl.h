// Included first by every translated library: MSL's names, and the binding of kernel arguments.
#pragma once
#include "matrix.h"
#include "tensor.h"

using namespace metal;  // MSL's vector types need no qualification

namespace emu {

struct BufferIndex {
  int index;
};
enum class BuiltIn {
  kThreadPositionInGrid,
  kThreadPositionInThreadgroup,
  kThreadgroupPositionInGrid,
  kThreadsPerThreadgroup,
  kThreadgroupsPerGrid,
  kThreadIndexInThreadgroup,
  kThreadIndexInSimdgroup,
  kSimdgroupIndexInThreadgroup,
  kSimdgroupsPerThreadgroup,
};

inline Size3 built_in(BuiltIn which) {
  const Dispatch& d = dispatch();
  const Thread& t = thread_state();
  const Size3 n = d.threads_here;
  switch (which) {
    case BuiltIn::kThreadPositionInGrid:
      return {d.group.x * d.threads.x + t.position.x, d.group.y * d.threads.y + t.position.y,
              d.group.z * d.threads.z + t.position.z};
    case BuiltIn::kThreadPositionInThreadgroup:
      return t.position;
    case BuiltIn::kThreadgroupPositionInGrid:
      return d.group;
    case BuiltIn::kThreadsPerThreadgroup:
      return n;
    case BuiltIn::kThreadgroupsPerGrid:
      return d.groups;
    case BuiltIn::kThreadIndexInThreadgroup:
      return {t.index, 0, 0};
    case BuiltIn::kThreadIndexInSimdgroup:
      return {t.lane, 0, 0};
    case BuiltIn::kSimdgroupIndexInThreadgroup:
      return {t.simdgroup, 0, 0};
    case BuiltIn::kSimdgroupsPerThreadgroup:
      return {(n.x * n.y * n.z + 31) / 32, 0, 0};
  }
  return {};
}

template <class T>
struct FromSize {
  static T get(Size3 s) { return static_cast<T>(s.x); }
};
template <class T>
struct FromSize<metal::vec<T, 2>> {
  static metal::vec<T, 2> get(Size3 s) { return {s.x, s.y}; }
};
template <class T>
struct FromSize<metal::vec<T, 3>> {
  static metal::vec<T, 3> get(Size3 s) { return {s.x, s.y, s.z}; }
};

template <class P>
struct Argument {
  static P get(BuiltIn which) { return FromSize<std::remove_cv_t<P>>::get(built_in(which)); }
};
template <class T>
struct Argument<T*> {
  // An argument the kernel does not touch may stay unbound: then the pointer is wild.
  static T* get(BufferIndex b) {
    char* p = dispatch().buffer[b.index];
    return reinterpret_cast<T*>(p ? p : reinterpret_cast<char*>(uintptr_t{64}));
  }
};
template <class T>
struct Argument<T&> {
  static T& get(BufferIndex b) {
    if (dispatch().length[b.index] < sizeof(T)) {
      fail("buffer(%d) has %llu bytes, the struct needs %zu", b.index,
           static_cast<unsigned long long>(dispatch().length[b.index]), sizeof(T));
    }
    return *reinterpret_cast<T*>(dispatch().buffer[b.index]);
  }
};

template <class... P, class... S>
void call(void (*kernel)(P...), S... sources) {
  kernel(Argument<P>::get(sources)...);
}

template <class Declaration, class T>
T& threadgroup(const char* name) {
#ifdef __CUDACC_RTC__
  __shared__ alignas(16) unsigned char memory[sizeof(T)];
  return reinterpret_cast<T&>(memory);
#else
  static char key;
  return *static_cast<T*>(threadgroup_variable(&key, sizeof(T), alignof(T), name));
#endif
}

}  // namespace emu

// Metal 4's tensor operations: products of tiles in memory, whose sums a threadgroup holds
// together. Which thread holds what, Metal does not say, and this is another choice than any of
// Apple's.
#pragma once
#include "simdgroup.h"

namespace metal {

template <class T, int N>
struct array {
  T element[N];
  T& operator[](size_t i) { return element[i]; }
  const T& operator[](size_t i) const { return element[i]; }
};

template <class I, int N>
struct dextents {
  static_assert(N == 2, "the emulator knows tensors of two dimensions");
  I size[N];
  dextents(I first, I second) : size{first, second} {}
};

struct tensor_inline {};

// Memory with extents and strides, the innermost dimension first. What lies outside is zero.
template <class T, class Extents, class Kind>
struct tensor {
  using element_type = T;
  tensor(T* memory, Extents extents, array<int, 2> strides)
      : memory_(memory), extents_(extents), strides_(strides) {}
  float at(int inner, int outer) const {
    if (inner >= extents_.size[0] || outer >= extents_.size[1]) return 0;
    return float(memory_[inner * long(strides_[0]) + outer * long(strides_[1])]);
  }

 private:
  T* memory_;
  Extents extents_;
  array<int, 2> strides_;
};

template <int N>
struct execution_simdgroups {
  static constexpr int threads = 32 * N;
};

}  // namespace metal

namespace mpp::tensor_ops {

struct matmul2d_descriptor {
  enum class mode { multiply, multiply_accumulate };
  int m, n, k;
  bool transpose_left, transpose_right, relaxed_precision;
  mode matmul_mode;
  constexpr matmul2d_descriptor(int m,
                                int n,
                                int k,
                                bool left = false,
                                bool right = false,
                                bool relaxed = false,
                                mode how = mode::multiply)
      : m(m),
        n(n),
        k(k),
        transpose_left(left),
        transpose_right(right),
        relaxed_precision(relaxed),
        matmul_mode(how) {}
  // As a template argument, where C++17 takes no class.
  constexpr operator ulong() const {
    return ulong(m) | ulong(n) << 16 | ulong(k) << 32 | ulong(transpose_left) << 48 |
           ulong(transpose_right) << 49 | ulong(relaxed_precision) << 50 |
           ulong(matmul_mode == mode::multiply_accumulate) << 51;
  }
};

// The sums of one thread: a block of rows and four columns, and two elements that stand for none.
template <class T, int M, int N, int Threads>
class cooperative_tensor {
  static constexpr int kColumns = 4, kRows = M * N / Threads / kColumns;
  static_assert(kRows * kColumns * Threads == M * N, "every thread holds as many");

 public:
  cooperative_tensor() { std::memset(static_cast<void*>(element_), 0xFF, sizeof element_); }
  ushort get_capacity() const { return kRows * kColumns + 2; }
  bool is_valid_element(ushort i) const { return i != 1 && i + 1 != get_capacity(); }
  T& operator[](ushort i) { return element_[i]; }
  metal::array<int, 2> get_multidimensional_index(ushort i) const {
    if (!is_valid_element(i)) return {{0, 0}};  // where another thread has an element
    const int e = i > 1 ? i - 1 : i, blocks = N / kColumns;
    const int thread = emu::thread_state().index;
    return {{thread % blocks * kColumns + e / kRows, thread / blocks * kRows + e % kRows}};
  }

 private:
  T element_[kRows * kColumns + 2];
};

template <class A, class B, class C>
constexpr bool multiplies =
    emu::is_float_v<A> && emu::is_float_v<B> &&
    (std::is_same_v<C, float> || (!std::is_same_v<A, float> && !std::is_same_v<B, float> &&
                                  (std::is_same_v<C, A> || std::is_same_v<C, B>)));

template <ulong D, class Scope>
class matmul2d {
  static constexpr int kM = D & 0xFFFF, kN = D >> 16 & 0xFFFF, kK = D >> 32 & 0xFFFF;
  static constexpr bool kLeft = D >> 48 & 1, kRight = D >> 49 & 1, kRelaxed = D >> 50 & 1;
  static constexpr bool kAccumulate = D >> 51 & 1;
  static_assert(kM % 16 == 0 && kN % 16 == 0 && kK % 32 == 0, "extents of the operation");

 public:
  template <class L, class R, class T>
  auto get_destination_cooperative_tensor() const {
    static_assert(multiplies<typename L::element_type, typename R::element_type, T>,
                  "no operation for these types");
    return cooperative_tensor<T, kM, kN, Scope::threads>();
  }

  // Every thread of the scope comes here, and none is known to have read what it multiplies before
  // the next barrier.
  template <class L, class R, class T>
  void run(L& left, R& right, cooperative_tensor<T, kM, kN, Scope::threads>& sum, EMU_HERE) const {
    const emu::Size3 size = emu::dispatch().threads_here;
    if (size.x * size.y * size.z != Scope::threads) {
      emu::fail("an operation of %d threads in a threadgroup of %u", Scope::threads,
                size.x * size.y * size.z);
    }
    emu::threadgroup_barrier(0, line, file);
    const int first = sum.get_multidimensional_index(0)[1];
    const int last = sum.get_multidimensional_index(sum.get_capacity() - 2)[1];
    const int column0 = sum.get_multidimensional_index(0)[0];
    EMU_SCRATCH float a[kM][kK], b[4][kK];  // of the running thread: a fiber does not stop below
    for (int k = 0; k < kK; k++) {
      for (int i = first; i <= last; i++) a[i][k] = kLeft ? left.at(i, k) : left.at(k, i);
      for (int j = 0; j < 4; j++) {
        b[j][k] = kRight ? right.at(k, column0 + j) : right.at(column0 + j, k);
      }
    }
    for (ushort i = 0; i < sum.get_capacity(); i++) {
      if (!sum.is_valid_element(i)) continue;
      const auto at = sum.get_multidimensional_index(i);
      float total = kAccumulate ? float(sum[i]) : 0;
      for (int k = 0; k < kK; k++) {
        total = std::fma(a[at[1]][k], b[at[0] - column0][k], total);
        if (kRelaxed) total = float(half(total));
      }
      sum[i] = T(total);
    }
  }
};

}  // namespace mpp::tensor_ops

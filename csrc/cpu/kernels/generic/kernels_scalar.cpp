// The kernels as the format defines them: one value at a time, products summed in double. Every
// other table is held to this one.
#include <cmath>
#include <limits>
#include <type_traits>
#include <vector>

#include "../float_types.h"
#include "../kernels.h"
#include "../levels.h"

namespace onebit::cpu {
namespace {

bool supported() { return true; }

bool bit_at(const uint32_t* row, int64_t j) { return row[j / kWordBits] >> (j % kWordBits) & 1u; }

int64_t x_row(const QmmArgs& a, int64_t m) { return a.x_rows ? a.x_rows[m] : m; }
int64_t y_row(const QmmArgs& a, int64_t m) { return a.y_rows ? a.y_rows[m] : m; }

template <class S>
struct Levels {
  const S* scales;
  const S* biases;  // or null

  // What a bit stands for; with an infinite scale neither is finite, as dequantize has it.
  double value(int64_t group, bool bit) const {
    const double scale = to_float(scales[group]);
    return scale * double(bit) + (biases ? double(to_float(biases[group])) : -0.5 * scale);
  }
};

template <class S>
Levels<S> levels_of(const Weights& w) {
  return {static_cast<const S*>(w.scales), static_cast<const S*>(w.biases)};
}

// Sum as double, rounded once: to float, and from there to T.
template <class T>
void store(double sum, T& out) {
  if constexpr (std::is_same_v<T, double>) {
    out = sum;
  } else {
    from_float(float(sum), out);
  }
}

// y[m, n] = sum_j x[m, j] * (scale[n, g] * bit[n, j] + bias[n, g]) with g the group of column j.
template <class T, class S>
void qmm_t(const QmmArgs& a, const Block& block) {
  const auto* x = static_cast<const T*>(a.x);
  auto* y = static_cast<T*>(a.y);
  const auto levels = levels_of<S>(a.w);
  const int64_t words = a.k / kWordBits, groups = a.k / a.w.group_size;
  for (int64_t m = block.m_begin; m < block.m_end; ++m) {
    for (int64_t n = block.n_begin; n < block.n_end; ++n) {
      double sum = 0;
      for (int64_t g = 0; g < groups; ++g) {
        const double level[2] = {levels.value(n * groups + g, false),
                                 levels.value(n * groups + g, true)};
        for (int64_t j = g * a.w.group_size; j < (g + 1) * a.w.group_size; ++j) {
          const double value = to_float(x[x_row(a, m) * a.k + j]);
          sum += value * level[bit_at(a.w.packed + n * words, j)];
        }
      }
      store(sum, y[y_row(a, m) * a.n + n]);
    }
  }
}

// y[m, n] = sum_k x[m, k] * (scale[k, g] * bit[k, n] + bias[k, g]) with g the group of column n.
template <class T, class S>
void qmm_n(const QmmArgs& a, const Block& block) {
  const auto* x = static_cast<const T*>(a.x);
  auto* y = static_cast<T*>(a.y);
  const auto levels = levels_of<S>(a.w);
  const int64_t words = a.n / kWordBits, groups = a.n / a.w.group_size;
  std::vector<double> sums(block.n_end - block.n_begin);
  for (int64_t m = block.m_begin; m < block.m_end; ++m) {
    sums.assign(sums.size(), 0.0);
    for (int64_t k = 0; k < a.k; ++k) {
      const double value = to_float(x[x_row(a, m) * a.k + k]);
      for (int64_t n = block.n_begin; n < block.n_end; ++n) {
        const int64_t group = k * groups + n / a.w.group_size;
        const bool bit = bit_at(a.w.packed + k * words, n);
        sums[n - block.n_begin] += value * levels.value(group, bit);
      }
    }
    for (int64_t n = block.n_begin; n < block.n_end; ++n) {
      store(sums[n - block.n_begin], y[y_row(a, m) * a.n + n]);
    }
  }
}

// Both transposes: dW[row, column] = sum_m by_row[m, row] * by_column[m, column].
template <class T, class Sum>
void affine_grad(const AffineGradArgs& a,
                 const T* by_row,
                 int64_t rows,
                 const T* by_column,
                 int64_t columns,
                 int64_t begin,
                 int64_t end) {
  auto* grad_scales = static_cast<Sum*>(a.grad_scales);
  auto* grad_biases = static_cast<Sum*>(a.grad_biases);
  const int64_t words = columns / kWordBits, groups = columns / a.group_size;
  for (int64_t row = begin; row < end; ++row) {
    for (int64_t g = 0; g < groups; ++g) {
      double set = 0, all = 0;
      for (int64_t m = 0; m < a.m; ++m) {
        const double r = to_float(by_row[m * rows + row]);
        for (int64_t j = g * a.group_size; j < (g + 1) * a.group_size; ++j) {
          const double grad = r * to_float(by_column[m * columns + j]);
          all += grad;
          if (bit_at(a.packed + row * words, j)) set += grad;
        }
      }
      grad_scales[row * groups + g] += Sum(set);
      grad_biases[row * groups + g] += Sum(all);
    }
  }
}

template <class T>
void affine_grad_t(const AffineGradArgs& a, int64_t begin, int64_t end) {
  using Sum = std::conditional_t<std::is_same_v<T, double>, double, float>;
  affine_grad<T, Sum>(a, static_cast<const T*>(a.grad), a.n, static_cast<const T*>(a.x), a.k, begin,
                      end);
}

template <class T>
void affine_grad_n(const AffineGradArgs& a, int64_t begin, int64_t end) {
  using Sum = std::conditional_t<std::is_same_v<T, double>, double, float>;
  affine_grad<T, Sum>(a, static_cast<const T*>(a.x), a.k, static_cast<const T*>(a.grad), a.n, begin,
                      end);
}

// The rule of MLX's CPU kernel: the comparisons skip NaN and keep the sign of the first zero; a tie
// is 0; the bit is decided with the scale as it was before rounding to T.
template <class T>
void quantize(const T* w,
              int group_size,
              uint32_t* packed,
              T* scales,
              T* biases,
              int64_t begin,
              int64_t end) {
  using Value = decltype(to_float(T{}));
  for (int64_t g = begin; g < end; ++g) {
    const T* group = w + g * group_size;
    Value low = std::numeric_limits<Value>::infinity(), high = -low;
    for (int i = 0; i < group_size; ++i) {
      const Value v = to_float(group[i]);
      if (high < v) high = v;
      if (v < low) low = v;
    }
    Value scale = high - low;
    if (scale < Value(kMinScale)) scale = Value(kMinScale);
    const Value half = Value(0.5) * scale;
    for (int word = 0; word < group_size / kWordBits; ++word) {
      uint32_t bits = 0;
      for (int i = 0; i < kWordBits; ++i) {
        bits |= uint32_t(to_float(group[word * kWordBits + i]) - low > half) << i;
      }
      packed[g * (group_size / kWordBits) + word] = bits;
    }
    from_float(scale, scales[g]);
    from_float(low, biases[g]);
  }
}

// w_hat = round(round(bit * scale) + bias), as the arithmetic of S rounds; 0 * inf is NaN.
template <class S>
void dequantize(const Weights& w, S* out, int64_t begin, int64_t end) {
  const auto* scales = static_cast<const S*>(w.scales);
  const auto* biases = static_cast<const S*>(w.biases);
  const int words = w.group_size / kWordBits;
  for (int64_t g = begin; g < end; ++g) {
    const auto scale = to_float(scales[g]);
    S rounded;
    from_float(biases ? to_float(biases[g]) : scale * decltype(scale)(-0.5), rounded);
    const auto bias = to_float(rounded);
    S level[2];
    from_float(scale * 0 + bias, level[0]);
    from_float(scale + bias, level[1]);
    for (int j = 0; j < w.group_size; ++j) {
      *out++ = level[bit_at(w.packed + g * words, j)];
    }
  }
}

// Type-erased entries of the table
// --------------------------------------------------------------------

void qmm_t_any(const QmmArgs& a, const Block& block) {
  with_type(a.dtype, [&](auto* t) {
    with_type(a.w.dtype, [&](auto* s) {
      qmm_t<std::remove_pointer_t<decltype(t)>, std::remove_pointer_t<decltype(s)>>(a, block);
    });
  });
}

void qmm_n_any(const QmmArgs& a, const Block& block) {
  with_type(a.dtype, [&](auto* t) {
    with_type(a.w.dtype, [&](auto* s) {
      qmm_n<std::remove_pointer_t<decltype(t)>, std::remove_pointer_t<decltype(s)>>(a, block);
    });
  });
}

void affine_grad_t_any(const AffineGradArgs& a, int64_t begin, int64_t end) {
  with_type(a.dtype,
            [&](auto* t) { affine_grad_t<std::remove_pointer_t<decltype(t)>>(a, begin, end); });
}

void affine_grad_n_any(const AffineGradArgs& a, int64_t begin, int64_t end) {
  with_type(a.dtype,
            [&](auto* t) { affine_grad_n<std::remove_pointer_t<decltype(t)>>(a, begin, end); });
}

void quantize_any(const void* w,
                  DType dtype,
                  int group_size,
                  uint32_t* packed,
                  void* scales,
                  void* biases,
                  int64_t begin,
                  int64_t end) {
  with_type(dtype, [&](auto* t) {
    using T = std::remove_pointer_t<decltype(t)>;
    quantize(static_cast<const T*>(w), group_size, packed, static_cast<T*>(scales),
             static_cast<T*>(biases), begin, end);
  });
}

void dequantize_any(const Weights& w, void* out, int64_t begin, int64_t end) {
  with_type(w.dtype, [&](auto* s) {
    using S = std::remove_pointer_t<decltype(s)>;
    dequantize(w, static_cast<S*>(out), begin, end);
  });
}

}  // namespace

extern const Kernels kScalarKernels = {
    "scalar",
    supported,
    1,
    1,
    qmm_t_any,
    qmm_n_any,
    affine_grad_t_any,
    affine_grad_n_any,
    quantize_any,
    dequantize_any,
    &kGenericLevelKernels,
};

}  // namespace onebit::cpu

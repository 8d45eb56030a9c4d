// The table of one instruction set: from run-time dtypes and group sizes to the templates. Float64
// has no fast form: gradient checks use it, nothing else.
#pragma once

#include "affine_grad-inl.h"
#include "codec-inl.h"
#include "qmm-inl.h"
#include "qmm_n-inl.h"

namespace onebit::cpu {
namespace {

ONEBIT_INLINE bool is_empty(const Block& b) { return b.m_begin == b.m_end || b.n_begin == b.n_end; }

// f(Int<words>) for the words in a group.
template <class F>
ONEBIT_INLINE void with_words(int group_size, const F& f) {
  if (group_size == 128) return f(Int<4>{});
  if (group_size == 64) return f(Int<2>{});
  return f(Int<1>{});
}

// S::Stream: lookups for one row of x; S::Panel: for many; S::Narrow: a tile of at most 32 columns.
template <class S>
struct Table {
  // Columns whose tables over all of k fit L2.
  static constexpr int64_t kStreamColumns = 32768;

  static void qmm_t(const QmmArgs& a, const Block& block) {
    if (is_empty(block)) return;
    if (a.dtype == DType::kDouble || a.w.dtype == DType::kDouble) {
      return kScalarKernels.qmm_t(a, block);
    }
    with_words(a.w.group_size, [&](auto words) {
      constexpr int kWords = decltype(words)::value;
      if (a.m == 1 && a.k <= kStreamColumns) {
        qmm_t_stream<typename S::Stream, kWords>(a, block);
      } else {
        qmm_t_panels<typename S::Panel, kWords>(a, block);
      }
    });
  }

  static void qmm_n(const QmmArgs& a, const Block& block) {
    if (is_empty(block)) return;
    if (a.dtype == DType::kDouble || a.w.dtype == DType::kDouble) {
      return kScalarKernels.qmm_n(a, block);
    }
    if (a.w.group_size == 128) return qmm_n_panels<typename S::Panel, 128>(a, block);
    if (a.w.group_size == 64) return qmm_n_panels<typename S::Panel, 64>(a, block);
    return qmm_n_panels<typename S::Narrow, 32>(a, block);
  }

  static void affine_grad(const AffineGradArgs& a,
                          const Activations& by_row,
                          const Activations& by_column,
                          int64_t begin,
                          int64_t end) {
    if (begin == end) return;
    with_words(a.group_size, [&](auto words) {
      affine_grad_rows<typename S::Panel, decltype(words)::value>(
          {by_row, by_column, a.m, a.packed, static_cast<float*>(a.grad_scales),
           static_cast<float*>(a.grad_biases)},
          begin, end);
    });
  }

  static void affine_grad_t(const AffineGradArgs& a, int64_t begin, int64_t end) {
    if (a.dtype == DType::kDouble) return kScalarKernels.affine_grad_t(a, begin, end);
    affine_grad(a, {a.grad, a.dtype, a.n, nullptr}, {a.x, a.dtype, a.k, nullptr}, begin, end);
  }

  static void affine_grad_n(const AffineGradArgs& a, int64_t begin, int64_t end) {
    if (a.dtype == DType::kDouble) return kScalarKernels.affine_grad_n(a, begin, end);
    affine_grad(a, {a.x, a.dtype, a.k, nullptr}, {a.grad, a.dtype, a.n, nullptr}, begin, end);
  }

  static constexpr Kernels make(const char* name, bool (*supported)()) {
    return {name,
            supported,
            S::Panel::kMaxM,
            S::kTile,
            qmm_t,
            qmm_n,
            affine_grad_t,
            affine_grad_n,
            quantize<typename S::Panel>,
            dequantize<typename S::Panel>};
  }
};

}  // namespace
}  // namespace onebit::cpu

// The table of one instruction set: from run-time dtypes and group sizes to the templates.
#pragma once

#include "affine_grad-inl.h"
#include "codec-inl.h"
#include "qmm-inl.h"
#include "qmm_n-inl.h"

namespace onebit::cpu {
namespace {

// Whether x goes into int16 tables: only bfloat16, for float16 has more bits than their step
// leaves. Below 128 outputs they save nothing.
ONEBIT_INLINE bool has_int16_tables(const QmmArgs& a) {
  return a.dtype == DType::kBFloat16 && a.n >= 128;
}

ONEBIT_INLINE bool is_empty(const Block& b) { return b.m_begin == b.m_end || b.n_begin == b.n_end; }

// f(Int<words>) for the words in a group.
template <class F>
ONEBIT_INLINE void with_words(int group_size, const F& f) {
  if (group_size == 128) return f(Int<4>{});
  if (group_size == 64) return f(Int<2>{});
  return f(Int<1>{});
}

// S::Stream: lookups for one row of x; S::Panel: for many; S::Stream16 and S::Panel16 serve x of 16
// bits. S::NarrowPanel: S::Panel in a tile of at most 32 columns; S::Sums: of floats.
template <class S>
struct Table {
  // Columns whose tables over all of k fit L2.
  static constexpr int64_t kStreamColumns = 32768;

  template <class Stream, class Panel>
  static ONEBIT_INLINE void qmm_t_with(const QmmArgs& a, const Block& block) {
    with_words(a.w.group_size, [&](auto words) {
      constexpr int kWords = decltype(words)::value;
      if (a.m == 1 && a.k <= kStreamColumns) {
        qmm_t_stream<Stream, kWords>(a, block);
      } else {
        qmm_t_panels<Panel, kWords>(a, block);
      }
    });
  }

  static void qmm_t(const QmmArgs& a, const Block& block) {
    if (is_empty(block)) return;
    if (needs_scalar(a)) return kScalarKernels.qmm_t(a, block);
    if (has_int16_tables(a)) {
      qmm_t_with<typename S::Stream16, typename S::Panel16>(a, block);
    } else {
      qmm_t_with<typename S::Stream, typename S::Panel>(a, block);
    }
  }

  static void qmm_n(const QmmArgs& a, const Block& block) {
    if (is_empty(block)) return;
    if (needs_scalar(a)) return kScalarKernels.qmm_n(a, block);
    if (a.w.group_size == 128) return qmm_n_panels<typename S::Panel, 128>(a, block);
    if (a.w.group_size == 64) return qmm_n_panels<typename S::Panel, 64>(a, block);
    return qmm_n_panels<typename S::NarrowPanel, 32>(a, block);
  }

  static void affine_grad(const AffineGradArgs& a,
                          const Activations& by_row,
                          const Activations& by_column,
                          int64_t begin,
                          int64_t end) {
    if (begin == end) return;
    with_words(a.group_size, [&](auto words) {
      affine_grad_rows<typename S::Sums, decltype(words)::value>(
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

  static constexpr Kernels make(const char* name, bool (*supported)(), const LevelKernels* levels) {
    using V = typename S::Panel;
    Kernels k{};
    k.name = name;
    k.supported = supported;
    k.m_tile = V::kMaxM;
    k.n_tile = S::kTile;
    k.qmm_t = qmm_t;
    k.qmm_n = qmm_n;
    k.affine_grad_t = affine_grad_t;
    k.affine_grad_n = affine_grad_n;
    k.quantize = quantize<V>;
    k.dequantize = dequantize<V>;
    k.levels = levels;
    return k;
  }
};

}  // namespace
}  // namespace onebit::cpu

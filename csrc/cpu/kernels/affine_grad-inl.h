// Gradients of scales and biases. With dW[r, j] = sum_m by_row[m, r] * by_column[m, j],
//
//   grad_scales[r, g] = sum over group g of dW[r, j] * bit(r, j)
//                     = sum_m by_row[m, r] * (sum of by_column[m, j], j in g, bit set)
//   grad_biases[r, g] = sum_m by_row[m, r] * (sum of by_column[m, j], j in g)
//
// so dW is never formed: the inner sums are the lookups of qmm_t.
#pragma once

#include "qmm-inl.h"

namespace onebit::cpu {
namespace {

struct AffineGrad {
  Activations by_row, by_column;
  int64_t m;
  const uint32_t* packed;  // [by_row.columns, by_column.columns / 32]
  float *grad_scales, *grad_biases;
};

template <class L, int kCount>
ONEBIT_INLINE float sum_of(const float* x) {
  auto sum = L::load(x);
  ONEBIT_UNROLL
  for (int i = L::kLanes; i < kCount; i += L::kLanes) sum = L::add(sum, L::load(x + i));
  return L::sum(sum);
}

alignas(64) constexpr float kZeros[128] = {};  // what a clear bit stands for

// kM rows of activations, one group: adds to sums over weight rows [row, row + rows).
template <class L, int kM, int kWords>
void add_grad(const AffineGrad& a,
              int64_t m,
              int64_t group,
              int64_t row,
              int64_t rows,
              const uint32_t* index,
              float* table,
              float* scales,
              float* biases) {
  constexpr int kCount = kWords * kWordBits;
  alignas(64) float buffer[kCount];
  float sums[kM];
  for (int i = 0; i < kM; ++i) {
    const float* v = as_floats<L>(a.by_column.data, a.by_column.dtype,
                                  a.by_column.offset(m + i, group * kCount), kCount, buffer);
    L::template build<kM, kWords>({kZeros, v}, i, table);
    sums[i] = sum_of<L, kCount>(v);
  }
  for (int64_t n = 0; n < rows; n += L::kRows, index += L::index_size(kWords)) {
    typename L::Vec acc[kM][L::kVectors];
    collect<L, kM, kWords>(index, table, acc);
    ONEBIT_UNROLL
    for (int r = 0; r < L::kVectors; ++r) {
      const int64_t lane = n + r * L::kLanes;
      auto scale = L::load(scales + lane), bias = L::load(biases + lane);
      ONEBIT_UNROLL
      for (int i = 0; i < kM; ++i) {
        const auto grad = lane < rows ? L::load_as(a.by_row.data, a.by_row.dtype,
                                                   a.by_row.offset(m + i, row + lane), rows - lane)
                                      : L::zero();
        scale = L::fma(grad, acc[i][r], scale);
        bias = L::fma(grad, L::set(sums[i]), bias);
      }
      L::store(scales + lane, scale);
      L::store(biases + lane, bias);
    }
  }
}

template <class L, int kWords>
void affine_grad_rows(const AffineGrad& a, int64_t begin, int64_t end) {
  constexpr int kGroups = kChunkColumns / (kWords * kWordBits), kIndex = L::index_size(kWords);
  const int64_t panel = at_most(kPanelRows, tiles_for(end - begin, L::kRows) * L::kRows);
  const int64_t words = a.by_column.columns / kWordBits, groups = words / kWords;
  Arena arena(panel / L::kRows * kGroups * kIndex * 4 + 2 * kGroups * panel * 4 +
              L::kMaxM * L::table_size(kWords) * 4);
  auto* index = arena.take<uint32_t>(panel / L::kRows * kGroups * kIndex);
  auto* scales = arena.take<float>(kGroups * panel);
  auto* biases = arena.take<float>(kGroups * panel);
  auto* table = arena.take<float>(L::kMaxM * L::table_size(kWords));
  for (int64_t row = begin; row < end; row += kPanelRows) {
    const int64_t rows = at_most(kPanelRows, end - row), tiles = tiles_for(rows, L::kRows);
    for (int64_t g0 = 0; g0 < groups; g0 += kGroups) {
      const int64_t count = at_most(kGroups, groups - g0);
      for (int64_t t = 0; t < tiles; ++t) {
        const int64_t first = row + t * L::kRows;
        L::template pack_rows<kWords>(a.packed + first * words + g0 * kWords, words,
                                      int(at_most(L::kRows, row + rows - first)),
                                      int(count) * kWords, index + t * kIndex, tiles * kIndex);
      }
      for (int64_t i = 0; i < count * panel; i += L::kLanes) {
        L::store(scales + i, L::zero());
        L::store(biases + i, L::zero());
      }
      for_row_tiles<L>(a.m, [&](auto tile, int64_t m) {
        for (int64_t g = 0; g < count; ++g) {
          add_grad<L, decltype(tile)::value, kWords>(a, m, g0 + g, row, rows,
                                                     index + g * tiles * kIndex, table,
                                                     scales + g * panel, biases + g * panel);
        }
      });
      for (int64_t r = 0; r < rows; ++r) {
        for (int64_t g = 0; g < count; ++g) {
          a.grad_scales[(row + r) * groups + g0 + g] += scales[g * panel + r];
          a.grad_biases[(row + r) * groups + g0 + g] += biases[g * panel + r];
        }
      }
    }
  }
}

}  // namespace
}  // namespace onebit::cpu

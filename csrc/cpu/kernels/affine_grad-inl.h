// Gradients of scales and biases. With dW[r, j] = sum_m by_row[m, r] * by_column[m, j],
//
//   grad_scales[r, g] = sum over group g of dW[r, j] * bit(r, j)
//                     = sum_m by_row[m, r] * (sum of by_column[m, j], j in g, bit set)
//   grad_biases[r, g] = sum_m by_row[m, r] * (sum of by_column[m, j], j in g)
//
// so dW is never formed: the inner sums are the lookups of qmm_t, of floats. The outer ones are in
// double: dW's own roundings would average out over a group, those of one sum do not.
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
ONEBIT_INLINE double sum_of(const float* x) {
  Halves<L> sum(L::load(x));
  ONEBIT_UNROLL
  for (int i = L::kLanes; i < kCount; i += L::kLanes) sum.add(Halves<L>(L::load(x + i)), 1);
  const auto both = sum.half[0] + sum.half[1];
  double all = 0;
  for (int i = 0; i < Halves<L>::kCount; ++i) all += both[i];
  return all;
}

alignas(64) constexpr float kZeros[128] = {};  // what a clear bit stands for

// Roundings of sums count where values are of one sign or alike in size, or few rows average them.
// Values are then high + low, sums of the high ones exact; true if there are low ones.
constexpr int64_t kFewRows = 16;

template <class L, int kCount>
ONEBIT_INLINE bool split(const float* x, double sum, int64_t rows, float* high, float* low) {
  auto sizes = L::zero(), squares = L::zero();
  ONEBIT_UNROLL
  for (int i = 0; i < kCount; i += L::kLanes) {
    const auto v = L::load(x + i);
    sizes = L::add(sizes, L::abs(v));
    squares = L::fma(v, v, squares);
  }
  const float size = L::sum(sizes), square = kCount * L::sum(squares);
  if (!(size >= kLeastSum && size <= kMostSum)) return false;
  if (rows > kFewRows && 4 * square >= 5 * size * size && 2 * sum * sum <= square) return false;
  const auto coarse = L::set(size);  // added and taken away: rounded to 2^-24 of the sum
  ONEBIT_UNROLL
  for (int i = 0; i < kCount; i += L::kLanes) {
    const auto v = L::load(x + i), rounded = L::sub(L::add(v, coarse), coarse);
    L::store(high + i, rounded);
    L::store(low + i, L::sub(v, rounded));
  }
  return true;
}

// kM rows of activations, one group: adds to sums over weight rows [row, row + rows).
template <class L, int kM, int kWords>
void add_grad(const AffineGrad& a,
              int64_t m,
              int64_t group,
              int64_t row,
              int64_t rows,
              const uint32_t* index,
              float* table,
              double* scales,
              double* biases) {
  constexpr int kCount = kWords * kWordBits, kTable = kM * L::table_size(kWords);
  alignas(64) float buffer[kCount], high[kCount], low[kCount];
  double sums[kM];
  int tables = 1;
  for (int i = 0; i < kM; ++i) {
    const float* v = as_floats<L>(a.by_column.data, a.by_column.dtype,
                                  a.by_column.offset(m + i, group * kCount), kCount, buffer);
    sums[i] = sum_of<L, kCount>(v);
    const bool both =
        a.by_column.dtype == DType::kFloat && split<L, kCount>(v, sums[i], a.m, high, low);
    L::template build<kM, kWords>({kZeros, both ? high : v}, i, table);
    if (!both) continue;
    if (tables == 1) std::memset(table + kTable, 0, kTable * sizeof(float));
    tables = 2;
    L::template build<kM, kWords>({kZeros, low}, i, table + kTable);
  }
  for (int64_t n = 0; n < rows; n += L::kRows, index += L::index_size(kWords)) {
    typename L::Vec acc[2][kM][L::kVectors];
    for (int t = 0; t < tables; ++t) collect<L, kM, kWords>(index, table + t * kTable, acc[t]);
    ONEBIT_UNROLL
    for (int r = 0; r < L::kVectors; ++r) {
      const int64_t lane = n + r * L::kLanes;
      Halves<L> scale(scales + lane), bias(biases + lane);
      ONEBIT_UNROLL
      for (int i = 0; i < kM; ++i) {
        const Halves<L> grad(lane < rows
                                 ? L::load_as(a.by_row.data, a.by_row.dtype,
                                              a.by_row.offset(m + i, row + lane), rows - lane)
                                 : L::zero());
        for (int t = 0; t < tables; ++t) scale.add(grad, Halves<L>(acc[t][i][r]));
        bias.add(grad, sums[i]);
      }
      scale.store(scales + lane);
      bias.store(biases + lane);
    }
  }
}

template <class L, int kWords>
void affine_grad_rows(const AffineGrad& a, int64_t begin, int64_t end) {
  constexpr int kGroups = kChunkColumns / (kWords * kWordBits), kIndex = L::index_size(kWords);
  const int64_t panel = at_most(kPanelRows, tiles_for(end - begin, L::kRows) * L::kRows);
  const int64_t words = a.by_column.columns / kWordBits, groups = words / kWords;
  Arena arena(panel / L::kRows * kGroups * kIndex * 4 + 2 * kGroups * panel * 8 +
              2 * L::kMaxM * L::table_size(kWords) * 4);
  auto* index = arena.take<uint32_t>(panel / L::kRows * kGroups * kIndex);
  auto* scales = arena.take<double>(kGroups * panel);
  auto* biases = arena.take<double>(kGroups * panel);
  auto* table = arena.take<float>(2 * L::kMaxM * L::table_size(kWords));
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
      std::memset(scales, 0, count * panel * sizeof(double));
      std::memset(biases, 0, count * panel * sizeof(double));
      for_row_tiles<L>(a.m, [&](auto tile, int64_t m) {
        for (int64_t g = 0; g < count; ++g) {
          add_grad<L, decltype(tile)::value, kWords>(a, m, g0 + g, row, rows,
                                                     index + g * tiles * kIndex, table,
                                                     scales + g * panel, biases + g * panel);
        }
      });
      for (int64_t r = 0; r < rows; ++r) {
        for (int64_t g = 0; g < count; ++g) {
          a.grad_scales[(row + r) * groups + g0 + g] += float(scales[g * panel + r]);
          a.grad_biases[(row + r) * groups + g0 + g] += float(biases[g * panel + r]);
        }
      }
    }
  }
}

}  // namespace
}  // namespace onebit::cpu

// transpose=False, y[m, n] = sum_k x[m, k] * (scale[k, g] * bit[k, n] + bias[k, g]), g the group of
// column n: the product of the backward pass.
//
// Within one group of columns both levels belong to the activation: x[m, k] * (scale[k, g] +
// bias[k, g]) for a set bit, x[m, k] * bias[k, g] for a clear one. Sums of one or the other are a
// lookup once the bits of 32 rows k of a column lie in one word. `pack_columns` transposes them so,
// a unit of 128 rows at a time; tables serve one group of columns. Both products are taken as
// integers times a power of two, so that sums of a unit are exact, and units add up in double.
#pragma once

#include "qmm-inl.h"

namespace onebit::cpu {
namespace {

constexpr int kUnit = 128;  // rows of w in one lookup pass
constexpr int kUnitWords = kUnit / kWordBits;
constexpr int64_t kColumnPanel = 1024;
constexpr int kRowChunk = 512;

// The levels of a unit of rows, in one group of columns.
template <class L>
struct UnitLevels {
  alignas(64) float clear[kUnit], set[kUnit];
  alignas(64) float lost[kUnit];  // of `set`, by rounding
  alignas(64) float size[kUnit];  // of the larger one
  int count[2];                   // of clear and set ones that are not 0

  ONEBIT_INLINE UnitLevels(const float* scales, const float* biases) : count{0, 0} {
    ONEBIT_UNROLL
    for (int j = 0; j < kUnit; j += L::kLanes) {
      const auto scale = L::load(scales + j), bias = L::load(biases + j);
      const auto low = L::fma(scale, L::zero(), bias);  // an infinite scale: a level of neither bit
      const auto high = L::add(scale, bias), added = L::sub(high, scale);
      L::store(clear + j, low);
      L::store(set + j, high);
      L::store(lost + j, L::add(L::sub(scale, L::sub(high, added)), L::sub(bias, added)));
      L::store(size + j, L::larger(L::abs(low), L::abs(high)));
      count[0] += __builtin_popcount(L::greater_bits(L::abs(low), L::zero()));
      count[1] += __builtin_popcount(L::greater_bits(L::abs(high), L::zero()));
    }
  }
};

// One row of x in a unit of rows of w.
template <class L>
struct UnitRow {
  alignas(64) float x[kUnit];
  int count;    // of values that are not 0
  bool exact;   // of 24 bits: what rounding a product loses counts
  bool alike;   // in size: others may add them up so that every partial sum is small
  float least;  // of the size of all products; what is smaller may be lost

  ONEBIT_INLINE void load(const Activations& from, int64_t m, int64_t k, int64_t values) {
    auto sizes = L::zero(), squares = L::zero();
    count = 0;
    ONEBIT_UNROLL
    for (int j = 0; j < kUnit; j += L::kLanes) {
      const auto v = L::load_as(from.data, from.dtype, from.offset(m, k + j), values - j);
      L::store(x + j, v);
      sizes = L::add(sizes, L::abs(v));
      squares = L::fma(v, v, squares);
      count += __builtin_popcount(L::greater_bits(L::abs(v), L::zero()));
    }
    const float size = L::sum(sizes);
    exact = from.dtype == DType::kFloat;
    alike = 4 * count * L::sum(squares) < 5 * size * size;
    least = 0x1p-33f / tolerance_of(from.dtype);
  }
};

// x * level for set bits less that for clear ones, and the sum of the latter, in steps.
struct UnitPlanes {
  int count;  // 0: not for tables
  alignas(64) int32_t q[2][kUnit];
  double step[2];
  int32_t clear[2];
};

// Both products of each value, as integers. They are exact but for the last rounding: a product is
// the rounded one less `rest`. Plane 1 is what plane 0 has lost.
template <bool kExact, class L>
ONEBIT_INLINE bool make_unit_plane(
    const UnitRow<L>& row, const UnitLevels<L>& levels, float size, UnitPlanes& planes, int plane) {
  constexpr float kLimit = 0x1p31f - 8192;  // each value may round up
  constexpr float kFiner = 0x1p23f;         // a plane than the one before
  const uint32_t exponent = (bits_of(size * (1 / kLimit)) + 0x7fffff) & 0x7f800000;
  const auto step = L::set(float_of(exponent));
  const auto inverse = L::set(float_of(0x7f000000 - exponent)), finer = L::set(kFiner);
  const auto least = L::set(size * row.least * (plane ? 1 / kFiner : 1));
  auto sum = L::ints(0);
  int good[2] = {0, 0};
  typename L::Ints q[2];
  ONEBIT_UNROLL
  for (int j = 0; j < kUnit; j += L::kLanes) {
    const auto x = L::load(row.x + j);
    ONEBIT_UNROLL
    for (int b = 0; b < 2; ++b) {
      const auto level = L::load((b ? levels.set : levels.clear) + j);
      const auto product = L::mul(x, level);
      q[b] = L::round(L::mul(product, inverse));
      auto lost = plane ? L::fnma(step, L::to_floats(q[b]), product) : L::zero();
      if (kExact) {
        auto rest = L::fnma(x, level, product);
        if (b) rest = L::fnma(x, L::load(levels.lost + j), rest);
        const auto rounded = L::round(L::mul(rest, inverse));
        q[b] = L::sub_ints(q[b], rounded);
        if (plane) lost = L::sub(lost, L::fnma(step, L::to_floats(rounded), rest));
      }
      if (plane) q[b] = L::round(L::mul(L::mul(lost, inverse), finer));
      good[b] += __builtin_popcount(L::greater_bits(L::abs(product), least));
    }
    L::store_ints(planes.q[plane] + j, L::sub_ints(q[1], q[0]));
    sum = L::add_ints(sum, q[0]);
  }
  planes.step[plane] = double(float_of(exponent)) * (plane ? 1 / kFiner : 1);
  planes.clear[plane] = L::sum_ints(sum);
  const auto enough = [&](int b) { return 4 * good[b] >= at_most(row.count, levels.count[b]); };
  return enough(0) && enough(1);
}

// A quarter of the products must be well above the step, for the others may meet levels of 0.
template <class L>
ONEBIT_INLINE void make_unit(const UnitRow<L>& row,
                             const UnitLevels<L>& levels,
                             UnitPlanes& planes) {
  auto sizes = L::zero();
  ONEBIT_UNROLL
  for (int j = 0; j < kUnit; j += L::kLanes) {
    sizes = L::fma(L::abs(L::load(row.x + j)), L::load(levels.size + j), sizes);
  }
  const float size = L::sum(sizes);
  planes.count = 0;
  if (!(size == 0 || (size >= kLeastSum && size <= kMostSum))) return;
  planes.count = 1;
  if (row.exact) {
    if (make_unit_plane<true>(row, levels, size, planes, 0) && !row.alike) return;
    planes.count = make_unit_plane<true>(row, levels, size, planes, 1) ? 2 : 0;
  } else {
    if (make_unit_plane<false>(row, levels, size, planes, 0)) return;
    planes.count = make_unit_plane<false>(row, levels, size, planes, 1) ? 2 : 0;
  }
}

// y[kGroup columns from n on] += one unit of one row of x, value by value: infinite, NaN and
// extreme values.
template <int kGroup>
__attribute__((noinline)) void add_plain_unit(const float* x,
                                              const uint32_t* words,
                                              int64_t stride,
                                              int64_t count,
                                              const float* scales,
                                              const float* biases,
                                              double* y) {
  for (int64_t j = 0; j < count; ++j, words += stride) {
    const double scale = scales[j], bias = biases[j];
    const double products[2] = {x[j] * (scale * 0 + bias), x[j] * (scale + bias)};
    for (int c = 0; c < kGroup; ++c) y[c] += products[words[c / kWordBits] >> c % kWordBits & 1u];
  }
}

// kM rows of x, one unit of k, all columns of a panel.
template <class L, int kM, int kGroup>
void add_unit(const QmmArgs& a,
              int64_t m,
              int64_t k,
              int64_t n,
              int64_t columns,
              const uint32_t* index,
              const float* scales,  // [groups][kRowChunk]
              const float* biases,
              float* table,
              double* acc,
              int64_t ld) {
  constexpr int kTiles = kGroup / L::kRows, kTable = L::table_size(kUnitWords);
  static_assert(kTiles * L::kRows == kGroup, "a tile must lie in one group");
  UnitRow<L> row[kM];
  const int64_t count = at_most(kUnit, a.k - k), words = a.n / kWordBits;
  for (int i = 0; i < kM; ++i) row[i].load(activations(a), m + i, k, count);
  for (int64_t end = n + columns; n < end; n += kGroup) {
    const UnitLevels<L> levels(scales, biases);
    double step[2][kM] = {};
    int32_t start[2][kM] = {};
    int most = 0;
    for (int i = 0; i < kM; ++i) {
      UnitPlanes planes;
      make_unit<L>(row[i], levels, planes);
      if (__builtin_expect(planes.count == 0, 0)) {
        add_plain_unit<kGroup>(row[i].x, a.w.packed + k * words + n / kWordBits, words, count,
                               scales, biases, acc + i * ld);
        std::memset(planes.q[0], 0, sizeof planes.q[0]);
        planes.clear[0] = 0;
        planes.step[0] = 0;
      }
      if (planes.count == 2 && most < 2) std::memset(table + kTable * kM, 0, kTable * kM * 4);
      for (int plane = 0; plane == 0 || plane < planes.count; ++plane) {
        L::template build<kM, kUnitWords>(typename L::Numbers(planes.q[plane]), i,
                                          table + plane * kTable * kM);
        step[plane][i] = planes.step[plane];
        start[plane][i] = int32_t(-uint32_t(planes.clear[plane]));
        if (most <= plane) most = plane + 1;
      }
    }
    for (int t = 0; t < kTiles; ++t, index += L::index_size(kUnitWords), acc += L::kRows) {
      for (int plane = 0; plane < most; ++plane) {
        L::template tile<kM, kUnitWords>(index, table + plane * kTable * kM, start[plane],
                                         [&](int r, const typename L::Ints(&sums)[kM])
                                             __attribute__((always_inline)) {
                                               ONEBIT_UNROLL
                                               for (int i = 0; i < kM; ++i) {
                                                 double* to = acc + i * ld + r * L::kLanes;
                                                 Halves<L> sum(to);
                                                 sum.add(Halves<L>(sums[i]), step[plane][i]);
                                                 sum.store(to);
                                               }
                                             });
      }
    }
    scales += kRowChunk;
    biases += kRowChunk;
  }
}

template <class L, int kGroup>
void qmm_n_panels(const QmmArgs& a, const Block& block) {
  constexpr int kIndex = L::index_size(kUnitWords), kUnits = kRowChunk / kUnit;
  const int64_t panel = at_most(kColumnPanel, block.n_end - block.n_begin);
  const int64_t m_block = at_most(kBlockM, block.m_end - block.m_begin);
  const int64_t words = a.n / kWordBits;
  Arena arena(kUnits * panel / L::kRows * kIndex * 4 + 2 * (panel / kGroup) * kRowChunk * 4 +
              2 * L::kMaxM * L::table_size(kUnitWords) * 4 + m_block * panel * 8);
  auto* index = arena.take<uint32_t>(kUnits * panel / L::kRows * kIndex);
  auto* scales = arena.take<float>(panel / kGroup * kRowChunk);
  auto* biases = arena.take<float>(panel / kGroup * kRowChunk);
  auto* table = arena.take<float>(2 * L::kMaxM * L::table_size(kUnitWords));
  auto* sums = arena.take<double>(m_block * panel);
  for (int64_t m = block.m_begin; m < block.m_end; m += kBlockM) {
    const int64_t m_count = at_most(kBlockM, block.m_end - m);
    for (int64_t n = block.n_begin; n < block.n_end; n += kColumnPanel) {
      const int64_t columns = at_most(kColumnPanel, block.n_end - n);
      const int64_t unit_size = columns / L::kRows * kIndex;
      std::memset(sums, 0, m_count * columns * sizeof(double));
      for (int64_t k = 0; k < a.k; k += kRowChunk) {
        const int64_t rows = at_most(kRowChunk, a.k - k), units = tiles_for(rows, kUnit);
        for (int64_t u = 0; u < units; ++u) {
          for (int64_t c = 0; c < columns; c += L::kRows) {
            L::pack_columns(a.w.packed + (k + u * kUnit) * words, words, n + c,
                            int(at_most(kUnit, rows - u * kUnit)),
                            index + u * unit_size + c / L::kRows * kIndex);
          }
        }
        // Lanes past the last row hold copies of it; x is 0 there, and the copies are finite or
        // spoil an output that is not finite anyway.
        pack_levels<L>(a.w, k, rows, n / kGroup, int(columns / kGroup), scales, biases, kRowChunk);
        const int64_t filled = tiles_for(rows, L::kLanes) * L::kLanes;
        for (int64_t g = 0; g < columns / kGroup; ++g) {
          for (int64_t i = filled; i < units * kUnit; i += L::kLanes) {
            L::store(scales + g * kRowChunk + i, L::zero());
            L::store(biases + g * kRowChunk + i, L::zero());
          }
        }
        for_row_tiles<L>(m_count, [&](auto tile, int64_t i) {
          for (int64_t u = 0; u < units; ++u) {
            add_unit<L, decltype(tile)::value, kGroup>(
                a, m + i, k + u * kUnit, n, columns, index + u * unit_size, scales + u * kUnit,
                biases + u * kUnit, table, sums + i * columns, columns);
          }
        });
      }
      for (int64_t i = 0; i < m_count; ++i) {
        const int64_t offset = row_of(a.y_rows, m + i) * a.n + n;
        for (int64_t j = 0; j < columns; j += L::kLanes) {
          alignas(64) float rounded[L::kLanes];
          for (int c = 0; c < L::kLanes; ++c) rounded[c] = float(sums[i * columns + j + c]);
          L::store_as(a.y, a.dtype, offset + j, columns - j, L::load(rounded));
        }
      }
    }
  }
}

}  // namespace
}  // namespace onebit::cpu

// One group of a few rows of x times one group of a panel of weights, for every instruction set.
//
//   y[m, n] += scale[n, g] * (sum of x[m, j], j in g, bit set)
//              + bias[n, g] * (sum of x[m, j], j in g)
//
// A `Lookup` L works on tiles of L::kRows outputs x up to L::kMaxM rows of x: `pack_rows` turns
// weight words into index vectors (lane = output row), `build` turns the group's activations, in
// fixed point, into a table, `tile` returns the first sum, and `Levels` makes the product of it.
#pragma once

#include "values-inl.h"

namespace onebit::cpu {
namespace {

// acc[m][r]: what `tile` emits.
template <class L, int kM, int kWords>
ONEBIT_INLINE void collect(const uint32_t* index,
                           const float* table,
                           typename L::Vec (&acc)[kM][L::kVectors]) {
  L::template tile<kM, kWords>(index, table, nullptr,
                               [&](int r, const typename L::Vec(&sums)[kM])
                                   __attribute__((always_inline)) {
                                     ONEBIT_UNROLL
                                     for (int m = 0; m < kM; ++m) acc[m][r] = sums[m];
                                   });
}

// What the tables of one group for kM rows of x stand for.
template <int kM>
struct Group {
  int planes;          // tables to look up from; where a row needs fewer, its others are zeros
  uint32_t plain;      // bit i: row i is in no table, but multiplied value by value
  uint32_t in_double;  // bit i: products of row i are added up in double
  float unit[2][kM];   // of the sums that are looked up
  float all[2][kM];    // the sum of the group in units
  int32_t sum[2][kM];  // the same in steps
  int units;           // in a step
  bool usual;          // whether the levels that were met last were

  ONEBIT_INLINE float step(int plane, int row) const { return unit[plane][row] * units; }

  template <class Planes>
  ONEBIT_INLINE void set(int plane, int row, const Planes& planes) {
    units = sizeof(planes.q[0][0]) == 4 ? 2 : 1;
    unit[plane][row] = planes.step[plane] / units;
    all[plane][row] = float(planes.sum[plane]) * units;
    sum[plane][row] = planes.sum[plane];
  }
};

// What the outputs of a block have been added up to, from some row of x on. Rows that have no use
// for doubles leave them untouched.
struct Sums {
  float* floats;    // [rows][ld]
  double* doubles;  // the same, where has_doubles
  bool* has_doubles;
  int64_t ld;

  ONEBIT_INLINE Sums from(int64_t row, int64_t column = 0) const {
    return {floats + row * ld + column, doubles + row * ld + column, has_doubles + row, ld};
  }
};

ONEBIT_INLINE int64_t sums_size(int64_t rows, int64_t ld) { return rows * (ld * 12 + 1); }

ONEBIT_INLINE Sums take_sums(Arena& arena, int64_t rows, int64_t ld) {
  auto* floats = arena.take<float>(rows * ld);
  auto* doubles = arena.take<double>(rows * ld);
  return {floats, doubles, arena.take<bool>(rows), ld};
}

template <class L>
ONEBIT_INLINE void clear_sums(const Sums& y, int64_t rows, int64_t columns) {
  for (int64_t i = 0; i < rows; ++i) {
    y.has_doubles[i] = false;
    for (int64_t j = 0; j < columns; j += L::kLanes) L::store(y.floats + i * y.ld + j, L::zero());
  }
}

// A chain of more additions in float would round what the first groups gave too often.
constexpr int64_t kLongestChain = 64;

// After `done` of `all` terms of float32 products: what the chains have come to goes to the
// doubles.
ONEBIT_INLINE void end_chains(
    const QmmArgs& a, int64_t done, int64_t all, const Sums& y, int64_t rows, int64_t columns) {
  if (a.dtype != DType::kFloat || done % kLongestChain != 0 || done == all) return;
  for (int64_t i = 0; i < rows; ++i) {
    const Sums row = y.from(i);
    if (!*row.has_doubles) std::memset(row.doubles, 0, columns * sizeof(double));
    *row.has_doubles = true;
    for (int64_t j = 0; j < columns; ++j) {
      row.doubles[j] += row.floats[j];
      row.floats[j] = 0;
    }
  }
}

// Tables of one group for kM rows of x from row m on; `second` is written only where it is needed.
template <class L, int kM, int kWords>
ONEBIT_INLINE void build_tables(const Activations& x,
                                int64_t m,
                                int64_t column,
                                float* table,
                                float* second,
                                Group<kM>& group) {
  constexpr int kCount = 32 * kWords;
  using Numbers = typename L::Numbers;
  alignas(64) float buffer[kCount];
  Planes<typename L::Integer, kCount> planes;
  group.planes = 1;
  group.usual = true;
  group.plain = 0;
  group.in_double = 0;
  for (int i = 0; i < kM; ++i) {
    const float* v = as_floats<L>(x.data, x.dtype, x.offset(m + i, column), kCount, buffer);
    to_planes<L>(v, x.dtype, planes);
    if (planes.one_sided) group.in_double |= 1u << i;
    if (planes.count == 0) {
      group.plain |= 1u << i;
      planes.step[0] = 0;
      planes.sum[0] = 0;
      std::memset(planes.q[0], 0, sizeof planes.q[0]);
    }
    L::template build<kM, kWords>(Numbers(planes.q[0]), i, table);
    group.set(0, i, planes);
    if (planes.count < 2) continue;
    if (group.planes < 2) {
      group.planes = 2;
      std::memset(second, 0, L::table_size(kWords) * kM * 4);
      std::memset(group.unit[1], 0, sizeof group.unit[1]);
      std::memset(group.all[1], 0, sizeof group.all[1]);
      std::memset(group.sum[1], 0, sizeof group.sum[1]);
    }
    L::template build<kM, kWords>(Numbers(planes.q[1]), i, second);
    group.set(1, i, planes);
  }
}

// One group of a panel of weights, tile by tile: words as pack_rows, levels as pack_levels left
// them.
template <class L, int kWords>
struct PackedGroup {
  static constexpr bool kSpareStored = true;
  const uint32_t* words;
  const float *scales, *biases;

  ONEBIT_INLINE const uint32_t* index(int64_t tile) const {
    return words + tile * L::index_size(kWords);
  }
  ONEBIT_INLINE auto scale(int64_t tile, int r) const {
    return L::load(scales + tile * L::kRows + r * L::kLanes);
  }
  ONEBIT_INLINE auto bias(int64_t tile, int r) const {
    return L::load(biases + tile * L::kRows + r * L::kLanes);
  }
  ONEBIT_INLINE void prefetch(int64_t) const {}
};

// y[tiles * kRows] += one group of one row of x, value by value, as IEEE arithmetic has it:
// infinite, NaN and extreme values.
template <class L, int kWords, class Panel>
__attribute__((noinline)) void add_plain(
    const Activations& x, int64_t m, int64_t column, const Panel& w, float* y, int64_t tiles) {
  constexpr int kCount = 32 * kWords;
  alignas(64) float buffer[kCount];
  const float* v = as_floats<L>(x.data, x.dtype, x.offset(m, column), kCount, buffer);
  for (int64_t t = 0; t < tiles; ++t, y += L::kRows) {
    for (int r = 0; r < L::kVectors; ++r) {
      const auto scale = w.scale(t, r), bias = w.bias(t, r);
      const auto low = L::fma(scale, L::zero(), bias), high = L::add(scale, bias);
      auto sum = L::zero();
      for (int j = 0; j < kCount; ++j) {
        const auto bit = L::bit_of(w.index(t) + L::dword(j, r), L::bit(j, r));
        sum = L::fma(L::set(v[j]), L::choose(bit, high, low), sum);
      }
      L::store(y + r * L::kLanes, L::add(L::load(y + r * L::kLanes), sum));
    }
  }
}

// What fixed point has lost of the small values of a group.
template <int kM, int kCount>
struct Lost {
  bool known = false;
  int count[kM];  // of values of which something that counts is lost
  uint8_t columns[kM][kCount];
  float rest[kM][kCount];

  template <class L>
  __attribute__((noinline)) void find(const Activations& x,
                                      int64_t m,
                                      int64_t column,
                                      const Group<kM>& group) {
    known = true;
    const auto tolerance = L::set(2 * tolerance_of(x.dtype));
    alignas(64) float buffer[kCount], all[kCount];
    for (int i = 0; i < kM; ++i) {
      count[i] = 0;
      const float *v = as_floats<L>(x.data, x.dtype, x.offset(m + i, column), kCount, buffer),
                  step = group.step(0, i), second = group.planes > 1 ? group.step(1, i) : 0;
      if (step == 0) continue;  // zeros, or in no table
      for (int j = 0; j < kCount; j += L::kLanes) {
        const auto value = L::load(v + j);
        auto lost = rest_of<L>(value, step);
        if (second != 0) lost = rest_of<L>(lost, second);
        L::store(all + j, lost);
        uint32_t bits = L::greater_bits(L::abs(lost), L::mul(L::abs(value), tolerance));
        for (; bits != 0; bits &= bits - 1) {
          const int at = j + __builtin_ctz(bits);
          columns[i][count[i]] = uint8_t(at);
          rest[i][count[i]++] = all[at];
        }
      }
    }
  }
};

// y[kM, tile t] += what is lost where one level is 64 times the other or more: it may be all that
// counts where the others meet a level of 0.
template <class L, int kM, int kWords, class Panel>
__attribute__((noinline)) void add_lost(const Activations& x,
                                        int64_t m,
                                        int64_t column,
                                        const Group<kM>& group,
                                        Lost<kM, 32 * kWords>& lost,
                                        const Panel& w,
                                        int64_t t,
                                        const Sums& y) {
  for (int r = 0; r < L::kVectors; ++r) {
    const auto scale = w.scale(t, r), bias = w.bias(t, r);
    const auto low = L::fma(scale, L::zero(), bias), high = L::add(scale, bias);
    const auto low_size = L::abs(low), high_size = L::abs(high), far = L::set(64);
    const bool apart = L::greater_bits(low_size, L::mul(high_size, far)) |
                       L::greater_bits(high_size, L::mul(low_size, far));
    if (!apart) continue;
    if (!lost.known) lost.template find<L>(x, m, column, group);
    for (int i = 0; i < kM; ++i) {
      if (lost.count[i] == 0) continue;
      auto sum = L::zero();
      for (int c = 0; c < lost.count[i]; ++c) {
        const int j = lost.columns[i][c];
        const auto bit = L::bit_of(w.index(t) + L::dword(j, r), L::bit(j, r));
        sum = L::fma(L::set(lost.rest[i][c]), L::choose(bit, high, low), sum);
      }
      float* out = y.floats + i * y.ld + r * L::kLanes;
      L::store(out, L::add(L::load(out), sum));
    }
  }
}

// y[kM, tile t] += one plane of a group, whatever its levels and its values.
template <class L, int kM, int kWords, class Panel>
__attribute__((noinline)) void add_any_tile(const Group<kM>& group,
                                            int plane,
                                            const float* table,
                                            const Panel& w,
                                            int64_t t,
                                            const Sums& y) {
  L::template tile<kM, kWords, Panel::kSpareStored>(
      w.index(t), table, group.sum[plane],
      [&](int r, const auto& sums) __attribute__((always_inline)) {
        const Levels<L> levels(w.scale(t, r), w.bias(t, r));
        const bool usual = levels.are_usual();
        for (int i = 0; i < kM; ++i) {
          const float unit = group.unit[plane][i];
          const int64_t at = i * y.ld + r * L::kLanes;
          if (group.in_double >> i & 1u) {
            DoubleLevels<L>(w.scale(t, r), w.bias(t, r))
                .add(y.doubles + at, ints_of<L>(sums[i]), unit, group.sum[plane][i]);
            continue;
          }
          const auto to = L::load(y.floats + at);
          L::store(y.floats + at,
                   usual ? levels.add_usual(to, floats_of<L>(sums[i]), unit, group.all[plane][i])
                         : levels.add_any(to, ints_of<L>(sums[i]), unit, group.sum[plane][i]));
        }
      });
}

// The same for rows that all are added up in double.
template <class L, int kM, int kWords, class Panel>
__attribute__((noinline)) void add_double_tile(const Group<kM>& group,
                                               int plane,
                                               const float* table,
                                               const Panel& w,
                                               int64_t t,
                                               const Sums& y) {
  L::template tile<kM, kWords, Panel::kSpareStored>(
      w.index(t), table, group.sum[plane],
      [&](int r, const auto& sums) __attribute__((always_inline)) {
        const DoubleLevels<L> levels(w.scale(t, r), w.bias(t, r));
        double* out = y.doubles + r * L::kLanes;
        ONEBIT_UNROLL
        for (int i = 0; i < kM; ++i, out += y.ld) {
          levels.add(out, ints_of<L>(sums[i]), group.unit[plane][i], group.sum[plane][i]);
        }
      });
}

// The same for usual levels only: false where there are others, and y is as it was.
template <class L, int kM, int kWords, class Panel>
ONEBIT_INLINE bool add_usual_tile(Group<kM>& group,
                                  int plane,
                                  const float* table,
                                  const Panel& w,
                                  int64_t t,
                                  float* y,
                                  int64_t ld) {
  // Levels are read once if the results fit registers until all levels are known; else twice. So
  // they are where the last were not usual, for sums that are of no use cost more.
  constexpr bool kOnce = kM == 1 && 4 * L::kVectors <= L::kRegisters;
  auto usual = L::set(-1);
  typename L::Vec result[L::kVectors];
  if (!kOnce || __builtin_expect(!group.usual, 0)) {
    ONEBIT_UNROLL
    for (int r = 0; r < L::kVectors; ++r) {
      usual = Levels<L>(w.scale(t, r), w.bias(t, r)).keep_usual(usual);
    }
    group.usual = L::all_negative(usual);
    if (__builtin_expect(!group.usual, 0)) return false;
  }
  L::template tile<kM, kWords, Panel::kSpareStored>(
      w.index(t), table, group.sum[plane],
      [&](int r, const auto& sums) __attribute__((always_inline)) {
        const Levels<L> levels(w.scale(t, r), w.bias(t, r));
        if (kOnce) usual = levels.keep_usual(usual);
        float* out = y + r * L::kLanes;
        ONEBIT_UNROLL
        for (int i = 0; i < kM; ++i, out += ld) {
          result[r] = levels.add_usual(L::load(out), floats_of<L>(sums[i]), group.unit[plane][i],
                                       group.all[plane][i]);
          if (!kOnce) L::store(out, result[r]);
        }
      });
  if (!kOnce) return true;
  group.usual = L::all_negative(usual);
  if (__builtin_expect(!group.usual, 0)) return false;
  ONEBIT_UNROLL
  for (int r = 0; r < L::kVectors; ++r) L::store(y + r * L::kLanes, result[r]);
  return true;
}

// y[kM, tiles * kRows] += one group of rows of x from row m on.
template <class L, int kM, int kWords, class Panel>
ONEBIT_INLINE void add_group(const Activations& x,
                             int64_t m,
                             int64_t column,
                             Group<kM>& group,
                             const float* table,
                             const float* second,
                             const Panel& w,
                             const Sums& y,
                             int64_t tiles) {
  for (int i = 0; __builtin_expect(group.in_double >> i, 0); ++i) {
    if ((group.in_double >> i & 1u) && !y.has_doubles[i]) {
      std::memset(y.doubles + i * y.ld, 0, tiles * L::kRows * sizeof(double));
      y.has_doubles[i] = true;
    }
  }
  Lost<kM, 32 * kWords> lost;
  for (int plane = 0; plane < group.planes; ++plane) {
    const float* from = plane ? second : table;
    for (int64_t t = 0; t < tiles; ++t) {
      w.prefetch(t);
      const Sums out = y.from(0, t * L::kRows);
      if (__builtin_expect(group.in_double == (1u << kM) - 1, 0)) {
        add_double_tile<L, kM, kWords>(group, plane, from, w, t, out);
      } else if (__builtin_expect(group.in_double != 0, 0) ||
                 !add_usual_tile<L, kM, kWords>(group, plane, from, w, t, out.floats, out.ld)) {
        add_any_tile<L, kM, kWords>(group, plane, from, w, t, out);
      } else {
        continue;
      }
      if (plane == 0) add_lost<L, kM, kWords>(x, m, column, group, lost, w, t, out);
    }
  }
  for (int i = 0; __builtin_expect(group.plain >> i, 0); ++i) {
    if (group.plain >> i & 1u) {
      add_plain<L, kWords>(x, m + i, column, w, y.floats + i * y.ld, tiles);
    }
  }
}

}  // namespace
}  // namespace onebit::cpu

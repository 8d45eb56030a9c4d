// The loops around the lookups, the same for every instruction set.
//
//   y[m, n] = sum over groups g:  scale[n, g] * (sum of x[m, j], j in g, bit set)
//                               + bias[n, g]  * (sum of x[m, j], j in g)
//
// A `Lookup` L works on tiles of L::kRows outputs x up to L::kMaxM rows of x, one group at a time:
// `pack_rows` turns weight words into index vectors (lane = output row), `build` turns the group's
// activations, in fixed point, into a table, `tile` returns the first sum, and `Levels` makes the
// product of it. An output is always the fma chain over ascending groups, whatever tile or block it
// falls in, and does not depend on the other rows of x.
#pragma once

#include "fixed_point-inl.h"
#include "kernels.h"
#include "scratch.h"
#include "target.h"

namespace onebit::cpu {
namespace {

ONEBIT_INLINE int64_t at_most(int64_t a, int64_t b) { return a < b ? a : b; }
ONEBIT_INLINE int64_t tiles_for(int64_t count, int64_t tile) { return (count + tile - 1) / tile; }

template <int kValue>
struct Int {
  static constexpr int value = kValue;
};

// f(Int<rows>, first row) over tiles of L::kMaxM rows and the smaller one that is left.
template <class L, class F>
ONEBIT_INLINE void for_row_tiles(int64_t count, const F& f) {
  int64_t m = 0;
  for (; m + L::kMaxM <= count; m += L::kMaxM) f(Int<L::kMaxM>{}, m);
  if (count - m == 3) f(Int<3>{}, m);
  if (count - m == 2) f(Int<2>{}, m);
  if (count - m == 1) f(Int<1>{}, m);
}

// Consecutive 64-byte aligned arrays in one buffer.
class Arena {
 public:
  explicit Arena(int64_t bytes) : next_(static_cast<char*>(thread_scratch(bytes + kSlack))) {}

  template <class T>
  T* take(int64_t count) {
    T* p = reinterpret_cast<T*>(next_);
    next_ += (count * sizeof(T) + 63) / 64 * 64;
    return p;
  }

 private:
  static constexpr int64_t kSlack = 64 * 16;  // rounding of up to 16 arrays
  char* next_;
};

ONEBIT_INLINE int64_t row_of(const int64_t* rows, int64_t m) { return rows ? rows[m] : m; }

// `count` values as floats: where they are, or converted into `buffer`.
template <class L>
ONEBIT_INLINE const float* as_floats(
    const void* x, DType dtype, int64_t offset, int64_t count, float* buffer) {
  if (dtype == DType::kFloat) return static_cast<const float*>(x) + offset;
  for (int64_t i = 0; i < count; i += L::kLanes) {
    L::store(buffer + i, L::load_as(x, dtype, offset + i, count - i));
  }
  return buffer;
}

// Scales and biases of rows [row, row + rows), groups [group, group + groups), as floats
// [group][row] with `ld` rows between groups; rows up to the next multiple of the lanes are filled
// with copies.
template <class L, DType kType>
void pack_levels_as(const Weights& w,
                    int64_t row,
                    int64_t rows,
                    int64_t group,
                    int groups,
                    float* scales,
                    float* biases,
                    int64_t ld) {
  const int64_t size = element_size(kType);
  const int64_t stride = w.columns / w.group_size * size;
  const int64_t offset = row * stride + group * size;
  for (int64_t r = 0; r < rows; r += L::kLanes) {
    const int64_t at = offset + r * stride;
    const int last = int(at_most(rows - r, L::kLanes)) - 1;
    L::template transpose_levels<kType>(static_cast<const char*>(w.scales) + at, stride, last,
                                        groups, scales + r, ld);
    if (w.biases) {
      L::template transpose_levels<kType>(static_cast<const char*>(w.biases) + at, stride, last,
                                          groups, biases + r, ld);
    } else {
      for (int g = 0; g < groups; ++g) {
        L::store(biases + g * ld + r, L::mul(L::set(-0.5f), L::load(scales + g * ld + r)));
      }
    }
  }
}

template <class L>
ONEBIT_INLINE void pack_levels(const Weights& w,
                               int64_t row,
                               int64_t rows,
                               int64_t group,
                               int groups,
                               float* scales,
                               float* biases,
                               int64_t ld) {
  const auto pack = w.dtype == DType::kHalf       ? pack_levels_as<L, DType::kHalf>
                    : w.dtype == DType::kBFloat16 ? pack_levels_as<L, DType::kBFloat16>
                                                  : pack_levels_as<L, DType::kFloat>;
  pack(w, row, rows, group, groups, scales, biases, ld);
}

// A row-major matrix of activations; row i of the product is its row rows[i], or row i.
struct Activations {
  const void* data;
  DType dtype;
  int64_t columns;
  const int64_t* rows;

  ONEBIT_INLINE int64_t offset(int64_t m, int64_t column) const {
    return row_of(rows, m) * columns + column;
  }
};

ONEBIT_INLINE Activations activations(const QmmArgs& a) { return {a.x, a.dtype, a.k, a.x_rows}; }

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
  group.plain = 0;
  group.in_double = 0;
  for (int i = 0; i < kM; ++i) {
    const float* v = as_floats<L>(x.data, x.dtype, x.offset(m + i, column), kCount, buffer);
    to_planes<L>(v, x.dtype, planes);
    if (sizeof(planes.q[0][0]) == 4 && x.dtype == DType::kFloat && planes.one_sided) {
      group.in_double |= 1u << i;
    }
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

// y[kM, tile t] += what fixed point has lost of a group's small values, where one level is 64 times
// the other or more: it may be all that counts where the others meet a level of 0.
template <class L, int kM, int kWords, class Panel>
__attribute__((noinline)) void add_lost(const Activations& x,
                                        int64_t m,
                                        int64_t column,
                                        const Group<kM>& group,
                                        const Panel& w,
                                        int64_t t,
                                        const Sums& y) {
  constexpr int kCount = 32 * kWords;
  uint32_t unusual = 0;
  for (int r = 0; r < L::kVectors; ++r) {
    const auto low = L::abs(w.bias(t, r)), high = L::abs(L::add(w.scale(t, r), w.bias(t, r)));
    const auto far = L::set(64);
    if (L::greater_bits(low, L::mul(high, far)) | L::greater_bits(high, L::mul(low, far))) {
      unusual |= 1u << r;
    }
  }
  if (unusual == 0) return;
  const auto tolerance = L::set(2 * tolerance_of(x.dtype));
  alignas(64) float buffer[kCount], rest[kCount];
  for (int i = 0; i < kM; ++i) {
    const float *v = as_floats<L>(x.data, x.dtype, x.offset(m + i, column), kCount, buffer),
                step = group.step(0, i), second = group.planes > 1 ? group.step(1, i) : 0;
    if (step == 0) continue;  // zeros, or in no table
    int count = 0, columns[kCount];
    for (int j = 0; j < kCount; j += L::kLanes) {
      const auto value = L::load(v + j);
      auto lost = rest_of<L>(value, step);
      if (second != 0) lost = rest_of<L>(lost, second);
      L::store(rest + j, lost);
      uint32_t bits = L::greater_bits(L::abs(lost), L::mul(L::abs(value), tolerance));
      for (; bits != 0; bits &= bits - 1) columns[count++] = j + __builtin_ctz(bits);
    }
    for (int r = 0; count > 0 && r < L::kVectors; ++r) {
      if (!(unusual >> r & 1u)) continue;
      const auto scale = w.scale(t, r), bias = w.bias(t, r);
      const auto low = L::fma(scale, L::zero(), bias), high = L::add(scale, bias);
      auto sum = L::zero();
      for (int c = 0; c < count; ++c) {
        const int j = columns[c];
        const auto bit = L::bit_of(w.index(t) + L::dword(j, r), L::bit(j, r));
        sum = L::fma(L::set(rest[j]), L::choose(bit, high, low), sum);
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
      [&](int r, const typename L::Ints(&sums)[kM]) __attribute__((always_inline)) {
        const Levels<L> levels(w.scale(t, r), w.bias(t, r));
        const bool usual = levels.are_usual();
        for (int i = 0; i < kM; ++i) {
          const float unit = group.unit[plane][i];
          const int64_t at = i * y.ld + r * L::kLanes;
          if (group.in_double >> i & 1u) {
            DoubleLevels<L>(w.scale(t, r), w.bias(t, r))
                .add(y.doubles + at, sums[i], unit, group.sum[plane][i]);
            continue;
          }
          const auto to = L::load(y.floats + at);
          L::store(y.floats + at, usual ? levels.add_usual(to, sums[i], unit, group.all[plane][i])
                                        : levels.add_any(to, sums[i], unit, group.sum[plane][i]));
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
      [&](int r, const typename L::Ints(&sums)[kM]) __attribute__((always_inline)) {
        const DoubleLevels<L> levels(w.scale(t, r), w.bias(t, r));
        double* out = y.doubles + r * L::kLanes;
        ONEBIT_UNROLL
        for (int i = 0; i < kM; ++i, out += y.ld) {
          levels.add(out, sums[i], group.unit[plane][i], group.sum[plane][i]);
        }
      });
}

// The same for usual levels only: false where there are others, and y is as it was.
template <class L, int kM, int kWords, class Panel>
ONEBIT_INLINE bool add_usual_tile(const Group<kM>& group,
                                  int plane,
                                  const float* table,
                                  const Panel& w,
                                  int64_t t,
                                  float* y,
                                  int64_t ld) {
  // Levels are read once if the results fit registers until all levels are known; else twice.
  constexpr bool kOnce = kM == 1 && 4 * L::kVectors <= L::kRegisters;
  auto usual = L::set(-1);
  typename L::Vec result[L::kVectors];
  if (!kOnce) {
    ONEBIT_UNROLL
    for (int r = 0; r < L::kVectors; ++r) {
      usual = Levels<L>(w.scale(t, r), w.bias(t, r)).keep_usual(usual);
    }
    if (__builtin_expect(!L::all_negative(usual), 0)) return false;
  }
  L::template tile<kM, kWords, Panel::kSpareStored>(
      w.index(t), table, group.sum[plane],
      [&](int r, const typename L::Ints(&sums)[kM]) __attribute__((always_inline)) {
        const Levels<L> levels(w.scale(t, r), w.bias(t, r));
        if (kOnce) usual = levels.keep_usual(usual);
        float* out = y + r * L::kLanes;
        ONEBIT_UNROLL
        for (int i = 0; i < kM; ++i, out += ld) {
          result[r] =
              levels.add_usual(L::load(out), sums[i], group.unit[plane][i], group.all[plane][i]);
          if (!kOnce) L::store(out, result[r]);
        }
      });
  if (!kOnce) return true;
  if (__builtin_expect(!L::all_negative(usual), 0)) return false;
  ONEBIT_UNROLL
  for (int r = 0; r < L::kVectors; ++r) L::store(y + r * L::kLanes, result[r]);
  return true;
}

// y[kM, tiles * kRows] += one group of rows of x from row m on.
template <class L, int kM, int kWords, class Panel>
ONEBIT_INLINE void add_group(const Activations& x,
                             int64_t m,
                             int64_t column,
                             const Group<kM>& group,
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
      if (plane == 0) add_lost<L, kM, kWords>(x, m, column, group, w, t, out);
    }
  }
  for (int i = 0; __builtin_expect(group.plain >> i, 0); ++i) {
    if (group.plain >> i & 1u) {
      add_plain<L, kWords>(x, m + i, column, w, y.floats + i * y.ld, tiles);
    }
  }
}

template <class L>
void store_rows(
    const QmmArgs& a, int64_t m, int64_t m_count, int64_t n, int64_t n_count, const Sums& y) {
  for (int64_t i = 0; i < m_count; ++i) {
    const int64_t offset = row_of(a.y_rows, m + i) * a.n + n;
    float* sums = y.floats + i * y.ld;
    if (__builtin_expect(y.has_doubles[i], 0)) {
      for (int64_t j = 0; j < n_count; ++j) sums[j] = float(sums[j] + y.doubles[i * y.ld + j]);
    }
    for (int64_t j = 0; j < n_count; j += L::kLanes) {
      L::store_as(a.y, a.dtype, offset + j, n_count - j, L::load(sums + j));
    }
  }
}

// Memory of the next tile, fetched in address order a little at a time. Without it, weights that
// come from memory arrive at 35 instead of 62 GMAC/s per thread.
class Prefetch {
 public:
  Prefetch(const void* begin, int64_t bytes)
      : next_(static_cast<const char*>(begin)), end_(next_ + (begin ? bytes : 0)) {}

  template <class L>
  ONEBIT_INLINE void advance(int64_t bytes) {
    const char* stop = end_ - next_ < bytes ? end_ : next_ + bytes;
    for (; next_ < stop; next_ += 64) L::prefetch(next_);
  }

 private:
  const char *next_, *end_;
};

// One row of x: the tables of all of k are built first (26 bytes per value), then the weights
// stream by once, a tile of rows at a time, while the next tile's memory is prefetched.
template <class L, int kWords>
void qmm_t_stream(const QmmArgs& a, const Block& block) {
  constexpr int kGroup = kWords * kWordBits, kChunk = 1024, kGroups = kChunk / kGroup;
  constexpr int kStep =
      512 / kGroup;  // groups whose words are packed at a time: a line of each row
  constexpr int kIndex = L::index_size(kWords), kTable = L::table_size(kWords);
  const int64_t groups = a.k / kGroup, words = a.k / kWordBits;
  Arena arena(groups * (2 * kTable * 4 + int64_t(sizeof(Group<1>))) + kStep * kIndex * 4 +
              kGroups * 2 * L::kRows * 4 + sums_size(1, L::kRows));
  auto* tables = arena.take<float>(groups * kTable);
  auto* seconds = arena.take<float>(groups * kTable);
  auto* group = arena.take<Group<1>>(groups);
  auto* index = arena.take<uint32_t>(kStep * kIndex);
  auto* scales = arena.take<float>(kGroups * L::kRows);
  auto* biases = arena.take<float>(kGroups * L::kRows);
  const Sums sums = take_sums(arena, 1, L::kRows);
  for (int64_t g = 0; g < groups; ++g) {
    build_tables<L, 1, kWords>(activations(a), block.m_begin, g * kGroup, tables + g * kTable,
                               seconds + g * kTable, group[g]);
  }
  const int64_t row_bytes = words * 4, level_bytes = groups * element_size(a.w.dtype);
  const auto row = [](const void* p, int64_t offset) -> const void* {
    return p ? static_cast<const char*>(p) + offset : nullptr;
  };
  for (int64_t n = block.n_begin; n < block.n_end; n += L::kRows) {
    const int64_t rows = at_most(L::kRows, block.n_end - n);
    const int64_t after = n + rows, next_rows = at_most(L::kRows, block.n_end - after);
    Prefetch next_words(row(a.w.packed, after * row_bytes), next_rows * row_bytes);
    Prefetch next_scales(row(a.w.scales, after * level_bytes), next_rows * level_bytes);
    Prefetch next_biases(row(a.w.biases, after * level_bytes), next_rows * level_bytes);
    clear_sums<L>(sums, 1, L::kRows);
    for (int64_t g = 0; g < groups; ++g) {
      if (g % kGroups == 0) {
        pack_levels<L>(a.w, n, rows, g, int(at_most(kGroups, groups - g)), scales, biases,
                       L::kRows);
      }
      if (g % kStep == 0) {
        L::template pack_rows<kWords>(a.w.packed + n * words + g * kWords, words, int(rows),
                                      int(at_most(kStep, groups - g)) * kWords, index, kIndex);
      }
      next_words.advance<L>(kWords * 4 * L::kRows);
      next_scales.advance<L>(element_size(a.w.dtype) * L::kRows);
      next_biases.advance<L>(element_size(a.w.dtype) * L::kRows);
      const int64_t level = g % kGroups * L::kRows;
      add_group<L, 1, kWords>(
          activations(a), block.m_begin, g * kGroup, group[g], tables + g * kTable,
          seconds + g * kTable,
          PackedGroup<L, kWords>{index + g % kStep * kIndex, scales + level, biases + level}, sums,
          1);
      end_chains(a, g + 1, groups, sums, 1, L::kRows);
    }
    store_rows<L>(a, block.m_begin, 1, n, rows, sums);
  }
}

// kM rows of x against a packed chunk of a panel: tables are built just in time, in L1.
template <class L, int kM, int kWords>
void add_chunk(const QmmArgs& a,
               int64_t m,
               int64_t k,
               int groups,
               const uint32_t* index,
               const float* scales,
               const float* biases,
               float* table,
               const Sums& y,
               int64_t tiles) {
  for (int g = 0; g < groups; ++g) {
    const int64_t column = k + g * kWords * kWordBits;
    float* second = table + L::kMaxM * L::table_size(kWords);
    Group<kM> group;
    build_tables<L, kM, kWords>(activations(a), m, column, table, second, group);
    add_group<L, kM, kWords>(activations(a), m, column, group, table, second,
                             PackedGroup<L, kWords>{index + g * tiles * L::index_size(kWords),
                                                    scales + g * y.ld, biases + g * y.ld},
                             y, tiles);
  }
}

constexpr int64_t kPanelRows = 1024;  // outputs that share a table
constexpr int64_t kChunkColumns = 1024;
constexpr int64_t kBlockM = 64;  // rows of x that share packed weights

// Many rows of x: panels of kPanelRows outputs x chunks of kChunkColumns are packed into L2, and
// every row of x of the block meets them.
template <class L, int kWords>
void qmm_t_panels(const QmmArgs& a, const Block& block) {
  constexpr int kGroup = kWords * kWordBits, kGroups = kChunkColumns / kGroup;
  constexpr int kIndex = L::index_size(kWords);
  const int64_t words = a.k / kWordBits;
  const int64_t panel =
      at_most(kPanelRows, tiles_for(block.n_end - block.n_begin, L::kRows) * L::kRows);
  const int64_t m_block = at_most(kBlockM, block.m_end - block.m_begin);
  Arena arena(panel / L::kRows * kGroups * kIndex * 4 + 2 * kGroups * panel * 4 +
              2 * L::kMaxM * L::table_size(kWords) * 4 + sums_size(m_block, panel));
  auto* index = arena.take<uint32_t>(panel / L::kRows * kGroups * kIndex);
  auto* scales = arena.take<float>(kGroups * panel);
  auto* biases = arena.take<float>(kGroups * panel);
  auto* table = arena.take<float>(2 * L::kMaxM * L::table_size(kWords));
  Sums sums = take_sums(arena, m_block, panel);
  for (int64_t m = block.m_begin; m < block.m_end; m += kBlockM) {
    const int64_t m_count = at_most(kBlockM, block.m_end - m);
    for (int64_t n = block.n_begin; n < block.n_end; n += kPanelRows) {
      const int64_t n_count = at_most(kPanelRows, block.n_end - n);
      const int64_t tiles = tiles_for(n_count, L::kRows), ld = tiles * L::kRows;
      sums.ld = ld;
      clear_sums<L>(sums, m_count, ld);
      for (int64_t k = 0; k < a.k; k += kChunkColumns) {
        const int64_t columns = at_most(kChunkColumns, a.k - k);
        const int groups = int(columns / kGroup);
        for (int64_t t = 0; t < tiles; ++t) {
          const int64_t row = n + t * L::kRows, rows = at_most(L::kRows, n + n_count - row);
          // The next tile's words, a line or two per row: rows are too far apart for the hardware
          // to foresee.
          const int64_t next_end = at_most(row + 2 * L::kRows, n + n_count);
          for (int64_t r = row + L::kRows; r < next_end; ++r) {
            const auto* next = a.w.packed + r * words + k / kWordBits;
            for (int64_t c = 0; c < columns; c += 512) L::prefetch(next + c / kWordBits);
          }
          L::template pack_rows<kWords>(a.w.packed + row * words + k / kWordBits, words, int(rows),
                                        int(columns / kWordBits), index + t * kIndex,
                                        tiles * kIndex);
          pack_levels<L>(a.w, row, rows, k / kGroup, groups, scales + t * L::kRows,
                         biases + t * L::kRows, ld);
        }
        const auto add = [&](auto rows, int64_t i) {
          add_chunk<L, decltype(rows)::value, kWords>(a, m + i, k, groups, index, scales, biases,
                                                      table, sums.from(i), tiles);
        };
        for_row_tiles<L>(m_count, add);
        end_chains(a, k / kGroup + groups, a.k / kGroup, sums, m_count, ld);
      }
      store_rows<L>(a, m, m_count, n, n_count, sums);
    }
  }
}

}  // namespace
}  // namespace onebit::cpu

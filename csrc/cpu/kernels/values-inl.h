// Activations and levels as floats, the memory they are put into, and how rows are cut into tiles.
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

template <int kM, class F>
ONEBIT_INLINE void for_rows_by(int64_t m, int64_t count, const F& f) {
  for (; m + kM <= count; m += kM) f(Int<kM>{}, m);
  if constexpr (kM > 1) for_rows_by<(kM > 4 ? kM / 2 : kM - 1)>(m, count, f);
}

// f(Int<rows>, first row) over tiles of L::kMaxM rows and the smaller ones that are left.
template <class L, class F>
ONEBIT_INLINE void for_row_tiles(int64_t count, const F& f) {
  for_rows_by<L::kMaxM>(0, count, f);
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

// The same for a tile of L::kRows rows, of which some may be missing: theirs are usual levels, for
// a tile with others takes longer.
template <class L>
ONEBIT_INLINE void pack_tile_levels(const Weights& w,
                                    int64_t row,
                                    int64_t rows,
                                    int64_t group,
                                    int groups,
                                    float* scales,
                                    float* biases,
                                    int64_t ld) {
  pack_levels<L>(w, row, rows, group, groups, scales, biases, ld);
  for (int64_t r = tiles_for(rows, L::kLanes) * L::kLanes; r < L::kRows; r += L::kLanes) {
    for (int g = 0; g < groups; ++g) {
      L::store(scales + g * ld + r, L::set(2));
      L::store(biases + g * ld + r, L::set(-1));
    }
  }
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

}  // namespace
}  // namespace onebit::cpu

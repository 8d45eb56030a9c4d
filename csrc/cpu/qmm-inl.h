// The loops around the lookups, the same for every instruction set.
//
//   y[m, n] = sum over groups g:  scale[n, g] * (sum of x[m, j], j in g, bit set)
//                               + bias[n, g]  * (sum of x[m, j], j in g)
//
// A `Lookup` L works on tiles of L::kRows outputs x up to L::kMaxM rows of x, one group at a time:
// `pack_rows` turns weight words into index vectors (lane = output row), `build` turns the group's
// activations into a table, `tile` returns the first sum. An output is always the fma chain over
// ascending groups, whatever tile or block it falls in.
#pragma once

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

ONEBIT_INLINE int64_t element_size(DType dtype) {
  return dtype == DType::kDouble ? 8 : dtype == DType::kFloat ? 4 : 2;
}

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

template <class L, int kCount>
ONEBIT_INLINE float sum_of(const float* x) {
  auto sum = L::load(x);
  ONEBIT_UNROLL
  for (int i = L::kLanes; i < kCount; i += L::kLanes) sum = L::add(sum, L::load(x + i));
  return L::sum(sum);
}

// Scales and biases of rows [row, row + rows), groups [group, group + groups), as floats [group][row]
// with `ld` rows between groups; rows up to the next multiple of the lanes are filled with copies.
template <class L>
void pack_levels(const Weights& w,
                 int64_t row,
                 int64_t rows,
                 int64_t group,
                 int groups,
                 float* scales,
                 float* biases,
                 int64_t ld) {
  const int64_t size = element_size(w.dtype);
  const int64_t stride = w.columns / w.group_size * size;
  const int64_t offset = row * stride + group * size;
  for (int64_t r = 0; r < rows; r += L::kLanes) {
    const int64_t at = offset + r * stride;
    const int last = int(at_most(rows - r, L::kLanes)) - 1;
    L::transpose_levels(static_cast<const char*>(w.scales) + at, w.dtype, stride, last, groups,
                        scales + r, ld);
    if (w.biases) {
      L::transpose_levels(static_cast<const char*>(w.biases) + at, w.dtype, stride, last, groups,
                          biases + r, ld);
    } else {
      for (int g = 0; g < groups; ++g) {
        L::store(biases + g * ld + r, L::mul(L::set(-0.5f), L::load(scales + g * ld + r)));
      }
    }
  }
}

// Tables and sums of one group for kM rows of x from row m on.
template <class L, int kM, int kWords>
ONEBIT_INLINE void build_tables(
    const QmmArgs& a, int64_t m, int64_t column, float* table, float (&sums)[kM]) {
  alignas(64) float buffer[32 * kWords];
  ONEBIT_UNROLL
  for (int i = 0; i < kM; ++i) {
    const float* x = as_floats<L>(a.x, a.dtype, row_of(a.x_rows, m + i) * a.k + column,
                                  32 * kWords, buffer);
    L::template build<kM, kWords>(x, i, table);
    sums[i] = sum_of<L, 32 * kWords>(x);
  }
}

// y[kM, tiles * kRows] += one group's contribution.
template <class L, int kM, int kWords>
ONEBIT_INLINE void add_group(const uint32_t* index,
                             const float* table,
                             const float* scales,
                             const float* biases,
                             const float (&sums)[kM],
                             float* y,
                             int64_t tiles,
                             int64_t ld) {
  for (int64_t t = 0; t < tiles; ++t) {
    typename L::Vec acc[kM][L::kVectors];
    L::template tile<kM, kWords>(index, table, acc);
    ONEBIT_UNROLL
    for (int r = 0; r < L::kVectors; ++r) {
      const auto scale = L::load(scales + r * L::kLanes), bias = L::load(biases + r * L::kLanes);
      ONEBIT_UNROLL
      for (int m = 0; m < kM; ++m) {
        float* out = y + m * ld + r * L::kLanes;
        L::store(out, L::fma(bias, L::set(sums[m]), L::fma(scale, acc[m][r], L::load(out))));
      }
    }
    index += L::index_size(kWords);
    scales += L::kRows;
    biases += L::kRows;
    y += L::kRows;
  }
}

template <class L>
void store_rows(const QmmArgs& a,
                int64_t m,
                int64_t m_count,
                int64_t n,
                int64_t n_count,
                const float* acc,
                int64_t ld) {
  for (int64_t i = 0; i < m_count; ++i) {
    const int64_t offset = row_of(a.y_rows, m + i) * a.n + n;
    for (int64_t j = 0; j < n_count; j += L::kLanes) {
      L::store_as(a.y, a.dtype, offset + j, n_count - j, L::load(acc + i * ld + j));
    }
  }
}

// Few rows of x: the tables of all of k are built first (26 bytes per value), then the weights
// stream by once, a tile of rows at a time, while the next tile's memory is prefetched in order.
// Without the prefetch, weights from memory arrive at 35 instead of 62 GMAC/s per thread.
template <class L, int kM, int kWords>
void qmm_t_stream(const QmmArgs& a, const Block& block) {
  constexpr int kGroup = kWords * kWordBits, kChunk = 512, kGroups = kChunk / kGroup;
  constexpr int kIndex = L::index_size(kWords), kTable = kM * L::table_size(kWords);
  const int64_t groups = a.k / kGroup, words = a.k / kWordBits;
  Arena arena(groups * (kTable + kM) * 4 + kGroups * (kIndex + 2 * L::kRows) * 4 +
              kM * L::kRows * 4);
  auto* tables = arena.take<float>(groups * kTable);
  auto* sums = arena.take<float>(groups * kM);
  auto* index = arena.take<uint32_t>(kGroups * kIndex);
  auto* scales = arena.take<float>(kGroups * L::kRows);
  auto* biases = arena.take<float>(kGroups * L::kRows);
  auto* acc = arena.take<float>(kM * L::kRows);
  for (int64_t g = 0; g < groups; ++g) {
    build_tables<L, kM, kWords>(a, block.m_begin, g * kGroup, tables + g * kTable,
                                *reinterpret_cast<float(*)[kM]>(sums + g * kM));
  }
  const int64_t level_bytes = groups * element_size(a.w.dtype);
  for (int64_t n = block.n_begin; n < block.n_end; n += L::kRows) {
    const int64_t rows = at_most(L::kRows, block.n_end - n);
    const auto* w = a.w.packed + n * words;
    // One line is a chunk of a row; as many per chunk as the tile has rows, in address order.
    const int64_t next_rows = at_most(L::kRows, a.n - n - rows);
    const char* next = reinterpret_cast<const char*>(w + rows * words);
    const char* next_end = next + next_rows * words * 4;
    const int64_t next_level = (n + rows) * level_bytes, level_lines = next_rows * level_bytes;
    for (int i = 0; i < kM * L::kRows; i += L::kLanes) L::store(acc + i, L::zero());
    for (int64_t k = 0; k < a.k; k += kChunk) {
      const int64_t columns = at_most(kChunk, a.k - k), g0 = k / kGroup;
      const int count = int(columns / kGroup);
      L::template pack_rows<kWords>(w + k / kWordBits, words, int(rows), int(columns / kWordBits),
                                    index, kIndex);
      pack_levels<L>(a.w, n, rows, g0, count, scales, biases, L::kRows);
      const int64_t level_begin = level_lines * k / a.k, level_end = level_lines * (k + columns) / a.k;
      for (int64_t i = level_begin / 64; i < level_end / 64; ++i) {
        L::prefetch(static_cast<const char*>(a.w.scales) + next_level + i * 64);
        if (a.w.biases) L::prefetch(static_cast<const char*>(a.w.biases) + next_level + i * 64);
      }
      for (int g = 0; g < count; ++g) {
        const char* stop = next + L::kRows * kGroup / 8;
        for (; next < stop && next < next_end; next += 64) L::prefetch(next);
        add_group<L, kM, kWords>(index + g * kIndex, tables + (g0 + g) * kTable,
                                 scales + g * L::kRows, biases + g * L::kRows,
                                 *reinterpret_cast<const float(*)[kM]>(sums + (g0 + g) * kM), acc,
                                 1, L::kRows);
      }
    }
    store_rows<L>(a, block.m_begin, kM, n, rows, acc, L::kRows);
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
               float* acc,
               int64_t tiles) {
  const int64_t ld = tiles * L::kRows;
  for (int g = 0; g < groups; ++g) {
    float sums[kM];
    build_tables<L, kM, kWords>(a, m, k + g * kWords * kWordBits, table, sums);
    add_group<L, kM, kWords>(index + g * tiles * L::index_size(kWords), table, scales + g * ld,
                             biases + g * ld, sums, acc, tiles, ld);
  }
}

constexpr int64_t kPanelRows = 1024;   // outputs that share a table
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
              L::kMaxM * L::table_size(kWords) * 4 + m_block * panel * 4);
  auto* index = arena.take<uint32_t>(panel / L::kRows * kGroups * kIndex);
  auto* scales = arena.take<float>(kGroups * panel);
  auto* biases = arena.take<float>(kGroups * panel);
  auto* table = arena.take<float>(L::kMaxM * L::table_size(kWords));
  auto* acc = arena.take<float>(m_block * panel);
  for (int64_t m = block.m_begin; m < block.m_end; m += kBlockM) {
    const int64_t m_count = at_most(kBlockM, block.m_end - m);
    for (int64_t n = block.n_begin; n < block.n_end; n += kPanelRows) {
      const int64_t n_count = at_most(kPanelRows, block.n_end - n);
      const int64_t tiles = tiles_for(n_count, L::kRows), ld = tiles * L::kRows;
      for (int64_t i = 0; i < m_count * ld; i += L::kLanes) L::store(acc + i, L::zero());
      for (int64_t k = 0; k < a.k; k += kChunkColumns) {
        const int64_t columns = at_most(kChunkColumns, a.k - k);
        const int groups = int(columns / kGroup);
        for (int64_t t = 0; t < tiles; ++t) {
          const int64_t row = n + t * L::kRows, rows = at_most(L::kRows, n + n_count - row);
          L::template pack_rows<kWords>(a.w.packed + row * words + k / kWordBits, words, int(rows),
                                        int(columns / kWordBits), index + t * kIndex,
                                        tiles * kIndex);
          pack_levels<L>(a.w, row, rows, k / kGroup, groups, scales + t * L::kRows,
                         biases + t * L::kRows, ld);
        }
        const auto add = [&](auto rows, int64_t i) {
          add_chunk<L, decltype(rows)::value, kWords>(a, m + i, k, groups, index, scales, biases,
                                                      table, acc + i * ld, tiles);
        };
        int64_t i = 0;
        for (; i + L::kMaxM <= m_count; i += L::kMaxM) add(Int<L::kMaxM>{}, i);
        if (m_count - i == 3) add(Int<3>{}, i);
        if (m_count - i == 2) add(Int<2>{}, i);
        if (m_count - i == 1) add(Int<1>{}, i);
      }
      store_rows<L>(a, m, m_count, n, n_count, acc, ld);
    }
  }
}

}  // namespace
}  // namespace onebit::cpu

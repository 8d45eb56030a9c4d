// The loops over groups, the same for every instruction set. An output is added up over ascending
// groups, whatever tile or block it falls in, and does not depend on the other rows of x.
#pragma once

#include "group-inl.h"

namespace onebit::cpu {
namespace {

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

// Words [word, word + words) of rows [begin, end), a line or two per row: rows are too far apart
// for the hardware to foresee.
template <class L>
ONEBIT_INLINE void prefetch_rows(
    const Weights& w, int64_t begin, int64_t end, int64_t word, int64_t words) {
  for (int64_t row = begin; row < end; ++row) {
    const auto* next = w.packed + row * (w.columns / kWordBits) + word;
    for (int64_t i = 0; i < words; i += 16) L::prefetch(next + i);
  }
}

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
        pack_tile_levels<L>(a.w, n, rows, g, int(at_most(kGroups, groups - g)), scales, biases,
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
          prefetch_rows<L>(a.w, row + L::kRows, at_most(row + 2 * L::kRows, n + n_count),
                           k / kWordBits, columns / kWordBits);
          L::template pack_rows<kWords>(a.w.packed + row * words + k / kWordBits, words, int(rows),
                                        int(columns / kWordBits), index + t * kIndex,
                                        tiles * kIndex);
          pack_tile_levels<L>(a.w, row, rows, k / kGroup, groups, scales + t * L::kRows,
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

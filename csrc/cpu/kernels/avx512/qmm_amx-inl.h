// The loops over groups for tile registers. Tables are small here, and weights are not once their
// bits are numbers: those of a tile of outputs are spread into L1, 128 columns at a time, and meet
// the tables of all rows of a block, which wait in L2.
#pragma once

#include "prepacked-inl.h"
#include "tiles_amx-inl.h"

namespace onebit::cpu {
namespace {

// Rows of x that share what is spread. 64 give 0.92 of the speed.
constexpr int64_t kTileBlockM = 128;

// Tables of a chunk of columns of up to kTileBlockM rows of x.
template <class L, int kWords>
class ChunkTables {
 public:
  static constexpr int kGroups = kChunkColumns / (kWords * kWordBits);

  static constexpr int64_t bytes() {
    return 2 * kFloats * 4 + kTiles * kGroups * int64_t(sizeof(Group<L::kMaxM>));
  }

  explicit ChunkTables(Arena& arena)
      : tables_(arena.take<float>(kFloats)),
        seconds_(arena.take<float>(kFloats)),
        groups_(arena.take<Group<L::kMaxM>>(kTiles * kGroups)) {}

  // Groups [first, first + groups) of `rows` rows from row m on.
  void build(const Activations& x, int64_t m, int64_t rows, int64_t first, int groups) {
    for (int g = 0; g < groups; ++g) {
      for_tiles(rows, g, [&](auto tile, int64_t i, auto& group, float* table, float* second) {
        build_tables<L, decltype(tile)::value, kWords>(x, m + i, (first + g) * kWords * kWordBits,
                                                       table, second, group);
      });
    }
  }

  // f(Int<rows of a tile>, its first row, what its table of group g stands for, table, second)
  template <class F>
  ONEBIT_INLINE void for_tiles(int64_t rows, int g, const F& f) {
    auto* next = groups_ + g * kTiles;
    for_row_tiles<L>(rows, [&](auto tile, int64_t i) {
      using Tile = Group<decltype(tile)::value>;
      static_assert(sizeof(Tile) <= sizeof(*next));
      const int64_t at = (g * kTileBlockM + i) * L::table_size(kWords);
      f(tile, i, *reinterpret_cast<Tile*>(next++), tables_ + at, seconds_ + at);
    });
  }

 private:
  // Full ones, and 8 + 4 + 3 rows.
  static constexpr int64_t kTiles = kTileBlockM / L::kMaxM + 2;
  // All rows of a tile are read, as they are, also where it has fewer.
  static constexpr int64_t kFloats =
      (kGroups * kTileBlockM + L::kMaxM) * int64_t(L::table_size(kWords));

  float *const tables_, *const seconds_;
  Group<L::kMaxM>* const groups_;
};

// Weights as stored: groups of a tile of `rows` rows from `row` on.
template <class L, int kWords>
struct StoredTile {
  const Weights& w;
  int64_t row, rows;

  void levels(int64_t group, int groups, float* scales, float* biases) const {
    pack_tile_levels<L>(w, row, rows, group, groups, scales, biases, L::kRows);
  }
  // Groups of at most 128 columns together.
  void spread(int64_t group, int groups, uint32_t* index) const {
    const int64_t words = w.columns / kWordBits;
    L::template pack_rows<kWords>(w.packed + row * words + group * kWords, words, int(rows),
                                  groups * kWords, index, L::index_size(kWords));
  }
  // What the next tile will read.
  void prefetch_next(int64_t group, int groups, int64_t next_rows) const {
    prefetch_rows<L>(w, row + rows, row + rows + next_rows, group * kWords, groups * kWords);
  }
};

// The same of prepacked weights, which arrive in the order in which they are read.
template <class L, int kWords>
struct PrepackedTile {
  const PrepackedLayout& layout;
  const Weights& w;
  const char* prepacked;
  int64_t tile;

  const char* block(int64_t group) const { return prepacked + layout.offset(group, tile); }
  void levels(int64_t group, int groups, float* scales, float* biases) const {
    for (int g = 0; g < groups; ++g) {
      const PrepackedGroup<L> from{
          block(group + g), layout.word_bytes,  layout.level_bytes, layout.block_bytes, 1, 0,
          w.dtype,          w.biases != nullptr};
      for (int r = 0; r < L::kVectors; ++r) {
        L::store(scales + g * L::kRows + r * L::kLanes, from.scale(0, r));
        L::store(biases + g * L::kRows + r * L::kLanes, from.bias(0, r));
      }
    }
  }
  void spread(int64_t group, int groups, uint32_t* index) const {
    for (int g = 0; g < groups; ++g) {
      L::template pack_prepacked<kWords>(block(group + g), index + g * L::index_size(kWords));
    }
  }
  void prefetch_next(int64_t, int, int64_t) const {}
};

// tile_at(row, rows): the weights of a tile of outputs.
template <class L, int kWords, class TileAt>
void qmm_t_tiles(const QmmArgs& a, const Block& block, const TileAt& tile_at) {
  using Tables = ChunkTables<L, kWords>;
  constexpr int64_t kPanel = 2 * kPanelRows;
  constexpr int kGroups = Tables::kGroups, kIndex = L::index_size(kWords);
  constexpr int kStep = 4 / kWords;  // groups that are spread together
  const int64_t all_groups = a.k / (kWords * kWordBits);
  const int64_t m_block = at_most(kTileBlockM, block.m_end - block.m_begin);
  const int64_t tiles = tiles_for(at_most(kPanel, block.n_end - block.n_begin), L::kRows);
  Arena arena(kStep * kIndex * 4 + 2 * kGroups * L::kRows * 4 + Tables::bytes() +
              sums_size(tiles * m_block, L::kRows));
  auto* index = arena.take<uint32_t>(kStep * kIndex);
  auto* scales = arena.take<float>(kGroups * L::kRows);
  auto* biases = arena.take<float>(kGroups * L::kRows);
  Tables tables(arena);
  const Sums sums = take_sums(arena, tiles * m_block, L::kRows);  // of all rows, tile by tile
  const TileShapes shapes(L::kTileRows * int(at_most(L::kMaxM, m_block)),
                          L::template depth<kWords>());
  const auto add_chunk = [&](int64_t m, int64_t m_count, int64_t row, int64_t rows, int64_t after,
                             int64_t first, int groups, const Sums& to) {
    const auto weights = tile_at(row, rows);
    weights.prefetch_next(first, groups, at_most(L::kRows, after));
    weights.levels(first, groups, scales, biases);
    for (int g = 0; g < groups; ++g) {
      if (g % kStep == 0) weights.spread(first + g, int(at_most(kStep, groups - g)), index);
      const PackedGroup<L, kWords> group_of_w{index + g % kStep * kIndex, scales + g * L::kRows,
                                              biases + g * L::kRows};
      tables.for_tiles(
          m_count, g, [&](auto tile, int64_t i, auto& group, float* table, float* second) {
            Sums y = to.from(i);
            y.ld = L::kRows;  // known to the compiler
            add_group<L, decltype(tile)::value, kWords>(activations(a), m + i,
                                                        (first + g) * kWords * kWordBits, group,
                                                        table, second, group_of_w, y, 1);
          });
    }
  };
  for (int64_t m = block.m_begin; m < block.m_end; m += kTileBlockM) {
    const int64_t m_count = at_most(kTileBlockM, block.m_end - m);
    for (int64_t n = block.n_begin; n < block.n_end; n += kPanel) {
      const int64_t n_end = at_most(n + kPanel, block.n_end);
      const auto for_outputs = [&](const auto& f) {
        for (int64_t t = 0, row = n; row < n_end; ++t, row += L::kRows) {
          f(row, at_most(L::kRows, n_end - row), sums.from(t * m_block));
        }
      };
      clear_sums<L>(sums, tiles * m_block, L::kRows);
      for (int64_t first = 0; first < all_groups; first += kGroups) {
        const int groups = int(at_most(kGroups, all_groups - first));
        tables.build(activations(a), m, m_count, first, groups);
        for_outputs([&](int64_t row, int64_t rows, const Sums& to) {
          add_chunk(m, m_count, row, rows, n_end - row - rows, first, groups, to);
          end_chains(a, first + groups, all_groups, to, m_count, L::kRows);
        });
      }
      for_outputs([&](int64_t row, int64_t rows, const Sums& from) {
        store_rows<L>(a, m, m_count, row, rows, from);
      });
    }
  }
}

}  // namespace
}  // namespace onebit::cpu

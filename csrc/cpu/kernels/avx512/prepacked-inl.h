// The product with prepacked weights.
#pragma once

#include "../prepacked.h"
#include "../qmm-inl.h"
#include "pairs_avx512-inl.h"

namespace onebit::cpu {
namespace {

// Blocks ahead of the one that is read, to L1: 2 to 4 are as fast, and up to a tenth faster than 8
// to L2.
constexpr int64_t kPrefetchBlocks = 4;

// One group of a panel, tile by tile.
template <class L>
struct PrepackedGroup {
  static_assert(L::kRows == PrepackedLayout::kTileRows);
  static constexpr bool kSpareStored = false;
  const char* block;
  int64_t word_bytes, level_bytes, block_bytes;
  int64_t tiles, group_bytes;  // of the panel; from a group to the next
  DType dtype;
  bool has_biases;

  ONEBIT_INLINE const uint32_t* index(int64_t tile) const {
    return reinterpret_cast<const uint32_t*>(block + tile * block_bytes);
  }
  ONEBIT_INLINE auto scale(int64_t tile, int r) const {
    return L::load_level(block + tile * block_bytes + word_bytes, dtype, r * L::kLanes);
  }
  ONEBIT_INLINE auto bias(int64_t tile, int r) const {
    const char* biases = block + tile * block_bytes + word_bytes + level_bytes;
    return has_biases ? L::load_level(biases, dtype, r * L::kLanes)
                      : L::mul(L::set(-0.5f), scale(tile, r));
  }
  // What is read next are tiles of this panel, of this group and of those after it.
  ONEBIT_INLINE void prefetch(int64_t tile) const {
    int64_t ahead = tile + kPrefetchBlocks;
    const char* p = block;
    for (; ahead >= tiles; ahead -= tiles) p += group_bytes;
    p += ahead * block_bytes;
    for (int64_t i = 0; i < block_bytes; i += 64) L::prefetch_soon(p + i);
  }
};

// One tile of rows of x passes over all of k for outputs that share tables; more rows take the
// weights in pieces that stay in L2 until all have met them.
constexpr int64_t kPrepackedPanel = 4096;

template <class L, int kWords>
void qmm_prepacked_panels(const QmmArgs& a, const char* prepacked, const Block& block) {
  const PrepackedLayout layout(a.w);
  const int64_t m_block = at_most(kBlockM, block.m_end - block.m_begin);
  const bool few = m_block <= L::kMaxM;
  const int64_t panel = at_most(few ? kPrepackedPanel : kPanelRows, block.n_end - block.n_begin);
  const int64_t chunk = few ? kLongestChain : kChunkColumns / (kWords * kWordBits);
  const int64_t ld = tiles_for(panel, L::kRows) * L::kRows;
  Arena arena(2 * L::kMaxM * L::table_size(kWords) * 4 + sums_size(m_block, ld));
  auto* table = arena.take<float>(L::kMaxM * L::table_size(kWords));
  auto* second = arena.take<float>(L::kMaxM * L::table_size(kWords));
  const Sums sums = take_sums(arena, m_block, ld);
  for (int64_t m = block.m_begin; m < block.m_end; m += m_block) {
    const int64_t m_count = at_most(m_block, block.m_end - m);
    for (int64_t n = block.n_begin; n < block.n_end; n += panel) {
      const int64_t n_count = at_most(panel, block.n_end - n), tiles = tiles_for(n_count, L::kRows);
      clear_sums<L>(sums, m_count, tiles * L::kRows);
      for (int64_t first = 0; first < layout.groups; first += chunk) {
        const int64_t last = at_most(first + chunk, layout.groups);
        for_row_tiles<L>(m_count, [&](auto rows, int64_t i) {
          constexpr int kM = decltype(rows)::value;
          for (int64_t g = first; g < last; ++g) {
            const int64_t column = g * kWords * kWordBits;
            Group<kM> group;
            build_tables<L, kM, kWords>(activations(a), m + i, column, table, second, group);
            add_group<L, kM, kWords>(
                activations(a), m + i, column, group, table, second,
                PrepackedGroup<L>{prepacked + layout.offset(g, n / L::kRows), layout.word_bytes,
                                  layout.level_bytes, layout.block_bytes, tiles,
                                  layout.tiles * layout.block_bytes, a.w.dtype,
                                  a.w.biases != nullptr},
                sums.from(i), tiles);
          }
        });
        end_chains(a, last, layout.groups, sums, m_count, tiles * L::kRows);
      }
      store_rows<L>(a, m, m_count, n, n_count, sums);
    }
  }
}

}  // namespace
}  // namespace onebit::cpu

// The product with prepacked weights.
#pragma once

#include "../prepacked.h"
#include "../qmm-inl.h"
#include "pairs_avx512-inl.h"

namespace onebit::cpu {
namespace {

// Blocks ahead of the one that is read: to L2, every other line, for lines come in pairs, and from
// there to L1. Weights from memory are late without the first, those in cache without the second;
// both with all lines take 4 % longer in cache.
constexpr int64_t kBlocksToL2 = 8, kBlocksToL1 = 4;

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
  ONEBIT_INLINE void prefetch(int64_t tile) const {
    const char *far = ahead(tile + kBlocksToL2), *near = ahead(tile + kBlocksToL1);
    for (int64_t i = 0; i < block_bytes; i += 128) L::prefetch(far + i);
    for (int64_t i = 0; i < block_bytes; i += 64) L::prefetch_to_l1(near + i);
  }

 private:
  // What is read next are tiles of this panel, of this group and of those after it.
  ONEBIT_INLINE const char* ahead(int64_t tile) const {
    const char* p = block;
    for (; tile >= tiles; tile -= tiles) p += group_bytes;
    return p + tile * block_bytes;
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

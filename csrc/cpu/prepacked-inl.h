// The prepacked form of AVX-512: how it is made, and the product with it.
#pragma once

#include "pairs_avx512-inl.h"
#include "prepacked.h"
#include "qmm-inl.h"

namespace onebit::cpu {
namespace {

// Scales or biases of one group and up to one tile of rows.
template <class T>
void copy_levels(const T* from, int64_t stride, int64_t rows, T* to) {
  for (int64_t r = 0; r < PrepackedLayout::kTileRows; ++r) {
    to[r] = r < rows ? from[r * stride] : T(0);
  }
}

inline void copy_levels(const void* from, int64_t stride, int64_t rows, int64_t size, char* to) {
  if (size == 4) {
    copy_levels(static_cast<const uint32_t*>(from), stride, rows, reinterpret_cast<uint32_t*>(to));
  } else {
    copy_levels(static_cast<const uint16_t*>(from), stride, rows, reinterpret_cast<uint16_t*>(to));
  }
}

inline void prepack(const Weights& w, char* out, int64_t begin, int64_t end) {
  using Pairs = PairsAvx512<PrepackedLayout::kTileRows / 32>;
  const PrepackedLayout layout(w);
  const int64_t words = w.columns / kWordBits, size = element_size(w.dtype);
  const int halves_per_group = w.group_size / 16;
  for (int64_t tile = begin; tile < end; ++tile) {
    const int64_t row = tile * PrepackedLayout::kTileRows;
    const int64_t rows = at_most(PrepackedLayout::kTileRows, w.rows - row);
    Pairs::for_quads(w.packed + row * words, words, int(rows), int(words),
                     [&](int pair, int word, const __m512i(&halves)[8]) {
                       const int first = word * 2, count = int(at_most(8, words * 2 - first));
                       for (int i = 0; i < count; ++i) {
                         const int group = (first + i) / halves_per_group;
                         const int half = (first + i) % halves_per_group;
                         char* to = out + layout.offset(group, tile);
                         _mm512_storeu_si512(to + (half * Pairs::kPairs + pair) * 64, halves[i]);
                       }
                     });
    for (int64_t g = 0; g < layout.groups; ++g) {
      const int64_t at = (row * layout.groups + g) * size;
      char* to = out + layout.offset(g, tile) + layout.word_bytes;
      copy_levels(static_cast<const char*>(w.scales) + at, layout.groups, rows, size, to);
      if (w.biases) {
        copy_levels(static_cast<const char*>(w.biases) + at, layout.groups, rows, size,
                    to + layout.level_bytes);
      }
    }
  }
}

// From memory 103 GMAC/s per thread with it, 80 without; 4 blocks give 97, 16 give 92.
constexpr int64_t kPrefetchBlocks = 8;

// One group of a panel, tile by tile.
template <class L>
struct PrepackedGroup {
  static_assert(L::kRows == PrepackedLayout::kTileRows);
  static constexpr bool kSpareStored = false;
  const char* block;
  int64_t word_bytes, level_bytes, block_bytes;
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
    const char* p = block + (tile + kPrefetchBlocks) * block_bytes;
    for (int64_t i = 0; i < block_bytes; i += 64) L::prefetch(p + i);
  }
};

constexpr int64_t kPrepackedPanel = 4096;  // outputs that share tables and fit L2

template <class L, int kWords>
void qmm_prepacked_panels(const QmmArgs& a, const char* prepacked, const Block& block) {
  const PrepackedLayout layout(a.w);
  const int64_t panel = at_most(kPrepackedPanel, block.n_end - block.n_begin);
  const int64_t ld = tiles_for(panel, L::kRows) * L::kRows;
  Arena arena(L::kMaxM * (2 * L::table_size(kWords) + ld) * 4);
  auto* table = arena.take<float>(L::kMaxM * L::table_size(kWords));
  auto* second = arena.take<float>(L::kMaxM * L::table_size(kWords));
  auto* acc = arena.take<float>(L::kMaxM * ld);
  for (int64_t n = block.n_begin; n < block.n_end; n += panel) {
    const int64_t n_count = at_most(panel, block.n_end - n), tiles = tiles_for(n_count, L::kRows);
    for_row_tiles<L>(block.m_end - block.m_begin, [&](auto rows, int64_t i) {
      constexpr int kM = decltype(rows)::value;
      const int64_t m = block.m_begin + i;
      for (int64_t j = 0; j < kM * ld; j += L::kLanes) L::store(acc + j, L::zero());
      for (int64_t g = 0; g < layout.groups; ++g) {
        const int64_t column = g * kWords * kWordBits;
        Group<kM> group;
        build_tables<L, kM, kWords>(activations(a), m, column, table, second, group);
        add_group<L, kM, kWords>(
            activations(a), m, column, group, table, second,
            PrepackedGroup<L>{prepacked + layout.offset(g, n / L::kRows), layout.word_bytes,
                              layout.level_bytes, layout.block_bytes, a.w.dtype,
                              a.w.biases != nullptr},
            acc, tiles, ld);
      }
      store_rows<L>(a, m, kM, n, n_count, acc, ld);
    });
  }
}

}  // namespace
}  // namespace onebit::cpu

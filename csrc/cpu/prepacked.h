// An interleaved copy of a matrix of weights, for products with a few rows of x: what the row-major
// kernel does to every group before it can look anything up is done once. Groups in order; within a
// group tiles of 64 rows; of each tile words, scales, biases. Rows past the last are zeros.
//
// Words of a tile: for each 16 columns, for each 32 rows, 16 dwords: dword i is the columns of row
// i and, above them, of row 16 + i.
#pragma once

#include <cstdint>
#include <cstring>

#include "kernels.h"

namespace onebit::cpu {

struct PrepackedLayout {
  static constexpr int kTileRows = 64;
  static constexpr int64_t kMaxRows = 4;  // of x; with more, the row-major kernel is as fast

  static constexpr int64_t block_size(int group_size, int64_t level_size, bool has_biases) {
    return kTileRows * (group_size / 8 + level_size * (has_biases ? 2 : 1));
  }
  template <class Int>
  static Int bytes(const Int& rows, const Int& columns, int group_size, int64_t block_bytes) {
    return (rows + (kTileRows - 1)) / kTileRows * (columns / group_size) * block_bytes;
  }

  explicit PrepackedLayout(const Weights& w)
      : tiles((w.rows + kTileRows - 1) / kTileRows),
        groups(w.columns / w.group_size),
        word_bytes(kTileRows * w.group_size / 8),
        level_bytes(kTileRows * element_size(w.dtype)),
        block_bytes(block_size(w.group_size, element_size(w.dtype), w.biases != nullptr)) {}

  int64_t bytes() const { return groups * tiles * block_bytes; }
  int64_t offset(int64_t group, int64_t tile) const { return (group * tiles + tile) * block_bytes; }

  // Whether `copy` has one group of one row as `w` has it.
  bool holds(const char* copy, const Weights& w, int64_t row, int64_t group) const {
    const int64_t r = row % kTileRows, size = level_bytes / kTileRows;
    const char* block = copy + offset(group, row / kTileRows);
    const auto* words =
        reinterpret_cast<const uint16_t*>(w.packed + (row * w.columns + group * w.group_size) / 32);
    for (int half = 0; half < w.group_size / 16; ++half) {
      const int64_t dword = (half * kTileRows / 32 + r / 32) * 16 + r % 16;
      if (std::memcmp(block + dword * 4 + r % 32 / 16 * 2, words + half, 2) != 0) return false;
    }
    const int64_t at = (row * groups + group) * size;
    const char* levels = block + word_bytes + r * size;
    return std::memcmp(levels, static_cast<const char*>(w.scales) + at, size) == 0 &&
           (!w.biases ||
            std::memcmp(levels + level_bytes, static_cast<const char*>(w.biases) + at, size) == 0);
  }

  int64_t tiles, groups;
  int64_t word_bytes, level_bytes, block_bytes;
};

}  // namespace onebit::cpu

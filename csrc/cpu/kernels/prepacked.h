// A matrix of weights in the order in which products read it: what the row-major kernel does to
// every group before it can look anything up is done once. A header; then groups in order; within a
// group tiles of 64 rows; of each tile words, scales, biases. Rows past the last are zeros.
//
// Words of a tile: for each 16 columns, for each 32 rows, 16 dwords: dword i is the columns of row
// i and, above them, of row 16 + i.
#pragma once

#include <cstdint>
#include <cstring>

#include "kernels.h"

namespace onebit::cpu {

// What the bytes stand for. They may be stored, in an exported program, and read by another version
// of this library: whatever changes the layout changes the version.
struct PrepackedHeader {
  char name[15] = "onebit weights";
  uint8_t version = 1;
  int64_t rows, columns;
  int32_t group_size;
  DType dtype;
  bool has_biases;
  char unused[26] = {};

  PrepackedHeader(const Weights& w, bool has_biases)
      : rows(w.rows),
        columns(w.columns),
        group_size(w.group_size),
        dtype(w.dtype),
        has_biases(has_biases) {}
};
static_assert(sizeof(PrepackedHeader) == 64, "blocks are whole lines");

struct PrepackedLayout {
  static constexpr int kTileRows = 64;

  template <class Int>
  static Int bytes(
      const Int& rows, const Int& columns, int group_size, int64_t level_size, bool has_biases) {
    return (rows + (kTileRows - 1)) / kTileRows * (columns / group_size) *
               block_size(group_size, level_size, has_biases) +
           int64_t(sizeof(PrepackedHeader));
  }

  // Of a matrix that may lack its tensors; `biases` says whether it has any.
  explicit PrepackedLayout(const Weights& w)
      : tiles((w.rows + kTileRows - 1) / kTileRows),
        groups(w.columns / w.group_size),
        word_bytes(kTileRows * w.group_size / 8),
        level_bytes(kTileRows * element_size(w.dtype)),
        block_bytes(block_size(w.group_size, element_size(w.dtype), w.biases != nullptr)) {}

  int64_t offset(int64_t group, int64_t tile) const {
    return int64_t(sizeof(PrepackedHeader)) + (group * tiles + tile) * block_bytes;
  }
  int64_t bytes() const { return offset(groups, 0); }

  int64_t tiles, groups;
  int64_t word_bytes, level_bytes, block_bytes;

 private:
  static constexpr int64_t block_size(int group_size, int64_t level_size, bool has_biases) {
    return kTileRows * (group_size / 8 + level_size * (has_biases ? 2 : 1));
  }
};

// The tensors of a matrix as bytes; biases may be null.
template <class Char>
struct CanonicalBytes {
  Char *packed, *scales, *biases;
};

// f(canonical, prepacked, bytes) for every piece of rows [begin, end) that lies in one place in
// both: 16 columns of a row, or a level.
template <class A, class B, class F>
void for_prepacked_pieces(const Weights& sizes,
                          const CanonicalBytes<A>& canonical,
                          B* prepacked,
                          int64_t begin,
                          int64_t end,
                          const F& f) {
  const PrepackedLayout layout(sizes);
  const int64_t row_bytes = sizes.columns / 8, size = element_size(sizes.dtype);
  const int halves = sizes.group_size / 16;
  for (int64_t row = begin; row < end; ++row) {
    const int64_t r = row % PrepackedLayout::kTileRows;
    for (int64_t group = 0; group < layout.groups; ++group) {
      B* block = prepacked + layout.offset(group, row / PrepackedLayout::kTileRows);
      for (int half = 0; half < halves; ++half) {
        const int64_t dword = (half * (PrepackedLayout::kTileRows / 32) + r / 32) * 16 + r % 16;
        f(canonical.packed + row * row_bytes + (group * halves + half) * 2,
          block + dword * 4 + r % 32 / 16 * 2, 2);
      }
      const int64_t at = (row * layout.groups + group) * size;
      B* levels = block + layout.word_bytes + r * size;
      f(canonical.scales + at, levels, size);
      if (sizes.biases) f(canonical.biases + at, levels + layout.level_bytes, size);
    }
  }
}

// Rows [begin, end) of w to `out`, which is zeros. The header is the caller's.
inline void prepack(const Weights& w, char* out, int64_t begin, int64_t end) {
  const auto bytes = [](const void* p) { return static_cast<const char*>(p); };
  for_prepacked_pieces(
      w, CanonicalBytes<const char>{bytes(w.packed), bytes(w.scales), bytes(w.biases)}, out, begin,
      end, [](const char* from, char* to, int64_t count) { std::memcpy(to, from, count); });
}

inline void unprepack(const Weights& sizes,
                      const char* prepacked,
                      const CanonicalBytes<char>& out,
                      int64_t begin,
                      int64_t end) {
  for_prepacked_pieces(
      sizes, out, prepacked, begin, end,
      [](char* to, const char* from, int64_t count) { std::memcpy(to, from, count); });
}

}  // namespace onebit::cpu

// How the AVX-512 lookups hold weight bits: dword i of a vector is 16 columns of row i, and above
// them the same columns of row 16 + i. As dwords it indexes float32 tables, as words int16 tables.
#pragma once

#include "avx512-inl.h"

namespace onebit::cpu {
namespace {

template <int kPairs_>
struct PairsAvx512 : Avx512 {
  static constexpr int kPairs = kPairs_;  // of 16 rows

  // f(pair, word, halves) for every pair and every fourth word of kPairs * 32 rows of `words` words
  // each. The last of `rows` rows stands for those after it; words past the end are 0.
  template <class F>
  static ONEBIT_INLINE void for_quads(
      const uint32_t* w, int64_t stride, int rows, int words, const F& f) {
    for (int pair = 0; pair < kPairs; ++pair) {
      const int row_a = 32 * pair < rows ? 32 * pair : rows - 1;
      const int row_b = 32 * pair + 16 < rows ? 32 * pair + 16 : rows - 1;
      const char* a = reinterpret_cast<const char*>(w + row_a * stride);
      const char* b = reinterpret_cast<const char*>(w + row_b * stride);
      for (int word = 0; word < words; word += 4) {
        const int bytes = (words - word < 4 ? words - word : 4) * 4;
        __m512i za[4], zb[4], z[8], halves[8];
        load_rows(a + word * 4, stride * 4, rows - 1 - row_a, bytes, za);
        load_rows(b + word * 4, stride * 4, rows - 1 - row_b, bytes, zb);
        ONEBIT_UNROLL
        for (int i = 0; i < 4; ++i) {
          z[i] = _mm512_unpacklo_epi16(za[i], zb[i]);
          z[4 + i] = _mm512_unpackhi_epi16(za[i], zb[i]);
        }
        transpose_4(z, halves);
        transpose_4(z + 4, halves + 4);
        f(pair, word, halves);
      }
    }
  }

  // Column j of a group in an index: bit_of(index + dword(j, r), bit(j, r)) for the rows of vector
  // r.
  static constexpr int dword(int column, int r) {
    return (column / 16 * kPairs + r / 2) * Avx512::kLanes;
  }
  static constexpr int bit(int column, int r) { return r % 2 * 16 + column % 16; }

  // Rows 16 + i where an index of dwords is read. A multiplication: its port is free.
  static ONEBIT_INLINE __m512i upper_rows(__m512i w) {
    return _mm512_madd_epi16(w, _mm512_set1_epi32(0x10000));
  }

  // Bit 15 of both rows, behind those collected before.
  static ONEBIT_INLINE __m512i collect_bits(__m512i bits, __m512i w) {
    return _mm512_or_si512(_mm512_add_epi16(bits, bits), _mm512_srli_epi16(w, 15));
  }
};

}  // namespace
}  // namespace onebit::cpu

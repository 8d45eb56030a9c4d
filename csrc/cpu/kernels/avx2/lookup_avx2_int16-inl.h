// Activations of 16 bits by int16 tables: the 16 subset sums of 4 activations as a register of
// their low bytes and one of their high bytes, looked up by two vpshufb for 32 output rows at once.
// Bytes are added as bytes, and a low byte that comes out smaller carries: six operations for 128
// multiply-adds, of which only the two lookups need a shuffle port. Putting int16 together at once
// takes four shuffles: 3 % slower on Zen 4, which has two such ports; Skylake has one.
#pragma once

#include "avx2-inl.h"

namespace onebit::cpu {
namespace {

// kQuads * 32 output rows in a tile. A byte of an index vector is 8 columns of a row; byte c of
// dword i is row 8 c + i, so that sums widen to vectors of 8 rows in place.
template <int kQuads_>
struct LookupAvx2Int16 : Avx2 {
  using Integer = int16_t;
  using Numbers = const int16_t*;
  static constexpr int kQuads = kQuads_;
  static constexpr int kVectors = 4 * kQuads;
  static constexpr int kRows = kVectors * kLanes;
  static constexpr int kMaxM = 4;
  static constexpr int kTable = 16;  // of 8 columns, in floats: low and high bytes of 2 * 16 sums

  static constexpr int index_size(int words) { return words * kRows; }
  static constexpr int table_size(int words) { return words * 4 * kTable; }

  // Columns of 4 rows' bytes: out[j] = byte j of dword i of z[0], ..., z[3].
  static ONEBIT_INLINE void interleave(const __m256i* z, __m256i* out) {
    const __m256i a = _mm256_unpacklo_epi8(z[0], z[1]), b = _mm256_unpackhi_epi8(z[0], z[1]);
    const __m256i c = _mm256_unpacklo_epi8(z[2], z[3]), d = _mm256_unpackhi_epi8(z[2], z[3]);
    out[0] = _mm256_unpacklo_epi16(a, c);
    out[1] = _mm256_unpackhi_epi16(a, c);
    out[2] = _mm256_unpacklo_epi16(b, d);
    out[3] = _mm256_unpackhi_epi16(b, d);
  }

  // Words of kRows rows, `words` of them per row, to index + group * ld.
  template <int kWords>
  static void pack_rows(
      const uint32_t* w, int64_t stride, int rows, int words, uint32_t* index, int64_t ld) {
    for (int quad = 0; quad < kQuads; ++quad) {
      const char* from[4];
      int last[4];
      for (int c = 0; c < 4; ++c) {
        const int row = quad * 32 + c * kLanes < rows ? quad * 32 + c * kLanes : rows - 1;
        from[c] = reinterpret_cast<const char*>(w + row * stride);
        last[c] = rows - 1 - row;
      }
      for (int word = 0; word < words; word += 4) {
        const int count = words - word < 4 ? words - word : 4;
        __m256i z[4][4], bytes[4][4];
        ONEBIT_UNROLL
        for (int c = 0; c < 4; ++c) {
          __m256i v[4];
          load_rows(from[c] + word * 4, stride * 4, last[c], count * 4, v);
          ONEBIT_UNROLL
          for (int i = 0; i < 4; ++i) z[i][c] = v[i];
        }
        ONEBIT_UNROLL
        for (int i = 0; i < 4; ++i) interleave(z[i], bytes[i]);
        ONEBIT_UNROLL
        for (int i = 0; i < 4; ++i) {
          if (i >= count) continue;
          const __m256i v[4] = {bytes[0][i], bytes[1][i], bytes[2][i], bytes[3][i]};
          __m256i columns[4];
          transpose_4(v, columns);
          uint32_t* out = index + (word + i) / kWords * ld + (word + i) % kWords * kRows;
          ONEBIT_UNROLL
          for (int j = 0; j < 4; ++j) {
            _mm256_store_si256(reinterpret_cast<__m256i*>(out + (j * kQuads + quad) * kLanes),
                               columns[j]);
          }
        }
      }
    }
  }

  // Low bytes of the sums of 4 values, then the high bytes.
  static ONEBIT_INLINE __m256i sums_of_4(const int16_t* x) {
    const auto in_lanes = [&](int i, int lanes) __attribute__((always_inline)) {
      const __m256i lane = _mm256_setr_epi16(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
      const __m256i bit = _mm256_set1_epi16(int16_t(lanes));
      return _mm256_and_si256(_mm256_set1_epi16(x[i]),
                              _mm256_cmpeq_epi16(_mm256_and_si256(lane, bit), bit));
    };
    const __m256i sums = _mm256_add_epi16(_mm256_add_epi16(in_lanes(0, 1), in_lanes(1, 2)),
                                          _mm256_add_epi16(in_lanes(2, 4), in_lanes(3, 8)));
    const __m256i split = _mm256_setr_epi8(0, 2, 4, 6, 8, 10, 12, 14, 1, 3, 5, 7, 9, 11, 13, 15, 0,
                                           2, 4, 6, 8, 10, 12, 14, 1, 3, 5, 7, 9, 11, 13, 15);
    return _mm256_permute4x64_epi64(_mm256_shuffle_epi8(sums, split), 0xd8);
  }

  // Column j of a group in an index: bit_of(index + dword(j, r), bit(j, r)) for the rows of vector
  // r.
  static constexpr int dword(int column, int r) { return (column / 8 * kQuads + r / 4) * kLanes; }
  static constexpr int bit(int column, int r) { return r % 4 * 8 + column % 8; }

  // Tables of one group for row m of a tile of kM rows.
  template <int kM, int kWords>
  static ONEBIT_INLINE void build(const int16_t* x, int m, float* table) {
    ONEBIT_NO_UNROLL
    for (int i = 0; i < 4 * kWords; ++i) {
      auto* t = reinterpret_cast<__m256i*>(table + (i * kM + m) * kTable);
      _mm256_store_si256(t, sums_of_4(x + 8 * i));
      _mm256_store_si256(t + 1, sums_of_4(x + 8 * i + 4));
    }
  }

  static ONEBIT_INLINE void keep(__m256i& v) { asm("" : "+x"(v)); }
  static ONEBIT_INLINE __m256i load_twice(const float* p) {
    return _mm256_broadcastsi128_si256(_mm_load_si128(reinterpret_cast<const __m128i*>(p)));
  }

  // emit(r, v): v[m] = the sums of one group of row m of x where the bits of the rows of vector r
  // are set, as int32.
  template <int kM, int kWords, bool = true, class Emit>
  static ONEBIT_INLINE void tile(const uint32_t* index,
                                 const float* table,
                                 const int32_t*,
                                 const Emit& emit) {
    const __m256i nibble = _mm256_set1_epi8(15), sign = _mm256_set1_epi8(-128);
    __m256i low[kM][kQuads], high[kM][kQuads];  // the low bytes less 128: there is no unsigned >
    ONEBIT_UNROLL
    for (int m = 0; m < kM; ++m) {
      ONEBIT_UNROLL
      for (int q = 0; q < kQuads; ++q) {
        low[m][q] = sign;
        high[m][q] = _mm256_setzero_si256();
      }
    }
    ONEBIT_NO_UNROLL
    for (int i = 0; i < 4 * kWords; ++i, index += kQuads * kLanes, table += kM * kTable) {
      ONEBIT_UNROLL
      for (int part = 0; part < 2; ++part) {
        __m256i w[kQuads];
        ONEBIT_UNROLL
        for (int q = 0; q < kQuads; ++q) {
          w[q] = _mm256_load_si256(reinterpret_cast<const __m256i*>(index + q * kLanes));
          if (part) w[q] = _mm256_srli_epi16(w[q], 4);
          w[q] = _mm256_and_si256(w[q], nibble);
        }
        ONEBIT_UNROLL
        for (int m = 0; m < kM; ++m) {
          const __m256i lows = load_twice(table + m * kTable + part * 8);
          const __m256i highs = load_twice(table + m * kTable + part * 8 + 4);
          ONEBIT_UNROLL
          for (int q = 0; q < kQuads; ++q) {
            const __m256i sum = _mm256_add_epi8(low[m][q], _mm256_shuffle_epi8(lows, w[q]));
            const __m256i carry = _mm256_cmpgt_epi8(low[m][q], sum);
            const __m256i more = _mm256_sub_epi8(_mm256_shuffle_epi8(highs, w[q]), carry);
            low[m][q] = sum;
            high[m][q] = _mm256_add_epi8(high[m][q], more);
            keep(low[m][q]);
            keep(high[m][q]);
          }
        }
      }
    }
    const __m256i upper = _mm256_set1_epi16(-256), first = _mm256_set1_epi32(1);
    ONEBIT_UNROLL
    for (int q = 0; q < kQuads; ++q) {
      // Rows 8 c + i: in dword i, c = 0 and 2 of `even`, 1 and 3 of `odd`.
      __m256i even[kM], odd[kM], sums[kM];
      ONEBIT_UNROLL
      for (int m = 0; m < kM; ++m) {
        const __m256i bytes = _mm256_xor_si256(low[m][q], sign);
        even[m] =
            _mm256_or_si256(_mm256_andnot_si256(upper, bytes), _mm256_slli_epi16(high[m][q], 8));
        odd[m] = _mm256_or_si256(_mm256_srli_epi16(bytes, 8), _mm256_and_si256(upper, high[m][q]));
      }
      const auto emit_from = [&](int r, const __m256i(&z)[kM],
                                 bool lower) __attribute__((always_inline)) {
        ONEBIT_UNROLL
        for (int m = 0; m < kM; ++m) {
          sums[m] = lower ? _mm256_madd_epi16(z[m], first) : _mm256_srai_epi32(z[m], 16);
        }
        emit(4 * q + r, sums);
      };
      emit_from(0, even, true);
      emit_from(1, odd, true);
      emit_from(2, even, false);
      emit_from(3, odd, false);
    }
  }
};

}  // namespace
}  // namespace onebit::cpu

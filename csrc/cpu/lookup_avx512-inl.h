// Exact float32 by table lookup: the 32 subset sums of 5 activations sit in two registers, and
// vpermt2ps looks them up with the 5 weight bits of 16 output rows: 80 multiply-adds for one
// shuffle and one add, where an FMA does 16. Per word of a row: bits 0-4, 5-9, 10-14 of each 16-bit
// half. vpmulhuw brings the last two down: a shift would compete with the shuffles for their ports
// (158 against 172 GMAC/s at 4 rows of x, Zen 4). Bits 15 and 31 of a group's words are collected
// in one more vector when packing.
#pragma once

#include "avx512-inl.h"

namespace onebit::cpu {
namespace {

// kVectors * 16 output rows in a tile.
template <int kVectors_>
struct LookupAvx512 : Avx512 {
  static constexpr int kVectors = kVectors_;
  static constexpr int kRows = kVectors * kLanes;
  static constexpr int kMaxM = 4;

  // words: 32-column words in a group.
  static constexpr int index_size(int words) { return (words + 1) * kRows; }
  static constexpr int table_size(int words) { return words * 6 * 32 + (words == 4 ? 2 : 1) * 16; }

  // The collected bits of a group, as 4-bit indices in the low and (4 words) the high 16 bits.
  template <int kWords>
  static ONEBIT_INLINE __m512i spare_bits(const __m512i* w) {
    __m512i bits = _mm512_and_si512(_mm512_srli_epi32(w[0], 15), _mm512_set1_epi32(0x00010001));
    ONEBIT_UNROLL
    for (int i = 1; i < kWords; ++i) {
      bits = _mm512_ternarylogic_epi32(_mm512_srli_epi32(w[i], 15 - i),
                                       _mm512_set1_epi32(0x00010001 << i), bits, 0xea);
    }
    if (kWords == 2) bits = _mm512_or_si512(bits, _mm512_srli_epi32(bits, 14));
    if (kWords == 1) bits = _mm512_or_si512(bits, _mm512_srli_epi32(bits, 15));
    return bits;
  }

  // Words of kRows rows, `words` of them per row, to index + group * ld.
  template <int kWords>
  static void pack_rows(
      const uint32_t* w, int64_t stride, int rows, int words, uint32_t* index, int64_t ld) {
    for (int r = 0; r < kVectors; ++r) {
      const int first_row = r * 16 < rows ? r * 16 : rows - 1;
      const char* p = reinterpret_cast<const char*>(w + first_row * stride);
      for (int word = 0; word < words; word += 4) {
        const int count = words - word < 4 ? words - word : 4;
        __m512i d[4];
        transpose_dwords(p + word * 4, stride * 4, rows - 1 - first_row, count * 4, d);
        ONEBIT_UNROLL
        for (int i = 0; i < 4; i += kWords) {
          if (i < count) {
            uint32_t* out = index + (word + i) / kWords * ld + r * kLanes;
            ONEBIT_UNROLL
            for (int j = 0; j < kWords; ++j) _mm512_store_si512(out + j * kRows, d[i + j]);
            _mm512_store_si512(out + kWords * kRows, spare_bits<kWords>(d + i));
          }
        }
      }
    }
  }

  // The transpose of qmm_n: kRows columns from `column` on of up to 128 rows as one group of 4
  // words, bit = row. Rows past the end are 0.
  static void pack_columns(
      const uint32_t* w, int64_t stride, int64_t column, int rows, uint32_t* index) {
    __m512i v[4][kVectors];
    ONEBIT_UNROLL
    for (int i = 0; i < 4; ++i) {
      ONEBIT_UNROLL
      for (int r = 0; r < kVectors; ++r) v[i][r] = _mm512_setzero_si512();
      const int count = rows - 32 * i < 32 ? rows - 32 * i : 32;
      const auto* p = reinterpret_cast<const uint16_t*>(w + 32 * i * stride) + column / 16;
      __m512i bit = _mm512_set1_epi32(1);
      ONEBIT_NO_UNROLL
      for (int j = 0; j < count; ++j, p += 2 * stride) {
        ONEBIT_UNROLL
        for (int r = 0; r < kVectors; ++r) {
          v[i][r] = _mm512_mask_or_epi32(v[i][r], p[r], v[i][r], bit);
        }
        bit = _mm512_add_epi32(bit, bit);
      }
    }
    ONEBIT_UNROLL
    for (int r = 0; r < kVectors; ++r) {
      __m512i words[4];
      ONEBIT_UNROLL
      for (int i = 0; i < 4; ++i) {
        words[i] = v[i][r];
        _mm512_store_si512(index + i * kRows + r * kLanes, words[i]);
      }
      _mm512_store_si512(index + 4 * kRows + r * kLanes, spare_bits<4>(words));
    }
  }

  static ONEBIT_INLINE Vec sums_of_4(float a, float b, float c, float d) {
    Vec t = _mm512_maskz_mov_ps(0xaaaa, set(a));
    t = _mm512_mask_add_ps(t, 0xcccc, t, set(b));
    t = _mm512_mask_add_ps(t, 0xf0f0, t, set(c));
    return _mm512_mask_add_ps(t, 0xff00, t, set(d));
  }

  // Tables of one group for row m of a tile of kM rows.
  template <int kM, int kWords>
  static ONEBIT_INLINE void build(const float* x, int m, float* table) {
    float* t = table + m * 32;
    for (int half = 0; half < 2 * kWords; ++half, x += 16) {
      ONEBIT_UNROLL
      for (int i = 0; i < 15; i += 5, t += kM * 32) {
        const Vec low = sums_of_4(x[i], x[i + 1], x[i + 2], x[i + 3]);
        _mm512_store_ps(t, low);
        _mm512_store_ps(t + 16, add(low, set(x[i + 4])));
      }
    }
    x -= 32 * kWords;
    t = table + kWords * 6 * 32 * kM + m * 16;
    if (kWords == 4) {
      _mm512_store_ps(t, sums_of_4(x[15], x[47], x[79], x[111]));
      _mm512_store_ps(t + kM * 16, sums_of_4(x[31], x[63], x[95], x[127]));
    } else if (kWords == 2) {
      _mm512_store_ps(t, sums_of_4(x[15], x[47], x[31], x[63]));
    } else {
      _mm512_store_ps(t, sums_of_4(x[15], x[31], 0, 0));
    }
  }

  // The value is opaque to the compiler, which would otherwise spill accumulators (GCC 12).
  static ONEBIT_INLINE void keep(Vec& v) { asm("" : "+v"(v)); }

  template <int kM>
  static ONEBIT_INLINE void look_up_5(const float* t,
                                      const __m512i (&index)[kVectors],
                                      Vec (&acc)[kM][kVectors]) {
    ONEBIT_UNROLL
    for (int m = 0; m < kM; ++m) {
      Vec low = _mm512_load_ps(t + m * 32), high = _mm512_load_ps(t + m * 32 + 16);
      keep(low);
      keep(high);
      ONEBIT_UNROLL
      for (int r = 0; r < kVectors; ++r) {
        acc[m][r] = add(acc[m][r], _mm512_permutex2var_ps(low, index[r], high));
        keep(acc[m][r]);
      }
    }
  }

  template <int kM>
  static ONEBIT_INLINE void look_up_4(const float* t,
                                      const __m512i (&index)[kVectors],
                                      Vec (&acc)[kM][kVectors]) {
    ONEBIT_UNROLL
    for (int m = 0; m < kM; ++m) {
      const Vec sums = _mm512_load_ps(t + m * 16);
      ONEBIT_UNROLL
      for (int r = 0; r < kVectors; ++r) {
        acc[m][r] = add(acc[m][r], _mm512_permutexvar_ps(index[r], sums));
        keep(acc[m][r]);
      }
    }
  }

  // emit(m, r, v): v = the sum of the activations of one group where the row's bit is set, for the
  // rows of vector r.
  template <int kM, int kWords, class Emit>
  static ONEBIT_INLINE void tile(const uint32_t* index, const float* table, const Emit& emit) {
    Vec acc[kM][kVectors];
    const __m512i by_5 = _mm512_set1_epi16(1 << 11), by_10 = _mm512_set1_epi16(1 << 6);
    ONEBIT_UNROLL
    for (int m = 0; m < kM; ++m) {
      ONEBIT_UNROLL
      for (int r = 0; r < kVectors; ++r) acc[m][r] = zero();
    }
    __m512i w[kVectors], shifted[kVectors];
    ONEBIT_NO_UNROLL
    for (int word = 0; word < kWords; ++word, index += kRows) {
      ONEBIT_UNROLL
      for (int r = 0; r < kVectors; ++r) w[r] = _mm512_load_si512(index + r * kLanes);
      ONEBIT_NO_UNROLL
      for (int half = 0; half < 2; ++half, table += 3 * 32 * kM) {
        look_up_5<kM>(table, w, acc);
        ONEBIT_UNROLL
        for (int r = 0; r < kVectors; ++r) shifted[r] = _mm512_mulhi_epu16(w[r], by_5);
        look_up_5<kM>(table + 32 * kM, shifted, acc);
        ONEBIT_UNROLL
        for (int r = 0; r < kVectors; ++r) shifted[r] = _mm512_mulhi_epu16(w[r], by_10);
        look_up_5<kM>(table + 64 * kM, shifted, acc);
        ONEBIT_UNROLL
        for (int r = 0; r < kVectors; ++r) w[r] = _mm512_srli_epi32(w[r], 16);
      }
    }
    ONEBIT_UNROLL
    for (int r = 0; r < kVectors; ++r) w[r] = _mm512_load_si512(index + r * kLanes);
    look_up_4<kM>(table, w, acc);
    if (kWords == 4) {
      ONEBIT_UNROLL
      for (int r = 0; r < kVectors; ++r) w[r] = _mm512_srli_epi32(w[r], 16);
      look_up_4<kM>(table + 16 * kM, w, acc);
    }
    ONEBIT_UNROLL
    for (int m = 0; m < kM; ++m) {
      ONEBIT_UNROLL
      for (int r = 0; r < kVectors; ++r) emit(m, r, acc[m][r]);
    }
  }
};

}  // namespace
}  // namespace onebit::cpu

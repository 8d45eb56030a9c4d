// Activations of 16 bits by int16 tables: 32 output rows in a register, 6 or 5 weight bits a
// lookup, twice the rate of the int32 tables.
#pragma once

#include "pairs_avx512-inl.h"

namespace onebit::cpu {
namespace {

// kPairs * 32 output rows in a tile.
template <int kPairs_>
struct LookupAvx512Int16 : PairsAvx512<kPairs_> {
  using Base = PairsAvx512<kPairs_>;
  using Avx512::kLanes;
  using Base::kPairs;
  using Integer = int16_t;
  using Numbers = const int16_t*;
  static constexpr int kVectors = 2 * kPairs;
  static constexpr int kRows = 32 * kPairs;
  static constexpr int kMaxM = 4;
  static constexpr int kHalfTable = 4 * 16;  // of 16 columns, in floats: 64 + 32 + 32 sums of int16

  static constexpr int index_size(int words) { return words * kRows; }
  static constexpr int table_size(int words) { return words * 2 * kHalfTable; }

  // Words of kRows rows, `words` of them per row, to index + group * ld.
  template <int kWords>
  static void pack_rows(
      const uint32_t* w, int64_t stride, int rows, int words, uint32_t* index, int64_t ld) {
    Base::for_quads(
        w, stride, rows, words,
        [&](int pair, int word, const __m512i(&halves)[8]) __attribute__((always_inline)) {
          ONEBIT_UNROLL
          for (int i = 0; i < 4; ++i) {
            if (word + i < words) {
              uint32_t* out = index + (word + i) / kWords * ld + (word + i) % kWords * kRows;
              _mm512_store_si512(out + pair * kLanes, halves[2 * i]);
              _mm512_store_si512(out + (kPairs + pair) * kLanes, halves[2 * i + 1]);
            }
          }
        });
  }

  static ONEBIT_INLINE __m512i sums_of_5(const int16_t* x) {
    __m512i t = _mm512_maskz_set1_epi16(0xaaaaaaaau, x[0]);
    t = _mm512_mask_add_epi16(t, 0xccccccccu, t, _mm512_set1_epi16(x[1]));
    t = _mm512_mask_add_epi16(t, 0xf0f0f0f0u, t, _mm512_set1_epi16(x[2]));
    t = _mm512_mask_add_epi16(t, 0xff00ff00u, t, _mm512_set1_epi16(x[3]));
    return _mm512_mask_add_epi16(t, 0xffff0000u, t, _mm512_set1_epi16(x[4]));
  }

  // Tables of one group for row m of a tile of kM rows.
  template <int kM, int kWords>
  static ONEBIT_INLINE void build(const int16_t* x, int m, float* table) {
    for (int half = 0; half < 2 * kWords; ++half) {
      float* t = table + (half * kM + m) * kHalfTable;
      const int16_t* u = x + 16 * half;
      const __m512i sums = sums_of_5(u);
      _mm512_store_si512(t, sums);
      _mm512_store_si512(t + 16, _mm512_add_epi16(sums, _mm512_set1_epi16(u[5])));
      _mm512_store_si512(t + 32, sums_of_5(u + 6));
      _mm512_store_si512(t + 48, sums_of_5(u + 11));
    }
  }

  static ONEBIT_INLINE void keep(__m512i& v) { asm("" : "+v"(v)); }

  // emit(r, v): v[m] = the sums of one group of row m of x where the bits of the rows of vector r
  // are set, as int32.
  template <int kM, int kWords, bool = true, class Emit>
  static ONEBIT_INLINE void tile(const uint32_t* index,
                                 const float* table,
                                 const int32_t*,
                                 const Emit& emit) {
    const __m512i by_6 = _mm512_set1_epi16(1 << 10), by_11 = _mm512_set1_epi16(1 << 5);
    __m512i acc[kM][kPairs];
    ONEBIT_UNROLL
    for (int m = 0; m < kM; ++m) {
      ONEBIT_UNROLL
      for (int r = 0; r < kPairs; ++r) acc[m][r] = _mm512_setzero_si512();
    }
    ONEBIT_NO_UNROLL
    for (int half = 0; half < 2 * kWords;
         ++half, index += kPairs * kLanes, table += kM * kHalfTable) {
      __m512i w[kPairs], shifted[kPairs];
      ONEBIT_UNROLL
      for (int r = 0; r < kPairs; ++r) w[r] = _mm512_loadu_si512(index + r * 16);
      ONEBIT_UNROLL
      for (int m = 0; m < kM; ++m) {
        __m512i low = _mm512_load_si512(table + m * kHalfTable);
        __m512i high = _mm512_load_si512(table + m * kHalfTable + 16);
        keep(low);
        keep(high);
        ONEBIT_UNROLL
        for (int r = 0; r < kPairs; ++r) {
          acc[m][r] = _mm512_add_epi16(acc[m][r], _mm512_permutex2var_epi16(low, w[r], high));
          keep(acc[m][r]);
        }
      }
      ONEBIT_UNROLL
      for (int part = 0; part < 2; ++part) {
        ONEBIT_UNROLL
        for (int r = 0; r < kPairs; ++r) {
          shifted[r] = _mm512_mulhi_epu16(w[r], part ? by_11 : by_6);
        }
        ONEBIT_UNROLL
        for (int m = 0; m < kM; ++m) {
          __m512i sums = _mm512_load_si512(table + m * kHalfTable + 32 + 16 * part);
          keep(sums);
          ONEBIT_UNROLL
          for (int r = 0; r < kPairs; ++r) {
            acc[m][r] = _mm512_add_epi16(acc[m][r], _mm512_permutexvar_epi16(shifted[r], sums));
            keep(acc[m][r]);
          }
        }
      }
    }
    ONEBIT_UNROLL
    for (int r = 0; r < kPairs; ++r) {
      __m512i sums[kM];
      ONEBIT_UNROLL
      for (int m = 0; m < kM; ++m) sums[m] = _mm512_madd_epi16(acc[m][r], _mm512_set1_epi32(1));
      emit(2 * r, sums);
      ONEBIT_UNROLL
      for (int m = 0; m < kM; ++m) sums[m] = Base::upper_rows(acc[m][r]);
      emit(2 * r + 1, sums);
    }
  }
};

}  // namespace
}  // namespace onebit::cpu

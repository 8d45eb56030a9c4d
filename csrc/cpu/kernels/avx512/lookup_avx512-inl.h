// Subset sums of 5 activations, 32 to a table, sit in two registers, and vpermt2ps looks them up
// with the 5 weight bits of 16 output rows: 80 multiply-adds for one shuffle and one add, where an
// FMA does 16. Per 16 columns of a row: bits 0-4, 5-9, 10-14. vpmulhuw brings the last two down and
// vpmaddwd the upper row of a pair: shifts would compete with the shuffles for their ports (158
// against 172 GMAC/s at 4 rows of x, Zen 4). Bits 15 of a group are collected in one more vector.
#pragma once

#include "pairs_avx512-inl.h"

namespace onebit::cpu {
namespace {

// One group of x in fixed point: 0 where the bit is clear.
struct Integers {
  using Vec = Avx512::Vec;
  using Sum = __m512i;

  ONEBIT_INLINE explicit Integers(const int32_t* values) : x(values) {}
  // t + column i, as set in these lanes and as clear in the others.
  ONEBIT_INLINE Vec add(__mmask16 lanes, Vec t, int i) const {
    const __m512i v = _mm512_castps_si512(t);
    return _mm512_castsi512_ps(_mm512_mask_add_epi32(v, lanes, v, _mm512_set1_epi32(x[i])));
  }
  static ONEBIT_INLINE Vec sum(Vec a, Vec b) {
    return _mm512_castsi512_ps(_mm512_add_epi32(_mm512_castps_si512(a), _mm512_castps_si512(b)));
  }
  static ONEBIT_INLINE Vec start(const int32_t* group, int m) {
    return _mm512_castsi512_ps(_mm512_set1_epi32(-group[m]));
  }
  static ONEBIT_INLINE Sum result(Vec v) { return _mm512_castps_si512(v); }

  const int32_t* x;
};

// Floats, one for a set bit and one for a clear one.
struct Chosen {
  using Vec = Avx512::Vec;
  using Sum = Vec;

  ONEBIT_INLINE Vec add(__mmask16 lanes, Vec t, int i) const {
    return _mm512_add_ps(
        t, _mm512_mask_mov_ps(_mm512_set1_ps(clear[i]), lanes, _mm512_set1_ps(set[i])));
  }
  static ONEBIT_INLINE Vec sum(Vec a, Vec b) { return _mm512_add_ps(a, b); }
  static ONEBIT_INLINE Vec start(const int32_t*, int) { return _mm512_setzero_ps(); }
  static ONEBIT_INLINE Sum result(Vec v) { return v; }

  const float *clear, *set;
};

// kVectors * 16 output rows in a tile. Numbers_: what is summed, Integers or Chosen.
template <int kVectors_, class Numbers_>
struct LookupAvx512 : PairsAvx512<kVectors_ / 2> {
  using Base = PairsAvx512<kVectors_ / 2>;
  using Avx512::kLanes, Avx512::zero;
  using Base::collect_bits, Base::kPairs, Base::upper_rows;
  using typename Avx512::Vec;
  using Numbers = Numbers_;
  using Integer = int32_t;
  static constexpr int kVectors = kVectors_;
  static constexpr int kRows = kVectors * kLanes;
  static constexpr int kMaxM = 4;

  // words: 32-column words in a group.
  static constexpr int index_size(int words) { return words * kRows + kRows / 2; }
  static constexpr int table_size(int words) { return words * 6 * 32 + (words == 4 ? 2 : 1) * 16; }

  // Words of kRows rows, `words` of them per row, to index + group * ld.
  template <int kWords>
  static void pack_rows(
      const uint32_t* w, int64_t stride, int rows, int words, uint32_t* index, int64_t ld) {
    Base::for_quads(
        w, stride, rows, words,
        [&](int pair, int word, const __m512i(&halves)[8]) __attribute__((always_inline)) {
          ONEBIT_UNROLL
          for (int i = 0; i < 4; i += kWords) {
            if (word + i < words) {
              put<kWords>(halves + 2 * i, index + (word + i) / kWords * ld + pair * kLanes);
            }
          }
        });
  }

  // One group of one pair.
  template <int kWords>
  static ONEBIT_INLINE void put(const __m512i* halves, uint32_t* out) {
    __m512i spare = _mm512_setzero_si512();
    ONEBIT_UNROLL
    for (int h = 0; h < 2 * kWords; ++h, out += kPairs * kLanes) {
      _mm512_store_si512(out, halves[h]);
      const int bit = 2 * kWords - 1 - h;  // where collect_bits would put it, an operation less
      spare = _mm512_ternarylogic_epi32(_mm512_srli_epi16(halves[h], 15 - bit),
                                        _mm512_set1_epi16(int16_t(1 << bit)), spare, 0xea);
    }
    _mm512_store_si512(out, spare);
  }

  // The transpose of qmm_n: kRows columns from `column` on of up to 128 rows as one group of 4
  // words, bit = row. Rows past the end are 0.
  static void pack_columns(
      const uint32_t* w, int64_t stride, int64_t column, int rows, uint32_t* index) {
    __m512i v[kVectors][4];
    ONEBIT_UNROLL
    for (int i = 0; i < 4; ++i) {
      ONEBIT_UNROLL
      for (int r = 0; r < kVectors; ++r) v[r][i] = _mm512_setzero_si512();
      const int count = rows - 32 * i < 32 ? rows - 32 * i : 32;
      const char* p = reinterpret_cast<const char*>(w + 32 * i * stride) + column / 8;
      __m512i bit = _mm512_set1_epi32(1);
      ONEBIT_NO_UNROLL
      for (int j = 0; j < count; ++j, p += 4 * stride) {
        ONEBIT_UNROLL
        for (int r = 0; r < kVectors; ++r) {
          __mmask16 lanes;
          std::memcpy(&lanes, p + 2 * r, sizeof lanes);
          v[r][i] = _mm512_mask_or_epi32(v[r][i], lanes, v[r][i], bit);
        }
        bit = _mm512_add_epi32(bit, bit);
      }
    }
    ONEBIT_UNROLL
    for (int pair = 0; pair < kPairs; ++pair) {
      const __m512i* a = v[2 * pair];
      const __m512i* b = v[2 * pair + 1];
      __m512i halves[8];
      ONEBIT_UNROLL
      for (int i = 0; i < 4; ++i) {
        constexpr __mmask32 kUpper = 0xaaaaaaaa;
        halves[2 * i] = _mm512_mask_mov_epi16(a[i], kUpper, _mm512_slli_epi32(b[i], 16));
        halves[2 * i + 1] = _mm512_mask_mov_epi16(_mm512_srli_epi32(a[i], 16), kUpper, b[i]);
      }
      put<4>(halves, index + pair * kLanes);
    }
  }

  // Column d may be absent: -1.
  static ONEBIT_INLINE Vec sums_of_4(const Numbers& x, int a, int b, int c, int d) {
    Vec t = x.add(0xaaaa, zero(), a);
    t = x.add(0xcccc, t, b);
    if (c >= 0) t = x.add(0xf0f0, t, c);
    return d >= 0 ? x.add(0xff00, t, d) : t;
  }

  // Tables of one group for row m of a tile of kM rows.
  template <int kM, int kWords>
  static ONEBIT_INLINE void build(const Numbers& x, int m, float* table) {
    float* t = table + m * 32;
    ONEBIT_NO_UNROLL
    for (int half = 0; half < 2 * kWords; ++half) {
      ONEBIT_UNROLL
      for (int i = 0; i < 15; i += 5, t += kM * 32) {
        const int c = half * 16 + i;
        const Vec sums = sums_of_4(x, c, c + 1, c + 2, c + 3);
        _mm512_store_ps(t, x.add(0, sums, c + 4));
        _mm512_store_ps(t + 16, x.add(0xffff, sums, c + 4));
      }
    }
    t = table + kWords * 6 * 32 * kM + m * 16;
    if (kWords == 4) {
      _mm512_store_ps(t, sums_of_4(x, 127, 111, 95, 79));
      _mm512_store_ps(t + kM * 16, sums_of_4(x, 63, 47, 31, 15));
    } else if (kWords == 2) {
      _mm512_store_ps(t, sums_of_4(x, 63, 47, 31, 15));
    } else {
      _mm512_store_ps(t, sums_of_4(x, 31, 15, -1, -1));
    }
  }

  // The value is opaque to the compiler, which would otherwise spill accumulators (GCC 12).
  static ONEBIT_INLINE void keep(Vec& v) { asm("" : "+v"(v)); }

  template <int kM>
  static ONEBIT_INLINE void look_up_5(const float* t,
                                      const __m512i (&index)[kPairs],
                                      Vec (&acc)[kM][kVectors]) {
    __m512i upper[kPairs];
    ONEBIT_UNROLL
    for (int p = 0; p < kPairs; ++p) upper[p] = upper_rows(index[p]);
    ONEBIT_UNROLL
    for (int m = 0; m < kM; ++m) {
      Vec low = _mm512_load_ps(t + m * 32), high = _mm512_load_ps(t + m * 32 + 16);
      keep(low);
      keep(high);
      ONEBIT_UNROLL
      for (int r = 0; r < kVectors; ++r) {
        const __m512i i = r % 2 ? upper[r / 2] : index[r / 2];
        acc[m][r] = Numbers::sum(acc[m][r], _mm512_permutex2var_ps(low, i, high));
        keep(acc[m][r]);
      }
    }
  }

  template <int kM>
  static ONEBIT_INLINE void look_up_4(const float* t,
                                      const __m512i (&index)[kPairs],
                                      Vec (&acc)[kM][kVectors]) {
    __m512i upper[kPairs];
    ONEBIT_UNROLL
    for (int p = 0; p < kPairs; ++p) upper[p] = upper_rows(index[p]);
    ONEBIT_UNROLL
    for (int m = 0; m < kM; ++m) {
      const Vec sums = _mm512_load_ps(t + m * 16);
      ONEBIT_UNROLL
      for (int r = 0; r < kVectors; ++r) {
        const __m512i i = r % 2 ? upper[r / 2] : index[r / 2];
        acc[m][r] = Numbers::sum(acc[m][r], _mm512_permutexvar_ps(i, sums));
        keep(acc[m][r]);
      }
    }
  }

  // emit(r, v): v[m] = the sums of one group of row m of x with the weight bits of the rows of
  // vector r; of Integers, doubled, the sums less those of the whole group, `group`. Without
  // kSpareStored, `index` ends before the collected bits.
  template <int kM, int kWords, bool kSpareStored = true, class Emit>
  static ONEBIT_INLINE void tile(const uint32_t* index,
                                 const float* table,
                                 const int32_t* group,
                                 const Emit& emit) {
    Vec acc[kM][kVectors];
    const __m512i by_5 = _mm512_set1_epi16(1 << 11), by_10 = _mm512_set1_epi16(1 << 6);
    ONEBIT_UNROLL
    for (int m = 0; m < kM; ++m) {
      ONEBIT_UNROLL
      for (int r = 0; r < kVectors; ++r) acc[m][r] = Numbers::start(group, m);
    }
    __m512i w[kPairs], shifted[kPairs], spare[kPairs];
    ONEBIT_UNROLL
    for (int p = 0; p < kPairs; ++p) spare[p] = _mm512_setzero_si512();
    ONEBIT_NO_UNROLL
    for (int half = 0; half < 2 * kWords; ++half, index += kPairs * kLanes, table += 3 * 32 * kM) {
      ONEBIT_UNROLL
      for (int p = 0; p < kPairs; ++p) {
        w[p] = _mm512_loadu_si512(index + p * kLanes);
        if (!kSpareStored) spare[p] = collect_bits(spare[p], w[p]);
      }
      look_up_5<kM>(table, w, acc);
      ONEBIT_UNROLL
      for (int p = 0; p < kPairs; ++p) shifted[p] = _mm512_mulhi_epu16(w[p], by_5);
      look_up_5<kM>(table + 32 * kM, shifted, acc);
      ONEBIT_UNROLL
      for (int p = 0; p < kPairs; ++p) shifted[p] = _mm512_mulhi_epu16(w[p], by_10);
      look_up_5<kM>(table + 64 * kM, shifted, acc);
    }
    if (kSpareStored) {
      ONEBIT_UNROLL
      for (int p = 0; p < kPairs; ++p) spare[p] = _mm512_load_si512(index + p * kLanes);
    }
    look_up_4<kM>(table, spare, acc);
    if (kWords == 4) {
      ONEBIT_UNROLL
      for (int p = 0; p < kPairs; ++p) spare[p] = _mm512_srli_epi16(spare[p], 4);
      look_up_4<kM>(table + 16 * kM, spare, acc);
    }
    ONEBIT_UNROLL
    for (int r = 0; r < kVectors; ++r) {
      typename Numbers::Sum sums[kM];
      ONEBIT_UNROLL
      for (int m = 0; m < kM; ++m) sums[m] = Numbers::result(acc[m][r]);
      emit(r, sums);
    }
  }
};

}  // namespace
}  // namespace onebit::cpu

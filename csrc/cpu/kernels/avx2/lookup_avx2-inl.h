// The 8 subset sums of 3 activations sit in one register, and vpermps looks them up with 3 weight
// bits of 8 output rows: 24 multiply-adds for one shuffle and one add. Of each word, 10 lookups
// take bits 0-29; bits 30 and 31 of a group's words are collected in one more vector when packing.
#pragma once

#include "avx2-inl.h"

namespace onebit::cpu {
namespace {

// One group of x in fixed point: 0 where the bit is clear.
struct Integers {
  using Vec = Avx2::Vec;
  using Sum = __m256i;

  ONEBIT_INLINE explicit Integers(const int32_t* values) : x(values) {}
  // Column i, as set in lanes of ones and as clear in the others.
  ONEBIT_INLINE Vec value(Vec lanes, int i) const {
    return _mm256_and_ps(lanes, _mm256_castsi256_ps(_mm256_set1_epi32(x[i])));
  }
  static ONEBIT_INLINE Vec sum(Vec a, Vec b) {
    return _mm256_castsi256_ps(_mm256_add_epi32(_mm256_castps_si256(a), _mm256_castps_si256(b)));
  }
  static ONEBIT_INLINE Vec start(const int32_t* group, int m) {
    return _mm256_castsi256_ps(_mm256_set1_epi32(-group[m]));
  }
  static ONEBIT_INLINE Sum result(Vec v) { return _mm256_castps_si256(v); }

  const int32_t* x;
};

// Floats, one for a set bit and one for a clear one.
struct Chosen {
  using Vec = Avx2::Vec;
  using Sum = Vec;

  ONEBIT_INLINE Vec value(Vec lanes, int i) const {
    return _mm256_blendv_ps(_mm256_set1_ps(clear[i]), _mm256_set1_ps(set[i]), lanes);
  }
  static ONEBIT_INLINE Vec sum(Vec a, Vec b) { return _mm256_add_ps(a, b); }
  static ONEBIT_INLINE Vec start(const int32_t*, int) { return _mm256_setzero_ps(); }
  static ONEBIT_INLINE Sum result(Vec v) { return v; }

  const float *clear, *set;
};

// kVectors * 8 output rows in a tile. Numbers_: what is summed, Integers or Chosen.
template <int kVectors_, class Numbers_>
struct LookupAvx2 : Avx2 {
  using Numbers = Numbers_;
  using Integer = int32_t;
  static constexpr int kVectors = kVectors_;
  static constexpr int kRows = kVectors * kLanes;
  static constexpr int kMaxM = 4;  // 8 accumulators, 2 indices, a table: 5 rows spill

  static constexpr int spare_lookups(int words) { return (2 * words + 2) / 3; }
  static constexpr int index_size(int words) { return (words + 1) * kRows; }
  static constexpr int table_size(int words) { return (words * 10 + spare_lookups(words)) * 8; }

  // Bits 30 and 31 of word i at bits 2i and 2i + 1.
  template <int kWords>
  static ONEBIT_INLINE __m256i spare_bits(const __m256i* w) {
    __m256i bits = _mm256_srli_epi32(w[0], 30);
    ONEBIT_UNROLL
    for (int i = 1; i < kWords; ++i) {
      bits = _mm256_or_si256(bits, _mm256_slli_epi32(_mm256_srli_epi32(w[i], 30), 2 * i));
    }
    return bits;
  }

  static ONEBIT_INLINE void put(uint32_t* p, __m256i v) {
    _mm256_store_si256(reinterpret_cast<__m256i*>(p), v);
  }
  static ONEBIT_INLINE __m256i get(const uint32_t* p) {
    return _mm256_load_si256(reinterpret_cast<const __m256i*>(p));
  }

  // Words of kRows rows, `words` of them per row, to index + group * ld.
  template <int kWords>
  static void pack_rows(
      const uint32_t* w, int64_t stride, int rows, int words, uint32_t* index, int64_t ld) {
    for (int r = 0; r < kVectors; ++r) {
      const int first_row = r * kLanes < rows ? r * kLanes : rows - 1;
      const char* p = reinterpret_cast<const char*>(w + first_row * stride);
      for (int word = 0; word < words; word += 4) {
        const int count = words - word < 4 ? words - word : 4;
        __m256i d[4];
        transpose_dwords(p + word * 4, stride * 4, rows - 1 - first_row, count * 4, d);
        ONEBIT_UNROLL
        for (int i = 0; i < 4; i += kWords) {
          if (i < count) {
            uint32_t* out = index + (word + i) / kWords * ld + r * kLanes;
            ONEBIT_UNROLL
            for (int j = 0; j < kWords; ++j) put(out + j * kRows, d[i + j]);
            put(out + kWords * kRows, spare_bits<kWords>(d + i));
          }
        }
      }
    }
  }

  // The transpose of qmm_n: kRows columns from `column` on of up to 128 rows as one group of 4
  // words, bit = row. Rows past the end are 0.
  static void pack_columns(
      const uint32_t* w, int64_t stride, int64_t column, int rows, uint32_t* index) {
    const __m256i lane = _mm256_setr_epi32(1, 2, 4, 8, 16, 32, 64, 128);
    for (int r = 0; r < kVectors; ++r) {
      __m256i words[4];
      for (int i = 0; i < 4; ++i) {
        words[i] = _mm256_setzero_si256();
        const int count = rows - 32 * i < 32 ? rows - 32 * i : 32;
        const auto* p = reinterpret_cast<const uint8_t*>(w + 32 * i * stride) + column / 8 + r;
        __m256i bit = _mm256_set1_epi32(1);
        for (int j = 0; j < count; ++j, p += 4 * stride) {
          const __m256i on =
              _mm256_cmpeq_epi32(_mm256_and_si256(_mm256_set1_epi32(*p), lane), lane);
          words[i] = _mm256_or_si256(words[i], _mm256_and_si256(on, bit));
          bit = _mm256_add_epi32(bit, bit);
        }
        put(index + i * kRows + r * kLanes, words[i]);
      }
      put(index + 4 * kRows + r * kLanes, spare_bits<4>(words));
    }
  }

  // Ones in the lanes whose number has the bit.
  static ONEBIT_INLINE Vec lanes_with(int bit) {
    const __m256i lane = _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7), b = _mm256_set1_epi32(bit);
    return _mm256_castsi256_ps(_mm256_cmpeq_epi32(_mm256_and_si256(lane, b), b));
  }
  // Columns b and c may be absent: -1.
  static ONEBIT_INLINE Vec sums_of_3(const Numbers& x, int a, int b, int c) {
    Vec t = x.value(lanes_with(1), a);
    if (b >= 0) t = Numbers::sum(t, x.value(lanes_with(2), b));
    return c >= 0 ? Numbers::sum(t, x.value(lanes_with(4), c)) : t;
  }

  // Tables of one group for row m of a tile of kM rows.
  template <int kM, int kWords>
  static ONEBIT_INLINE void build(const Numbers& x, int m, float* table) {
    float* t = table + m * 8;
    for (int word = 0; word < kWords; ++word) {
      for (int i = word * 32; i < word * 32 + 30; i += 3, t += kM * 8) {
        store(t, sums_of_3(x, i, i + 1, i + 2));
      }
    }
    const auto spare = [](int i) __attribute__((always_inline)) {
      return i < 2 * kWords ? i / 2 * 32 + 30 + i % 2 : -1;
    };
    ONEBIT_UNROLL
    for (int i = 0; i < 2 * kWords; i += 3, t += kM * 8) {
      store(t, sums_of_3(x, spare(i), spare(i + 1), spare(i + 2)));
    }
  }

  // Column j of a group in an index: bit_of(index + dword(j, r), bit(j, r)) for the rows of vector
  // r.
  static constexpr int dword(int column, int r) { return column / 32 * kRows + r * kLanes; }
  static constexpr int bit(int column, int) { return column % 32; }

  template <int kM>
  static ONEBIT_INLINE void look_up(const float* t,
                                    const __m256i (&index)[kVectors],
                                    Vec (&acc)[kM][kVectors]) {
    ONEBIT_UNROLL
    for (int m = 0; m < kM; ++m) {
      Vec sums = _mm256_load_ps(t + m * 8);
      asm("" : "+x"(sums));  // loaded once, not folded into every shuffle
      ONEBIT_UNROLL
      for (int r = 0; r < kVectors; ++r) {
        acc[m][r] = Numbers::sum(acc[m][r], _mm256_permutevar8x32_ps(sums, index[r]));
        asm("" : "+x"(acc[m][r]));  // in registers: GCC 12 spills them otherwise
      }
    }
  }

  template <int kM>
  static ONEBIT_INLINE const float* look_up_many(int count,
                                                 const float* t,
                                                 const uint32_t* index,
                                                 Vec (&acc)[kM][kVectors]) {
    __m256i w[kVectors];
    ONEBIT_UNROLL
    for (int r = 0; r < kVectors; ++r) w[r] = get(index + r * kLanes);
    ONEBIT_NO_UNROLL
    for (int i = 0; i < count; ++i, t += 8 * kM) {
      look_up<kM>(t, w, acc);
      ONEBIT_UNROLL
      for (int r = 0; r < kVectors; ++r) w[r] = _mm256_srli_epi32(w[r], 3);
    }
    return t;
  }

  // emit(r, v): v[m] = the sums of one group of row m of x with the weight bits of the rows of
  // vector r; of Integers, doubled, the sums less those of the whole group, `group`.
  template <int kM, int kWords, bool = true, class Emit>
  static ONEBIT_INLINE void tile(const uint32_t* index,
                                 const float* table,
                                 const int32_t* group,
                                 const Emit& emit) {
    Vec acc[kM][kVectors];
    ONEBIT_UNROLL
    for (int m = 0; m < kM; ++m) {
      ONEBIT_UNROLL
      for (int r = 0; r < kVectors; ++r) acc[m][r] = Numbers::start(group, m);
    }
    ONEBIT_NO_UNROLL
    for (int word = 0; word < kWords; ++word, index += kRows) {
      table = look_up_many<kM>(10, table, index, acc);
    }
    look_up_many<kM>(spare_lookups(kWords), table, index, acc);
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

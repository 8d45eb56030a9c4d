// Exact float32 by table lookup: the 8 subset sums of 3 activations sit in one register, and
// vpermps looks them up with 3 weight bits of 8 output rows: 24 multiply-adds for one shuffle and
// one add. Of each word, 10 lookups take bits 0-29; bits 30 and 31 of a group's words are collected
// in one more vector when packing.
#pragma once

#include "avx2-inl.h"

namespace onebit::cpu {
namespace {

// kVectors * 8 output rows in a tile.
template <int kVectors_>
struct LookupAvx2 : Avx2 {
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

  // v in the lanes whose number has the bit, 0 in the others.
  static ONEBIT_INLINE Vec in_lanes(float v, int bit) {
    const __m256i lane = _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7), b = _mm256_set1_epi32(bit);
    return _mm256_and_ps(set(v),
                         _mm256_castsi256_ps(_mm256_cmpeq_epi32(_mm256_and_si256(lane, b), b)));
  }
  static ONEBIT_INLINE Vec sums_of_3(float a, float b, float c) {
    return add(add(in_lanes(a, 1), in_lanes(b, 2)), in_lanes(c, 4));
  }

  // Tables of one group for row m of a tile of kM rows.
  template <int kM, int kWords>
  static ONEBIT_INLINE void build(const float* x, int m, float* table) {
    float* t = table + m * 8;
    for (int word = 0; word < kWords; ++word) {
      for (int i = 0; i < 30; i += 3, t += kM * 8) {
        store(t, sums_of_3(x[word * 32 + i], x[word * 32 + i + 1], x[word * 32 + i + 2]));
      }
    }
    const auto spare = [&](int i) __attribute__((always_inline)) {
      return i < 2 * kWords ? x[i / 2 * 32 + 30 + i % 2] : 0.0f;
    };
    ONEBIT_UNROLL
    for (int i = 0; i < 2 * kWords; i += 3, t += kM * 8) {
      store(t, sums_of_3(spare(i), spare(i + 1), spare(i + 2)));
    }
  }

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
        acc[m][r] = add(acc[m][r], _mm256_permutevar8x32_ps(sums, index[r]));
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

  // emit(m, r, v): v = the sum of the activations of one group where the row's bit is set, for the
  // rows of vector r.
  template <int kM, int kWords, class Emit>
  static ONEBIT_INLINE void tile(const uint32_t* index, const float* table, const Emit& emit) {
    Vec acc[kM][kVectors];
    ONEBIT_UNROLL
    for (int m = 0; m < kM; ++m) {
      ONEBIT_UNROLL
      for (int r = 0; r < kVectors; ++r) acc[m][r] = zero();
    }
    ONEBIT_NO_UNROLL
    for (int word = 0; word < kWords; ++word, index += kRows) {
      table = look_up_many<kM>(10, table, index, acc);
    }
    look_up_many<kM>(spare_lookups(kWords), table, index, acc);
    ONEBIT_UNROLL
    for (int m = 0; m < kM; ++m) {
      ONEBIT_UNROLL
      for (int r = 0; r < kVectors; ++r) emit(m, r, acc[m][r]);
    }
  }
};

}  // namespace
}  // namespace onebit::cpu

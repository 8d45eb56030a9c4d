// Activations of 16 bits by int16 tables: the 16 subset sums of 4 activations as a register of
// their low bytes and one of their high bytes, looked up by two tbl for 16 output rows at once. Low
// bytes are added in 16 bits, high bytes in their own: five instructions for 64 multiply-adds.
// sdot, of signed bytes, would take two for 16, and bits would have to become bytes first.
#pragma once

#include "neon-inl.h"

namespace onebit::cpu {
namespace {

// kBlocks * 16 output rows in a tile. A byte of an index vector is 8 columns of a row; byte c of
// dword i is row 4 c + i, so that sums widen to vectors of 4 rows in place.
template <int kBlocks_>
struct LookupNeonInt16 : Neon {
  using Integer = int16_t;
  using Numbers = const int16_t*;
  static constexpr int kBlocks = kBlocks_;
  static constexpr int kVectors = 4 * kBlocks;
  static constexpr int kRows = kVectors * kLanes;
  static constexpr int kMaxM = 4;    // 24 accumulators of the 32 registers in 2 blocks
  static constexpr int kTable = 16;  // of 8 columns, in floats: low and high bytes of 2 * 16 sums

  static constexpr int index_size(int words) { return words * kRows; }
  static constexpr int table_size(int words) { return words * 4 * kTable; }

  // Four words of four rows as they are to one of the rows for each word.
  static ONEBIT_INLINE void transpose_words(const uint32x4_t* rows, uint32x4_t* words) {
    const auto doubled = [](uint32x4_t v) { return vreinterpretq_u64_u32(v); };
    const auto a = doubled(vtrn1q_u32(rows[0], rows[1])), b = doubled(vtrn2q_u32(rows[0], rows[1]));
    const auto c = doubled(vtrn1q_u32(rows[2], rows[3])), d = doubled(vtrn2q_u32(rows[2], rows[3]));
    words[0] = vreinterpretq_u32_u64(vtrn1q_u64(a, c));
    words[1] = vreinterpretq_u32_u64(vtrn1q_u64(b, d));
    words[2] = vreinterpretq_u32_u64(vtrn2q_u64(a, c));
    words[3] = vreinterpretq_u32_u64(vtrn2q_u64(b, d));
  }

  // bytes[j]: byte c of dword i is byte j of dword i of words[c].
  static ONEBIT_INLINE void transpose_bytes(const uint32x4_t* words, uint32x4_t* bytes) {
    const auto small = [](uint32x4_t v) { return vreinterpretq_u8_u32(v); };
    const auto pairs = [](uint8x16_t v) { return vreinterpretq_u16_u8(v); };
    const uint16x8_t even[2] = {pairs(vtrn1q_u8(small(words[0]), small(words[1]))),
                                pairs(vtrn1q_u8(small(words[2]), small(words[3])))};
    const uint16x8_t odd[2] = {pairs(vtrn2q_u8(small(words[0]), small(words[1]))),
                               pairs(vtrn2q_u8(small(words[2]), small(words[3])))};
    bytes[0] = vreinterpretq_u32_u16(vtrn1q_u16(even[0], even[1]));
    bytes[1] = vreinterpretq_u32_u16(vtrn1q_u16(odd[0], odd[1]));
    bytes[2] = vreinterpretq_u32_u16(vtrn2q_u16(even[0], even[1]));
    bytes[3] = vreinterpretq_u32_u16(vtrn2q_u16(odd[0], odd[1]));
  }

  // Words of kRows rows, `words` of them per row, to index + group * ld.
  template <int kWords>
  static void pack_rows(
      const uint32_t* w, int64_t stride, int rows, int words, uint32_t* index, int64_t ld) {
    for (int block = 0; block < kBlocks; ++block) {
      for (int word = 0; word < words; word += 4) {
        const int count = words - word < 4 ? words - word : 4;
        uint32x4_t four[4][4];  // [word][c]
        ONEBIT_UNROLL
        for (int c = 0; c < 4; ++c) {
          uint32x4_t from[4], to[4];
          ONEBIT_UNROLL
          for (int i = 0; i < 4; ++i) {
            const int row = block * 16 + c * 4 + i;
            const uint32_t* p = w + (row < rows ? row : rows - 1) * stride + word;
            if (count == 4) {
              from[i] = vld1q_u32(p);
            } else {
              uint32_t part[4] = {};
              std::memcpy(part, p, count * 4);
              from[i] = vld1q_u32(part);
            }
          }
          transpose_words(from, to);
          ONEBIT_UNROLL
          for (int i = 0; i < 4; ++i) four[i][c] = to[i];
        }
        for (int i = 0; i < count; ++i) {
          uint32x4_t bytes[4];
          transpose_bytes(four[i], bytes);
          uint32_t* out = index + (word + i) / kWords * ld + (word + i) % kWords * kRows;
          ONEBIT_UNROLL
          for (int j = 0; j < 4; ++j) vst1q_u32(out + (j * kBlocks + block) * 4, bytes[j]);
        }
      }
    }
  }

  // Low bytes of the 16 sums of 4 values, then their high bytes.
  static ONEBIT_INLINE void sums_of_4(const int16_t* x, uint8_t* out) {
    const uint16x8_t lane = {0, 1, 2, 3, 4, 5, 6, 7};
    const auto in_lanes = [&](int i) __attribute__((always_inline)) {
      return vandq_s16(vdupq_n_s16(x[i]),
                       vreinterpretq_s16_u16(vtstq_u16(lane, vdupq_n_u16(uint16_t(1 << i)))));
    };
    const int16x8_t first = vaddq_s16(vaddq_s16(in_lanes(0), in_lanes(1)), in_lanes(2));
    const int16x8_t second = vaddq_s16(first, vdupq_n_s16(x[3]));
    const uint8x16_t a = vreinterpretq_u8_s16(first), b = vreinterpretq_u8_s16(second);
    vst1q_u8(out, vuzp1q_u8(a, b));
    vst1q_u8(out + 16, vuzp2q_u8(a, b));
  }

  // Column j of a group in an index: bit_of(index + dword(j, r), bit(j, r)) for the rows of vector
  // r.
  static constexpr int dword(int column, int r) { return (column / 8 * kBlocks + r / 4) * kLanes; }
  static constexpr int bit(int column, int r) { return r % 4 * 8 + column % 8; }

  // Tables of one group for row m of a tile of kM rows.
  template <int kM, int kWords>
  static ONEBIT_INLINE void build(const int16_t* x, int m, float* table) {
    ONEBIT_NO_UNROLL
    for (int i = 0; i < 4 * kWords; ++i) {
      auto* t = reinterpret_cast<uint8_t*>(table + (i * kM + m) * kTable);
      sums_of_4(x + 8 * i, t);
      sums_of_4(x + 8 * i + 4, t + 32);
    }
  }

  // emit(r, v): v[m] = the sums of one group of row m of x where the bits of the rows of vector r
  // are set, as int32.
  template <int kM, int kWords, bool = true, class Emit>
  static ONEBIT_INLINE void tile(const uint32_t* index,
                                 const float* table,
                                 const int32_t*,
                                 const Emit& emit) {
    uint16x8_t low[kM][kBlocks][2];  // of up to 32 bytes
    uint8x16_t high[kM][kBlocks];
    ONEBIT_UNROLL
    for (int m = 0; m < kM; ++m) {
      ONEBIT_UNROLL
      for (int b = 0; b < kBlocks; ++b) {
        low[m][b][0] = low[m][b][1] = vdupq_n_u16(0);
        high[m][b] = vdupq_n_u8(0);
      }
    }
    ONEBIT_NO_UNROLL
    for (int i = 0; i < 4 * kWords; ++i, index += kBlocks * 4, table += kM * kTable) {
      ONEBIT_UNROLL
      for (int part = 0; part < 2; ++part) {
        uint8x16_t w[kBlocks];
        ONEBIT_UNROLL
        for (int b = 0; b < kBlocks; ++b) {
          w[b] = vreinterpretq_u8_u32(vld1q_u32(index + b * 4));
          w[b] = part ? vshrq_n_u8(w[b], 4) : vandq_u8(w[b], vdupq_n_u8(15));
        }
        ONEBIT_UNROLL
        for (int m = 0; m < kM; ++m) {
          const auto* t = reinterpret_cast<const uint8_t*>(table + m * kTable) + part * 32;
          const uint8x16_t lows = vld1q_u8(t), highs = vld1q_u8(t + 16);
          ONEBIT_UNROLL
          for (int b = 0; b < kBlocks; ++b) {
            const uint8x16_t bytes = vqtbl1q_u8(lows, w[b]);
            low[m][b][0] = vaddw_u8(low[m][b][0], vget_low_u8(bytes));
            low[m][b][1] = vaddw_high_u8(low[m][b][1], bytes);
            high[m][b] = vaddq_u8(high[m][b], vqtbl1q_u8(highs, w[b]));
          }
        }
      }
    }
    ONEBIT_UNROLL
    for (int b = 0; b < kBlocks; ++b) {
      // Rows 4 c + i: in dword i, c = 0 and 2 of `even`, 1 and 3 of `odd`.
      int32x4_t even[kM], odd[kM], sums[kM];
      ONEBIT_UNROLL
      for (int m = 0; m < kM; ++m) {
        const uint16x8_t first = vaddq_u16(low[m][b][0], vshll_n_u8(vget_low_u8(high[m][b]), 8));
        const uint16x8_t second = vaddq_u16(low[m][b][1], vshll_high_n_u8(high[m][b], 8));
        even[m] = vreinterpretq_s32_u16(vuzp1q_u16(first, second));
        odd[m] = vreinterpretq_s32_u16(vuzp2q_u16(first, second));
      }
      const auto emit_from = [&](int r, const int32x4_t(&z)[kM],
                                 bool lower) __attribute__((always_inline)) {
        ONEBIT_UNROLL
        for (int m = 0; m < kM; ++m) {
          sums[m] = vshrq_n_s32(lower ? vshlq_n_s32(z[m], 16) : z[m], 16);
        }
        emit(4 * b + r, sums);
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

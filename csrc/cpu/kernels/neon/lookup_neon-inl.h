// Lookups by tbl: the 16 subset sums of 4 activations in fixed point, a register for each of their
// bytes, are looked up for 16 output rows at once. Bytes are added in 16 bits, the highest ones in
// their own: three instructions for each byte but that, for 64 multiply-adds, which takes two.
// sdot, of signed bytes, would take one for 16 of each byte, and bits would have to become bytes
// first.
#pragma once

#include "neon-inl.h"

namespace onebit::cpu {
namespace {

// kBlocks * 16 output rows in a tile. A byte of an index vector is 8 columns of a row; byte c of
// dword i is row 4 c + i, so that sums widen to vectors of 4 rows in place.
template <int kBlocks_, class Integer_>
struct LookupNeon : Neon {
  using Integer = Integer_;
  using Numbers = const Integer*;
  static constexpr int kBytes = sizeof(Integer);
  static constexpr int kBlocks = kBlocks_;
  static constexpr int kVectors = 4 * kBlocks;
  static constexpr int kRows = kVectors * kLanes;
  static constexpr int kMaxM = 4;
  static constexpr int kTable = 8 * kBytes;  // of 8 columns, in floats: the bytes of 2 * 16 sums

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

  // The transpose of qmm_n: kRows columns from `column` on of up to 128 rows as one group of 4
  // words, bit = row. Rows past the end are 0.
  static void pack_columns(
      const uint32_t* w, int64_t stride, int64_t column, int rows, uint32_t* index) {
    for (int i = 0; i < 4 * kRows; ++i) index[i] = 0;
    for (int j = 0; j < rows; ++j) {
      const uint32_t bits = w[j * stride + column / kWordBits] >> column % kWordBits;
      for (int r = 0; r < kRows; ++r) {
        index[dword(j, r / kLanes) + r % kLanes] |= (bits >> r & 1u) << bit(j, r / kLanes);
      }
    }
  }

  // Each byte of the 16 sums of 4 values, the lowest first.
  static ONEBIT_INLINE void sums_of_4(const int16_t* x, uint8_t* out) {
    const uint16x8_t lane = {0, 1, 2, 3, 4, 5, 6, 7};
    const auto in_lanes = [&](int i) __attribute__((always_inline)) {
      return vandq_s16(vdupq_n_s16(x[i]),
                       vreinterpretq_s16_u16(vtstq_u16(lane, vdupq_n_u16(uint16_t(1 << i)))));
    };
    const int16x8_t first = vaddq_s16(vaddq_s16(in_lanes(0), in_lanes(1)), in_lanes(2));
    const int16x8_t second = vaddq_s16(first, vdupq_n_s16(x[3]));
    store_bytes(vreinterpretq_u8_s16(first), vreinterpretq_u8_s16(second), out);
  }
  static ONEBIT_INLINE void sums_of_4(const int32_t* x, uint8_t* out) {
    const int32x4_t odd = {0, -1, 0, -1}, upper = {0, 0, -1, -1};
    int32x4_t sums[4];
    sums[0] = vaddq_s32(vandq_s32(vdupq_n_s32(x[0]), odd), vandq_s32(vdupq_n_s32(x[1]), upper));
    sums[1] = vaddq_s32(sums[0], vdupq_n_s32(x[2]));
    sums[2] = vaddq_s32(sums[0], vdupq_n_s32(x[3]));
    sums[3] = vaddq_s32(sums[1], vdupq_n_s32(x[3]));
    uint16x8_t half[4];
    for (int i = 0; i < 4; ++i) half[i] = vreinterpretq_u16_s32(sums[i]);
    for (int i = 0; i < 2; ++i) {
      const auto of = [i](uint16x8_t a, uint16x8_t b) {
        return vreinterpretq_u8_u16(i ? vuzp2q_u16(a, b) : vuzp1q_u16(a, b));
      };
      store_bytes(of(half[0], half[1]), of(half[2], half[3]), out + 32 * i);
    }
  }
  static ONEBIT_INLINE void store_bytes(uint8x16_t a, uint8x16_t b, uint8_t* out) {
    vst1q_u8(out, vuzp1q_u8(a, b));
    vst1q_u8(out + 16, vuzp2q_u8(a, b));
  }

  // Column j of a group in an index: bit_of(index + dword(j, r), bit(j, r)) for the rows of vector
  // r.
  static constexpr int dword(int column, int r) { return (column / 8 * kBlocks + r / 4) * kLanes; }
  static constexpr int bit(int column, int r) { return r % 4 * 8 + column % 8; }

  // Tables of one group for row m of a tile of kM rows.
  template <int kM, int kWords>
  static ONEBIT_INLINE void build(const Integer* x, int m, float* table) {
    ONEBIT_NO_UNROLL
    for (int i = 0; i < 4 * kWords; ++i) {
      auto* t = reinterpret_cast<uint8_t*>(table + (i * kM + m) * kTable);
      sums_of_4(x + 8 * i, t);
      sums_of_4(x + 8 * i + 4, t + 16 * kBytes);
    }
  }

  // emit(r, v): v[m] = the sums of one group of row m of x where the bits of the rows of vector r
  // are set; of int32, which are doubled, less the sum of the whole group, `group`.
  template <int kM, int kWords, bool = true, class Emit>
  static ONEBIT_INLINE void tile(const uint32_t* index,
                                 const float* table,
                                 const int32_t* group,
                                 const Emit& emit) {
    uint16x8_t low[kM][kBlocks][kBytes - 1][2];  // of up to 32 bytes
    uint8x16_t high[kM][kBlocks];
    ONEBIT_UNROLL
    for (int m = 0; m < kM; ++m) {
      ONEBIT_UNROLL
      for (int b = 0; b < kBlocks; ++b) {
        ONEBIT_UNROLL
        for (int i = 0; i < kBytes - 1; ++i) low[m][b][i][0] = low[m][b][i][1] = vdupq_n_u16(0);
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
          const auto* t = reinterpret_cast<const uint8_t*>(table + m * kTable) + part * 16 * kBytes;
          ONEBIT_UNROLL
          for (int j = 0; j < kBytes; ++j) {
            const uint8x16_t sums = vld1q_u8(t + 16 * j);
            ONEBIT_UNROLL
            for (int b = 0; b < kBlocks; ++b) {
              const uint8x16_t bytes = vqtbl1q_u8(sums, w[b]);
              if (j == kBytes - 1) {
                high[m][b] = vaddq_u8(high[m][b], bytes);
              } else {
                auto& to = low[m][b][j];
                to[0] = vaddw_u8(to[0], vget_low_u8(bytes));
                to[1] = vaddw_high_u8(to[1], bytes);
              }
            }
          }
        }
      }
    }
    ONEBIT_UNROLL
    for (int b = 0; b < kBlocks; ++b) {
      uint32x4_t sums[kM][4];
      ONEBIT_UNROLL
      for (int m = 0; m < kM; ++m) {
        uint32x4_t by_dword[4];
        auto& top = low[m][b][kBytes - 2];
        top[0] = vaddq_u16(top[0], vshll_n_u8(vget_low_u8(high[m][b]), 8));
        top[1] = vaddq_u16(top[1], vshll_high_n_u8(high[m][b], 8));
        ONEBIT_UNROLL
        for (int i = 0; i < 4; ++i) by_dword[i] = joined(low[m][b], i);
        transpose_words(by_dword, sums[m]);
      }
      ONEBIT_UNROLL
      for (int c = 0; c < 4; ++c) {
        int32x4_t v[kM];
        ONEBIT_UNROLL
        for (int m = 0; m < kM; ++m) {
          v[m] = vreinterpretq_s32_u32(sums[m][c]);
          if (kBytes == 4) v[m] = vsubq_s32(v[m], vdupq_n_s32(group[m]));
        }
        emit(4 * b + c, v);
      }
    }
  }

  // Sums 4 i to 4 i + 3 of a block; the highest of `low` has the highest bytes in it.
  static ONEBIT_INLINE uint32x4_t joined(const uint16x8_t (&low)[kBytes - 1][2], int i) {
    const auto of = [&](int j) __attribute__((always_inline)) {
      return i % 2 ? vget_high_u16(low[j][i / 2]) : vget_low_u16(low[j][i / 2]);
    };
    if constexpr (kBytes == 2) {
      return vreinterpretq_u32_s32(vmovl_s16(vreinterpret_s16_u16(of(0))));
    } else {
      const uint32x4_t lower = vaddq_u32(vmovl_u16(of(0)), vshll_n_u16(of(1), 8));
      return vaddq_u32(lower, vshll_n_u16(of(2), 16));
    }
  }
};

}  // namespace
}  // namespace onebit::cpu

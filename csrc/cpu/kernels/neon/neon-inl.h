// NEON vectors of 4 floats.
#pragma once

#include "../float_types.h"
#include "../kernels.h"
#include "../target.h"

namespace onebit::cpu {
namespace {

struct Neon {
  using Vec = float32x4_t;
  using Ints = int32x4_t;
  using Mask = uint32x4_t;
  static constexpr int kLanes = 4;
  static constexpr int kRegisters = 32;

  static ONEBIT_INLINE Vec zero() { return vdupq_n_f32(0); }
  static ONEBIT_INLINE Vec set(float v) { return vdupq_n_f32(v); }
  static ONEBIT_INLINE Vec load(const float* p) { return vld1q_f32(p); }
  static ONEBIT_INLINE void store(float* p, Vec v) { vst1q_f32(p, v); }
  static ONEBIT_INLINE Vec add(Vec a, Vec b) { return vaddq_f32(a, b); }
  static ONEBIT_INLINE Vec sub(Vec a, Vec b) { return vsubq_f32(a, b); }
  static ONEBIT_INLINE Vec mul(Vec a, Vec b) { return vmulq_f32(a, b); }
  static ONEBIT_INLINE Vec fma(Vec a, Vec b, Vec c) { return vfmaq_f32(c, a, b); }
  // c - a * b
  static ONEBIT_INLINE Vec fnma(Vec a, Vec b, Vec c) { return vfmsq_f32(c, a, b); }
  static ONEBIT_INLINE Vec abs(Vec v) { return vabsq_f32(v); }
  static ONEBIT_INLINE Vec exclusive_or(Vec a, Vec b) {
    return vreinterpretq_f32_u32(veorq_u32(vreinterpretq_u32_f32(a), vreinterpretq_u32_f32(b)));
  }

  static ONEBIT_INLINE Ints ints(int32_t v) { return vdupq_n_s32(v); }
  static ONEBIT_INLINE Ints add_ints(Ints a, Ints b) { return vaddq_s32(a, b); }
  static ONEBIT_INLINE Ints sub_ints(Ints a, Ints b) { return vsubq_s32(a, b); }
  // (a + b) / 2, without overflow.
  static ONEBIT_INLINE Ints half_sum(Ints a, Ints b) { return vhaddq_s32(a, b); }
  static ONEBIT_INLINE int32_t sum_ints(Ints v) { return vaddvq_s32(v); }
  static ONEBIT_INLINE Vec to_floats(Ints v) { return vcvtq_f32_s32(v); }
  // To nearest, ties to even.
  static ONEBIT_INLINE Ints round(Vec v) { return vcvtnq_s32_f32(v); }
  static ONEBIT_INLINE void store_ints(int32_t* p, Ints v) { vst1q_s32(p, v); }
  static ONEBIT_INLINE void store_ints(int16_t* p, Ints v) { vst1_s16(p, vqmovn_s32(v)); }

  // mask ? a : b
  static ONEBIT_INLINE Vec choose(Mask mask, Vec a, Vec b) { return vbslq_f32(mask, a, b); }
  static ONEBIT_INLINE Ints choose(Mask mask, Ints a, Ints b) { return vbslq_s32(mask, a, b); }
  static ONEBIT_INLINE Mask negative(Vec v) { return vcltzq_s32(vreinterpretq_s32_f32(v)); }
  // Negative in the lanes where v is and a and b differ in sign.
  static ONEBIT_INLINE Vec keep_negative(Vec v, Vec a, Vec b) {
    return vreinterpretq_f32_u32(
        vandq_u32(vreinterpretq_u32_f32(v), vreinterpretq_u32_f32(exclusive_or(a, b))));
  }
  static ONEBIT_INLINE bool all_negative(Vec v) { return vminvq_u32(negative(v)) != 0; }
  static ONEBIT_INLINE Mask bit_of(const uint32_t* p, int bit) {
    return vtstq_u32(vld1q_u32(p), vdupq_n_u32(1u << bit));
  }
  // a < b ? a : b and a > b ? a : b: NaN in a, and equal zeros, give b.
  static ONEBIT_INLINE Vec smaller(Vec a, Vec b) { return vbslq_f32(vcltq_f32(a, b), a, b); }
  static ONEBIT_INLINE Vec larger(Vec a, Vec b) { return vbslq_f32(vcgtq_f32(a, b), a, b); }
  static ONEBIT_INLINE float sum(Vec v) { return vaddvq_f32(v); }
  static ONEBIT_INLINE float min_of(Vec v) { return vminvq_f32(v); }
  static ONEBIT_INLINE float max_of(Vec v) { return vmaxvq_f32(v); }
  static ONEBIT_INLINE uint32x4_t lane_bits() {
    const uint32_t bits[] = {1, 2, 4, 8};
    return vld1q_u32(bits);
  }
  static ONEBIT_INLINE uint32_t greater_bits(Vec a, Vec b) {
    return vaddvq_u32(vandq_u32(vcgtq_f32(a, b), lane_bits()));
  }
  static ONEBIT_INLINE uint32_t equal_bits(Vec a, Vec b) {
    return vaddvq_u32(vandq_u32(vceqq_f32(a, b), lane_bits()));
  }
  static ONEBIT_INLINE void fence() {}
  static ONEBIT_INLINE void prefetch(const void* p) { __builtin_prefetch(p, 0, 2); }

  static ONEBIT_INLINE Vec widen(uint16x4_t bits, DType dtype) {
    return dtype == DType::kHalf ? vcvt_f32_f16(vreinterpret_f16_u16(bits))
                                 : vreinterpretq_f32_u32(vshll_n_u16(bits, 16));
  }

  // Rounded to nearest, ties to even; NaN stays NaN.
  static ONEBIT_INLINE uint16x4_t narrow(Vec v, DType dtype) {
    if (dtype == DType::kHalf) return vreinterpret_u16_f16(vcvt_f16_f32(v));
    const uint32x4_t bits = vreinterpretq_u32_f32(v);
    const uint32x4_t odd = vandq_u32(vshrq_n_u32(bits, 16), vdupq_n_u32(1));
    const uint32x4_t rounded = vaddq_u32(bits, vaddq_u32(odd, vdupq_n_u32(0x7fff)));
    const uint32x4_t quiet = vorrq_u32(bits, vdupq_n_u32(0x400000));
    return vshrn_n_u32(vbslq_u32(vceqq_f32(v, v), rounded, quiet), 16);
  }

  template <DType kType, class T>
  static ONEBIT_INLINE Vec load_type(const T* p) {
    if constexpr (kType == DType::kFloat) {
      return load(p);
    } else {
      return widen(vld1_u16(reinterpret_cast<const uint16_t*>(p)), kType);
    }
  }

  // Element `offset` of a tensor onwards; lanes past `count` are 0 and their memory is not touched.
  static ONEBIT_INLINE Vec load_as(const void* p, DType dtype, int64_t offset, int64_t count) {
    const int64_t size = dtype == DType::kFloat ? 4 : 2;
    const char* from = static_cast<const char*>(p) + offset * size;
    alignas(16) char part[16] = {};
    if (count < kLanes) {
      if (count > 0) std::memcpy(part, from, count * size);
      from = part;
    }
    if (dtype == DType::kFloat) return load(reinterpret_cast<const float*>(from));
    return widen(vld1_u16(reinterpret_cast<const uint16_t*>(from)), dtype);
  }

  static ONEBIT_INLINE void store_as(void* p, DType dtype, int64_t offset, int64_t count, Vec v) {
    const int64_t size = dtype == DType::kFloat ? 4 : 2;
    char* to = static_cast<char*>(p) + offset * size;
    alignas(16) char part[16];
    char* out = count < kLanes ? part : to;
    if (dtype == DType::kFloat) {
      store(reinterpret_cast<float*>(out), v);
    } else {
      vst1_u16(reinterpret_cast<uint16_t*>(out), narrow(v, dtype));
    }
    if (count < kLanes && count > 0) std::memcpy(to, part, count * size);
  }

  // 32 values: high where the bit is set.
  static ONEBIT_INLINE void expand(uint32_t bits, float low, float high, float* out, bool) {
    for (int i = 0; i < kWordBits; i += kLanes) {
      store(out + i,
            vbslq_f32(vtstq_u32(vdupq_n_u32(bits >> i), lane_bits()), set(high), set(low)));
    }
  }
  template <class T>
  static ONEBIT_INLINE void expand(uint32_t bits, T low, T high, T* out, bool) {
    const uint16_t lanes[] = {1, 2, 4, 8, 16, 32, 64, 128};
    for (int i = 0; i < kWordBits; i += 8) {
      const uint16x8_t on = vtstq_u16(vdupq_n_u16(uint16_t(bits >> i)), vld1q_u16(lanes));
      vst1q_u16(reinterpret_cast<uint16_t*>(out + i),
                vbslq_u16(on, vdupq_n_u16(high.bits), vdupq_n_u16(low.bits)));
    }
  }

  // Scales or biases of 4 rows as floats, lane = row: group i goes to out + i * ld. `p` is the
  // first group of the first row, `stride` the bytes of a row; the row `last` stands for those
  // after it.
  template <DType kType>
  static ONEBIT_INLINE void transpose_levels(
      const char* p, int64_t stride, int last, int groups, float* out, int64_t ld) {
    for (int r = 0; r < kLanes; ++r) {
      const char* row = p + (r < last ? r : last) * stride;
      for (int g = 0; g < groups; ++g) {
        if constexpr (kType == DType::kFloat) {
          out[g * ld + r] = reinterpret_cast<const float*>(row)[g];
        } else {
          const uint16x4_t bits = vdup_n_u16(reinterpret_cast<const uint16_t*>(row)[g]);
          out[g * ld + r] = vgetq_lane_f32(widen(bits, kType), 0);
        }
      }
    }
  }
};

// Floats, one for a set bit and one for a clear one.
struct Chosen {
  const float *clear, *set;
};

// Sums of floats, value by value: of each the one that the weight bit of a lane chooses. kVectors *
// 4 output rows in a tile.
template <int kVectors_>
struct ChosenNeon : Neon {
  using Numbers = Chosen;
  static constexpr int kVectors = kVectors_;
  static constexpr int kRows = kVectors * kLanes;
  static constexpr int kMaxM = 4;  // 16 accumulators, 4 words, 4 masks of the 32 registers

  static constexpr int index_size(int words) { return words * kRows; }
  static constexpr int table_size(int words) { return words * kWordBits * 2; }

  // Words of kRows rows, `words` of them per row, to index + group * ld.
  template <int kWords>
  static void pack_rows(
      const uint32_t* w, int64_t stride, int rows, int words, uint32_t* index, int64_t ld) {
    for (int r = 0; r < kRows; ++r) {
      const uint32_t* row = w + (r < rows ? r : rows - 1) * stride;
      for (int i = 0; i < words; ++i) index[i / kWords * ld + i % kWords * kRows + r] = row[i];
    }
  }

  // One group for row m of a tile of kM rows: [column][2][kM].
  template <int kM, int kWords>
  static ONEBIT_INLINE void build(const Numbers& x, int m, float* table) {
    for (int i = 0; i < kWords * kWordBits; ++i, table += 2 * kM) {
      table[m] = x.set[i];
      table[kM + m] = x.clear[i];
    }
  }

  // emit(r, v): v[m] = the sums of one group of row m of x with the weight bits of the rows of
  // vector r.
  template <int kM, int kWords, bool = true, class Emit>
  static ONEBIT_INLINE void tile(const uint32_t* index,
                                 const float* table,
                                 const int32_t*,
                                 const Emit& emit) {
    Vec acc[kM][kVectors];
    ONEBIT_UNROLL
    for (int m = 0; m < kM; ++m) {
      ONEBIT_UNROLL
      for (int r = 0; r < kVectors; ++r) acc[m][r] = zero();
    }
    for (int word = 0; word < kWords; ++word, index += kRows) {
      uint32x4_t w[kVectors];
      ONEBIT_UNROLL
      for (int r = 0; r < kVectors; ++r) w[r] = vld1q_u32(index + r * kLanes);
      uint32x4_t bit = vdupq_n_u32(1);
      ONEBIT_NO_UNROLL
      for (int i = 0; i < kWordBits; ++i, table += 2 * kM) {
        ONEBIT_UNROLL
        for (int r = 0; r < kVectors; ++r) {
          const uint32x4_t on = vtstq_u32(w[r], bit);
          ONEBIT_UNROLL
          for (int m = 0; m < kM; ++m) {
            acc[m][r] = add(acc[m][r], choose(on, set(table[m]), set(table[kM + m])));
          }
        }
        bit = vshlq_n_u32(bit, 1);
      }
    }
    ONEBIT_UNROLL
    for (int r = 0; r < kVectors; ++r) {
      Vec sums[kM];
      ONEBIT_UNROLL
      for (int m = 0; m < kM; ++m) sums[m] = acc[m][r];
      emit(r, sums);
    }
  }
};

}  // namespace
}  // namespace onebit::cpu

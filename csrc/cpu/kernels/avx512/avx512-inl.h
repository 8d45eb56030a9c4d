// AVX-512 vectors of 16 floats: what the kernels need of an instruction set besides lookups.
// Included inside a target region, after <immintrin.h>.
#pragma once

#include "../float_types.h"
#include "../kernels.h"
#include "../target.h"

namespace onebit::cpu {
namespace {

struct Avx512 {
  using Vec = __m512;
  using Ints = __m512i;
  using Mask = __mmask16;
  static constexpr int kLanes = 16;
  static constexpr int kRegisters = 32;

  static ONEBIT_INLINE Vec zero() { return _mm512_setzero_ps(); }
  static ONEBIT_INLINE Vec set(float v) { return _mm512_set1_ps(v); }
  static ONEBIT_INLINE Vec load(const float* p) { return _mm512_loadu_ps(p); }
  static ONEBIT_INLINE void store(float* p, Vec v) { _mm512_storeu_ps(p, v); }
  static ONEBIT_INLINE Vec add(Vec a, Vec b) { return _mm512_add_ps(a, b); }
  static ONEBIT_INLINE Vec mul(Vec a, Vec b) { return _mm512_mul_ps(a, b); }
  static ONEBIT_INLINE Vec fma(Vec a, Vec b, Vec c) { return _mm512_fmadd_ps(a, b, c); }
  // c - a * b
  static ONEBIT_INLINE Vec fnma(Vec a, Vec b, Vec c) { return _mm512_fnmadd_ps(a, b, c); }
  static ONEBIT_INLINE Vec abs(Vec v) { return _mm512_abs_ps(v); }
  static ONEBIT_INLINE Vec exclusive_or(Vec a, Vec b) { return _mm512_xor_ps(a, b); }
  static ONEBIT_INLINE float sum(Vec v) { return _mm512_reduce_add_ps(v); }
  static ONEBIT_INLINE Vec sub(Vec a, Vec b) { return _mm512_sub_ps(a, b); }

  static ONEBIT_INLINE Ints ints(int32_t v) { return _mm512_set1_epi32(v); }
  static ONEBIT_INLINE Ints add_ints(Ints a, Ints b) { return _mm512_add_epi32(a, b); }
  static ONEBIT_INLINE Ints sub_ints(Ints a, Ints b) { return _mm512_sub_epi32(a, b); }
  // (a + b) / 2, without overflow.
  static ONEBIT_INLINE Ints half_sum(Ints a, Ints b) {
    const __m512i half = _mm512_srai_epi32(_mm512_xor_si512(a, b), 1);
    return _mm512_add_epi32(_mm512_and_si512(a, b), half);
  }
  static ONEBIT_INLINE int32_t sum_ints(Ints v) { return _mm512_reduce_add_epi32(v); }
  static ONEBIT_INLINE Vec to_floats(Ints v) { return _mm512_cvtepi32_ps(v); }
  // To nearest, ties to even.
  static ONEBIT_INLINE Ints round(Vec v) { return _mm512_cvtps_epi32(v); }
  static ONEBIT_INLINE void store_ints(int32_t* p, Ints v) { _mm512_storeu_si512(p, v); }
  static ONEBIT_INLINE void store_ints(int16_t* p, Ints v) {
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), _mm512_cvtepi32_epi16(v));
  }

  // mask ? a : b
  static ONEBIT_INLINE Vec choose(Mask mask, Vec a, Vec b) {
    return _mm512_mask_blend_ps(mask, b, a);
  }
  static ONEBIT_INLINE Ints choose(Mask mask, Ints a, Ints b) {
    return _mm512_mask_blend_epi32(mask, b, a);
  }
  static ONEBIT_INLINE Mask negative(Vec v) { return _mm512_movepi32_mask(_mm512_castps_si512(v)); }
  // Negative in the lanes where v is and a and b differ in sign.
  static ONEBIT_INLINE Vec keep_negative(Vec v, Vec a, Vec b) {
    return _mm512_castsi512_ps(_mm512_ternarylogic_epi32(
        _mm512_castps_si512(v), _mm512_castps_si512(a), _mm512_castps_si512(b), 0x60));
  }
  static ONEBIT_INLINE bool all_negative(Vec v) { return negative(v) == 0xffff; }
  static ONEBIT_INLINE Mask bit_of(const uint32_t* p, int bit) {
    return _mm512_test_epi32_mask(_mm512_loadu_si512(p), _mm512_set1_epi32(int(1u << bit)));
  }
  // a < b ? a : b and a > b ? a : b: NaN in a, and equal zeros, give b.
  static ONEBIT_INLINE Vec smaller(Vec a, Vec b) { return _mm512_min_ps(a, b); }
  static ONEBIT_INLINE Vec larger(Vec a, Vec b) { return _mm512_max_ps(a, b); }
  static ONEBIT_INLINE float min_of(Vec v) { return _mm512_reduce_min_ps(v); }
  static ONEBIT_INLINE float max_of(Vec v) { return _mm512_reduce_max_ps(v); }
  static ONEBIT_INLINE uint32_t greater_bits(Vec a, Vec b) {
    return _mm512_cmp_ps_mask(a, b, _CMP_GT_OQ);
  }
  static ONEBIT_INLINE uint32_t equal_bits(Vec a, Vec b) {
    return _mm512_cmp_ps_mask(a, b, _CMP_EQ_OQ);
  }
  static ONEBIT_INLINE void fence() { _mm_sfence(); }
  // To L2.
  static ONEBIT_INLINE void prefetch(const void* p) {
    _mm_prefetch(static_cast<const char*>(p), _MM_HINT_T1);
  }
  static ONEBIT_INLINE void prefetch_to_l1(const void* p) {
    _mm_prefetch(static_cast<const char*>(p), _MM_HINT_T0);
  }

  static ONEBIT_INLINE __mmask16 first(int64_t count) {
    if (count <= 0) return 0;
    return count >= kLanes ? __mmask16(0xffff) : __mmask16((1u << count) - 1);
  }

  static ONEBIT_INLINE Vec widen(__m256i bits, DType dtype) {
    return dtype == DType::kHalf
               ? _mm512_cvtph_ps(bits)
               : _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(bits), 16));
  }

  // Rounded to nearest, ties to even; NaN stays NaN.
  static ONEBIT_INLINE __m256i narrow(Vec v, DType dtype) {
    if (dtype == DType::kHalf) return _mm512_cvtps_ph(v, _MM_FROUND_TO_NEAREST_INT);
    const __m512i bits = _mm512_castps_si512(v);
    const __m512i odd = _mm512_and_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(1));
    const __m512i rounded =
        _mm512_add_epi32(bits, _mm512_add_epi32(odd, _mm512_set1_epi32(0x7fff)));
    const __m512i quiet = _mm512_or_si512(bits, _mm512_set1_epi32(0x400000));
    const __mmask16 nan = _mm512_cmp_ps_mask(v, v, _CMP_UNORD_Q);
    return _mm512_cvtepi32_epi16(_mm512_srli_epi32(_mm512_mask_mov_epi32(rounded, nan, quiet), 16));
  }

  // Element `offset` of a tensor onwards; lanes past `count` are 0 and their memory is not touched.
  static ONEBIT_INLINE Vec load_as(const void* p, DType dtype, int64_t offset, int64_t count) {
    if (dtype == DType::kFloat) {
      return _mm512_maskz_loadu_ps(first(count), static_cast<const float*>(p) + offset);
    }
    return widen(_mm256_maskz_loadu_epi16(first(count), static_cast<const uint16_t*>(p) + offset),
                 dtype);
  }

  // 16 scales or biases from element `offset` on.
  static ONEBIT_INLINE Vec load_level(const char* p, DType dtype, int64_t offset) {
    if (dtype == DType::kFloat) return load(reinterpret_cast<const float*>(p) + offset);
    return widen(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p + 2 * offset)), dtype);
  }

  static ONEBIT_INLINE void store_as(void* p, DType dtype, int64_t offset, int64_t count, Vec v) {
    if (dtype == DType::kFloat) {
      _mm512_mask_storeu_ps(static_cast<float*>(p) + offset, first(count), v);
    } else {
      _mm256_mask_storeu_epi16(static_cast<uint16_t*>(p) + offset, first(count), narrow(v, dtype));
    }
  }

  template <DType kType, class T>
  static ONEBIT_INLINE Vec load_type(const T* p) {
    if constexpr (kType == DType::kFloat) {
      return load(p);
    } else {
      return widen(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)), kType);
    }
  }

  // 32 values: high where the bit is set. `stream` needs 64-byte alignment.
  static ONEBIT_INLINE void write(void* out, __m512i v, bool stream) {
    if (stream) {
      _mm512_stream_si512(static_cast<__m512i*>(out), v);
    } else {
      _mm512_storeu_si512(out, v);
    }
  }
  static ONEBIT_INLINE void expand(uint32_t bits, float low, float high, float* out, bool stream) {
    const auto half = [&](uint32_t b) __attribute__((always_inline)) {
      return _mm512_castps_si512(_mm512_mask_mov_ps(set(low), __mmask16(b), set(high)));
    };
    write(out, half(bits), stream);
    write(out + kLanes, half(bits >> kLanes), stream);
  }
  template <class T>
  static ONEBIT_INLINE void expand(uint32_t bits, T low, T high, T* out, bool stream) {
    write(out,
          _mm512_mask_mov_epi16(_mm512_set1_epi16(int16_t(low.bits)), bits,
                                _mm512_set1_epi16(int16_t(high.bits))),
          stream);
  }

  // The end of a matrix: `bytes` (<= 16) of up to `last` + 1 rows, as 16 rows of 16 bytes. Nothing
  // else is read; the last row stands for the rows after it.
  static __attribute__((noinline)) void copy_tail(
      const char* p, int64_t stride, int last, int bytes, char* out) {
    const auto mask = __mmask16((1u << bytes) - 1);
    for (int i = 0; i < 16; ++i) {
      const char* row = p + (i < last ? i : last) * stride;
      _mm_store_si128(reinterpret_cast<__m128i*>(out + i * 16), _mm_maskz_loadu_epi8(mask, row));
    }
  }

  // 16 bytes of each of 16 rows, 4 rows to a vector: z[i] = rows i, 4 + i, 8 + i, 12 + i.
  static ONEBIT_INLINE void load_rows(
      const char* p, int64_t stride, int last, int bytes, __m512i (&z)[4]) {
    alignas(64) char tail[256];
    if (last < 15 || bytes < 16) {
      copy_tail(p, stride, last, bytes, tail);
      p = tail;
      stride = 16;
    }
    const char *p4 = p + 4 * stride, *p8 = p + 8 * stride, *p12 = p8 + 4 * stride;
    ONEBIT_UNROLL
    for (int i = 0; i < 4; ++i) {
      const auto row = [&](const char* base) __attribute__((always_inline)) {
        return _mm_loadu_si128(reinterpret_cast<const __m128i*>(base + i * stride));
      };
      z[i] = _mm512_castsi128_si512(row(p));
      z[i] = _mm512_inserti32x4(z[i], row(p4), 1);
      z[i] = _mm512_inserti32x4(z[i], row(p8), 2);
      z[i] = _mm512_inserti32x4(z[i], row(p12), 3);
    }
  }

  // Dwords of rows as load_rows leaves them.
  static ONEBIT_INLINE void transpose_4(const __m512i* z, __m512i* out) {
    const __m512i a = _mm512_unpacklo_epi32(z[0], z[1]), b = _mm512_unpackhi_epi32(z[0], z[1]);
    const __m512i c = _mm512_unpacklo_epi32(z[2], z[3]), d = _mm512_unpackhi_epi32(z[2], z[3]);
    out[0] = _mm512_unpacklo_epi64(a, c);
    out[1] = _mm512_unpackhi_epi64(a, c);
    out[2] = _mm512_unpacklo_epi64(b, d);
    out[3] = _mm512_unpackhi_epi64(b, d);
  }

  // out[i] = dword i of 16 rows, lane = row.
  static ONEBIT_INLINE void transpose_dwords(
      const char* p, int64_t stride, int last, int bytes, __m512i (&out)[4]) {
    __m512i z[4];
    load_rows(p, stride, last, bytes, z);
    transpose_4(z, out);
  }

  // Scales or biases of 16 rows as floats, lane = row: group i goes to out + i * ld. `p` is the
  // first group of the first row, `stride` the bytes of a row.
  template <DType kType>
  static ONEBIT_INLINE void transpose_levels(
      const char* p, int64_t stride, int last, int groups, float* out, int64_t ld) {
    constexpr int kStep = kType == DType::kFloat ? 4 : 8;
    for (int g = 0; g < groups; g += kStep, p += 16, out += kStep * ld) {
      const int count = groups - g < kStep ? groups - g : kStep;
      __m512i v[4];
      if constexpr (kType == DType::kFloat) {
        transpose_dwords(p, stride, last, count * 4, v);
        ONEBIT_UNROLL
        for (int i = 0; i < 4; ++i) {
          if (i < count) store(out + i * ld, _mm512_castsi512_ps(v[i]));
        }
      } else {
        __m512i z[4];
        load_rows(p, stride, last, count * 2, z);
        const __m512i a = _mm512_unpacklo_epi16(z[0], z[1]), b = _mm512_unpackhi_epi16(z[0], z[1]);
        const __m512i c = _mm512_unpacklo_epi16(z[2], z[3]), d = _mm512_unpackhi_epi16(z[2], z[3]);
        // Each 128 bits of v[i]: four rows of group 2i, then the same rows of group 2i + 1.
        v[0] = _mm512_unpacklo_epi32(a, c);
        v[1] = _mm512_unpackhi_epi32(a, c);
        v[2] = _mm512_unpacklo_epi32(b, d);
        v[3] = _mm512_unpackhi_epi32(b, d);
        ONEBIT_UNROLL
        for (int i = 0; i < 4; ++i) {
          if (2 * i >= count) continue;
          Vec even, odd;
          if constexpr (kType == DType::kBFloat16) {
            const __m512i none = _mm512_setzero_si512();
            even = _mm512_castsi512_ps(_mm512_unpacklo_epi16(none, v[i]));
            odd = _mm512_castsi512_ps(_mm512_unpackhi_epi16(none, v[i]));
          } else {
            const __m512i order = _mm512_setr_epi64(0, 2, 4, 6, 1, 3, 5, 7);
            const __m512i pair = _mm512_permutexvar_epi64(order, v[i]);
            even = _mm512_cvtph_ps(_mm512_castsi512_si256(pair));
            odd = _mm512_cvtph_ps(_mm512_extracti64x4_epi64(pair, 1));
          }
          store(out + 2 * i * ld, even);
          if (2 * i + 1 < count) store(out + (2 * i + 1) * ld, odd);
        }
      }
    }
  }
};

}  // namespace
}  // namespace onebit::cpu

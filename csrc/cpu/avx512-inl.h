// AVX-512 vectors of 16 floats: what the kernels need of an instruction set besides lookups.
// Included inside a target region, after <immintrin.h>.
#pragma once

#include "kernels.h"
#include "target.h"

namespace onebit::cpu {
namespace {

struct Avx512 {
  using Vec = __m512;
  static constexpr int kLanes = 16;

  static ONEBIT_INLINE Vec zero() { return _mm512_setzero_ps(); }
  static ONEBIT_INLINE Vec set(float v) { return _mm512_set1_ps(v); }
  static ONEBIT_INLINE Vec load(const float* p) { return _mm512_loadu_ps(p); }
  static ONEBIT_INLINE void store(float* p, Vec v) { _mm512_storeu_ps(p, v); }
  static ONEBIT_INLINE Vec add(Vec a, Vec b) { return _mm512_add_ps(a, b); }
  static ONEBIT_INLINE Vec mul(Vec a, Vec b) { return _mm512_mul_ps(a, b); }
  static ONEBIT_INLINE Vec fma(Vec a, Vec b, Vec c) { return _mm512_fmadd_ps(a, b, c); }
  static ONEBIT_INLINE float sum(Vec v) { return _mm512_reduce_add_ps(v); }
  static ONEBIT_INLINE void prefetch(const void* p) {
    _mm_prefetch(static_cast<const char*>(p), _MM_HINT_T1);
  }

  static ONEBIT_INLINE __mmask16 first(int64_t count) {
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
    return _mm512_cvtepi32_epi16(
        _mm512_srli_epi32(_mm512_mask_mov_epi32(rounded, nan, quiet), 16));
  }

  // Element `offset` of a tensor onwards; lanes past `count` are 0 and their memory is not touched.
  static ONEBIT_INLINE Vec load_as(const void* p, DType dtype, int64_t offset, int64_t count) {
    if (dtype == DType::kFloat) {
      return _mm512_maskz_loadu_ps(first(count), static_cast<const float*>(p) + offset);
    }
    return widen(
        _mm256_maskz_loadu_epi16(first(count), static_cast<const uint16_t*>(p) + offset), dtype);
  }

  static ONEBIT_INLINE void store_as(void* p, DType dtype, int64_t offset, int64_t count, Vec v) {
    if (dtype == DType::kFloat) {
      _mm512_mask_storeu_ps(static_cast<float*>(p) + offset, first(count), v);
    } else {
      _mm256_mask_storeu_epi16(static_cast<uint16_t*>(p) + offset, first(count), narrow(v, dtype));
    }
  }

  // Vector `i` of the result holds dword i of 16 rows. Only the first `bytes` (<= 16) of a row are
  // read, and only rows up to `last` (the lanes past it repeat it).
  static ONEBIT_INLINE void transpose_dwords(
      const char* p, int64_t stride, int last, int bytes, __m512i (&out)[4]) {
    const bool whole = last >= 15 && bytes == 16;
    const auto mask = __mmask16((1u << bytes) - 1);
    const auto row = [&](int i) __attribute__((always_inline)) {
      return whole ? _mm_loadu_si128(reinterpret_cast<const __m128i*>(p + i * stride))
                   : _mm_maskz_loadu_epi8(mask, p + (i < last ? i : last) * stride);
    };
    __m512i z[4];
    ONEBIT_UNROLL
    for (int i = 0; i < 4; ++i) {
      z[i] = _mm512_castsi128_si512(row(i));
      z[i] = _mm512_inserti32x4(z[i], row(4 + i), 1);
      z[i] = _mm512_inserti32x4(z[i], row(8 + i), 2);
      z[i] = _mm512_inserti32x4(z[i], row(12 + i), 3);
    }
    const __m512i a = _mm512_unpacklo_epi32(z[0], z[1]), b = _mm512_unpackhi_epi32(z[0], z[1]);
    const __m512i c = _mm512_unpacklo_epi32(z[2], z[3]), d = _mm512_unpackhi_epi32(z[2], z[3]);
    out[0] = _mm512_unpacklo_epi64(a, c);
    out[1] = _mm512_unpackhi_epi64(a, c);
    out[2] = _mm512_unpacklo_epi64(b, d);
    out[3] = _mm512_unpackhi_epi64(b, d);
  }

  // Scales or biases of 16 rows as floats with the row along the lanes: group i goes to
  // out + i * ld. `p` is the first group of the first row, `stride` the bytes of a row.
  static ONEBIT_INLINE void transpose_levels(
      const char* p, DType dtype, int64_t stride, int last, int groups, float* out, int64_t ld) {
    const int size = dtype == DType::kFloat ? 4 : 2;
    const int step = 16 / size;
    for (int g = 0; g < groups; g += step, p += 16, out += step * ld) {
      const int count = groups - g < step ? groups - g : step;
      __m512i d[4];
      transpose_dwords(p, stride, last, count * size, d);
      ONEBIT_UNROLL
      for (int i = 0; i < 4; ++i) {
        if (dtype == DType::kFloat) {
          if (i < count) store(out + i * ld, _mm512_castsi512_ps(d[i]));
        } else {
          if (2 * i < count) store(out + 2 * i * ld, widen(_mm512_cvtepi32_epi16(d[i]), dtype));
          if (2 * i + 1 < count) {
            store(out + (2 * i + 1) * ld,
                  widen(_mm512_cvtepi32_epi16(_mm512_srli_epi32(d[i], 16)), dtype));
          }
        }
      }
    }
  }
};

}  // namespace
}  // namespace onebit::cpu

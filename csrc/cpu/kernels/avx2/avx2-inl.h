// AVX2 vectors of 8 floats: what the kernels need of an instruction set besides lookups.
// Included inside a target region, after <immintrin.h> and <cstring>.
#pragma once

#include "../float_types.h"
#include "../kernels.h"
#include "../target.h"

namespace onebit::cpu {
namespace {

struct Avx2 {
  using Vec = __m256;
  using Ints = __m256i;
  using Mask = __m256;  // the sign of a lane
  static constexpr int kLanes = 8;
  static constexpr int kRegisters = 16;

  static ONEBIT_INLINE Vec zero() { return _mm256_setzero_ps(); }
  static ONEBIT_INLINE Vec set(float v) { return _mm256_set1_ps(v); }
  static ONEBIT_INLINE Vec load(const float* p) { return _mm256_loadu_ps(p); }
  static ONEBIT_INLINE void store(float* p, Vec v) { _mm256_storeu_ps(p, v); }
  static ONEBIT_INLINE Vec add(Vec a, Vec b) { return _mm256_add_ps(a, b); }
  static ONEBIT_INLINE Vec sub(Vec a, Vec b) { return _mm256_sub_ps(a, b); }
  static ONEBIT_INLINE Vec mul(Vec a, Vec b) { return _mm256_mul_ps(a, b); }
  static ONEBIT_INLINE Vec fma(Vec a, Vec b, Vec c) { return _mm256_fmadd_ps(a, b, c); }
  // c - a * b
  static ONEBIT_INLINE Vec fnma(Vec a, Vec b, Vec c) { return _mm256_fnmadd_ps(a, b, c); }
  static ONEBIT_INLINE Vec abs(Vec v) { return _mm256_andnot_ps(set(-0.0f), v); }
  static ONEBIT_INLINE Vec exclusive_or(Vec a, Vec b) { return _mm256_xor_ps(a, b); }

  static ONEBIT_INLINE Ints ints(int32_t v) { return _mm256_set1_epi32(v); }
  static ONEBIT_INLINE Ints add_ints(Ints a, Ints b) { return _mm256_add_epi32(a, b); }
  static ONEBIT_INLINE Ints sub_ints(Ints a, Ints b) { return _mm256_sub_epi32(a, b); }
  // (a + b) / 2, without overflow.
  static ONEBIT_INLINE Ints half_sum(Ints a, Ints b) {
    const __m256i half = _mm256_srai_epi32(_mm256_xor_si256(a, b), 1);
    return _mm256_add_epi32(_mm256_and_si256(a, b), half);
  }
  static ONEBIT_INLINE int32_t sum_ints(Ints v) {
    __m128i s = _mm_add_epi32(_mm256_castsi256_si128(v), _mm256_extracti128_si256(v, 1));
    s = _mm_add_epi32(s, _mm_shuffle_epi32(s, 0x4e));
    return _mm_cvtsi128_si32(_mm_add_epi32(s, _mm_shuffle_epi32(s, 0xb1)));
  }
  static ONEBIT_INLINE Vec to_floats(Ints v) { return _mm256_cvtepi32_ps(v); }
  // To nearest, ties to even.
  static ONEBIT_INLINE Ints round(Vec v) { return _mm256_cvtps_epi32(v); }
  static ONEBIT_INLINE void store_ints(int32_t* p, Ints v) {
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), v);
  }
  static ONEBIT_INLINE void store_ints(int16_t* p, Ints v) {
    _mm_storeu_si128(reinterpret_cast<__m128i*>(p),
                     _mm_packs_epi32(_mm256_castsi256_si128(v), _mm256_extracti128_si256(v, 1)));
  }

  // mask ? a : b
  static ONEBIT_INLINE Vec choose(Mask mask, Vec a, Vec b) { return _mm256_blendv_ps(b, a, mask); }
  static ONEBIT_INLINE Ints choose(Mask mask, Ints a, Ints b) {
    return _mm256_castps_si256(
        _mm256_blendv_ps(_mm256_castsi256_ps(b), _mm256_castsi256_ps(a), mask));
  }
  static ONEBIT_INLINE Mask negative(Vec v) { return v; }
  // Negative in the lanes where v is and a and b differ in sign.
  static ONEBIT_INLINE Vec keep_negative(Vec v, Vec a, Vec b) {
    return _mm256_and_ps(v, _mm256_xor_ps(a, b));
  }
  static ONEBIT_INLINE bool all_negative(Vec v) { return _mm256_movemask_ps(v) == 0xff; }
  static ONEBIT_INLINE Mask bit_of(const uint32_t* p, int bit) {
    const __m256i words = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p));
    return _mm256_castsi256_ps(_mm256_sll_epi32(words, _mm_cvtsi32_si128(31 - bit)));
  }
  // a < b ? a : b and a > b ? a : b: NaN in a, and equal zeros, give b.
  static ONEBIT_INLINE Vec smaller(Vec a, Vec b) { return _mm256_min_ps(a, b); }
  static ONEBIT_INLINE Vec larger(Vec a, Vec b) { return _mm256_max_ps(a, b); }
  static ONEBIT_INLINE uint32_t greater_bits(Vec a, Vec b) {
    return uint32_t(_mm256_movemask_ps(_mm256_cmp_ps(a, b, _CMP_GT_OQ)));
  }
  static ONEBIT_INLINE uint32_t equal_bits(Vec a, Vec b) {
    return uint32_t(_mm256_movemask_ps(_mm256_cmp_ps(a, b, _CMP_EQ_OQ)));
  }
  static ONEBIT_INLINE void fence() { _mm_sfence(); }
  static ONEBIT_INLINE void prefetch(const void* p) {
    _mm_prefetch(static_cast<const char*>(p), _MM_HINT_T1);
  }

  // Halves, then quarters, then the last two lanes.
  template <class F>
  static ONEBIT_INLINE float reduce(Vec v, const F& f) {
    __m128 h = f(_mm256_castps256_ps128(v), _mm256_extractf128_ps(v, 1));
    h = f(h, _mm_movehl_ps(h, h));
    return _mm_cvtss_f32(f(h, _mm_movehdup_ps(h)));
  }
  static ONEBIT_INLINE float sum(Vec v) {
    return reduce(
        v, [](__m128 a, __m128 b) __attribute__((always_inline)) { return _mm_add_ps(a, b); });
  }
  static ONEBIT_INLINE float min_of(Vec v) {
    return reduce(
        v, [](__m128 a, __m128 b) __attribute__((always_inline)) { return _mm_min_ps(a, b); });
  }
  static ONEBIT_INLINE float max_of(Vec v) {
    return reduce(
        v, [](__m128 a, __m128 b) __attribute__((always_inline)) { return _mm_max_ps(a, b); });
  }

  static ONEBIT_INLINE Vec widen(__m128i bits, DType dtype) {
    return dtype == DType::kHalf
               ? _mm256_cvtph_ps(bits)
               : _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(bits), 16));
  }

  // Rounded to nearest, ties to even; NaN stays NaN.
  static ONEBIT_INLINE __m128i narrow(Vec v, DType dtype) {
    if (dtype == DType::kHalf) return _mm256_cvtps_ph(v, _MM_FROUND_TO_NEAREST_INT);
    const __m256i bits = _mm256_castps_si256(v);
    const __m256i odd = _mm256_and_si256(_mm256_srli_epi32(bits, 16), _mm256_set1_epi32(1));
    const __m256i rounded =
        _mm256_add_epi32(bits, _mm256_add_epi32(odd, _mm256_set1_epi32(0x7fff)));
    const __m256i quiet = _mm256_or_si256(bits, _mm256_set1_epi32(0x400000));
    const __m256i nan = _mm256_castps_si256(_mm256_cmp_ps(v, v, _CMP_UNORD_Q));
    const __m256i high = _mm256_srli_epi32(_mm256_blendv_epi8(rounded, quiet, nan), 16);
    return _mm256_castsi256_si128(_mm256_permute4x64_epi64(_mm256_packus_epi32(high, high), 0x08));
  }

  template <DType kType, class T>
  static ONEBIT_INLINE Vec load_type(const T* p) {
    if constexpr (kType == DType::kFloat) {
      return load(p);
    } else {
      return widen(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)), kType);
    }
  }

  // Element `offset` of a tensor onwards; lanes past `count` are 0 and their memory is not touched.
  static ONEBIT_INLINE Vec load_as(const void* p, DType dtype, int64_t offset, int64_t count) {
    const int64_t size = dtype == DType::kFloat ? 4 : 2;
    const char* from = static_cast<const char*>(p) + offset * size;
    alignas(32) char part[32] = {};
    if (count < kLanes) {
      if (count > 0) std::memcpy(part, from, count * size);
      from = part;
    }
    if (dtype == DType::kFloat) return load(reinterpret_cast<const float*>(from));
    return widen(_mm_loadu_si128(reinterpret_cast<const __m128i*>(from)), dtype);
  }

  static ONEBIT_INLINE void store_as(void* p, DType dtype, int64_t offset, int64_t count, Vec v) {
    const int64_t size = dtype == DType::kFloat ? 4 : 2;
    char* to = static_cast<char*>(p) + offset * size;
    alignas(32) char part[32];
    char* out = count < kLanes ? part : to;
    if (dtype == DType::kFloat) {
      store(reinterpret_cast<float*>(out), v);
    } else {
      _mm_storeu_si128(reinterpret_cast<__m128i*>(out), narrow(v, dtype));
    }
    if (count < kLanes && count > 0) std::memcpy(to, part, count * size);
  }

  // 32 values: high where the bit is set. `stream` needs 64-byte alignment.
  static ONEBIT_INLINE void write(void* out, __m256i v, bool stream) {
    if (stream) {
      _mm256_stream_si256(static_cast<__m256i*>(out), v);
    } else {
      _mm256_storeu_si256(static_cast<__m256i*>(out), v);
    }
  }
  static ONEBIT_INLINE void expand(uint32_t bits, float low, float high, float* out, bool stream) {
    const __m256i lane = _mm256_setr_epi32(1, 2, 4, 8, 16, 32, 64, 128);
    ONEBIT_UNROLL
    for (int i = 0; i < 4; ++i, bits >>= 8) {
      const __m256i on =
          _mm256_cmpeq_epi32(_mm256_and_si256(_mm256_set1_epi32(int(bits)), lane), lane);
      const Vec v = _mm256_blendv_ps(set(low), set(high), _mm256_castsi256_ps(on));
      write(out + i * kLanes, _mm256_castps_si256(v), stream);
    }
  }
  template <class T>
  static ONEBIT_INLINE void expand(uint32_t bits, T low, T high, T* out, bool stream) {
    const __m256i lane = _mm256_setr_epi16(1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024, 2048, 4096,
                                           8192, 16384, int16_t(-32768));
    ONEBIT_UNROLL
    for (int i = 0; i < 2; ++i, bits >>= 16) {
      const __m256i on =
          _mm256_cmpeq_epi16(_mm256_and_si256(_mm256_set1_epi16(int16_t(bits)), lane), lane);
      write(out + i * 16,
            _mm256_blendv_epi8(_mm256_set1_epi16(int16_t(low.bits)),
                               _mm256_set1_epi16(int16_t(high.bits)), on),
            stream);
    }
  }

  // The end of a matrix: `bytes` (<= 16) of up to `last` + 1 rows, as 8 rows of 16 bytes. Nothing
  // else is read; the last row stands for the rows after it.
  static __attribute__((noinline)) void copy_tail(
      const char* p, int64_t stride, int last, int bytes, char* out) {
    std::memset(out, 0, 16 * kLanes);
    for (int i = 0; i < kLanes; ++i) {
      std::memcpy(out + i * 16, p + (i < last ? i : last) * stride, bytes);
    }
  }

  // 16 bytes of each of 8 rows: z[i] = rows i, 4 + i.
  static ONEBIT_INLINE void load_rows(
      const char* p, int64_t stride, int last, int bytes, __m256i (&z)[4]) {
    alignas(32) char tail[16 * kLanes];
    if (last < kLanes - 1 || bytes < 16) {
      copy_tail(p, stride, last, bytes, tail);
      p = tail;
      stride = 16;
    }
    const char* p4 = p + 4 * stride;
    ONEBIT_UNROLL
    for (int i = 0; i < 4; ++i) {
      z[i] = _mm256_inserti128_si256(
          _mm256_castsi128_si256(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p + i * stride))),
          _mm_loadu_si128(reinterpret_cast<const __m128i*>(p4 + i * stride)), 1);
    }
  }

  // Dwords of rows as load_rows leaves them.
  static ONEBIT_INLINE void transpose_4(const __m256i* z, __m256i* out) {
    const __m256i a = _mm256_unpacklo_epi32(z[0], z[1]), b = _mm256_unpackhi_epi32(z[0], z[1]);
    const __m256i c = _mm256_unpacklo_epi32(z[2], z[3]), d = _mm256_unpackhi_epi32(z[2], z[3]);
    out[0] = _mm256_unpacklo_epi64(a, c);
    out[1] = _mm256_unpackhi_epi64(a, c);
    out[2] = _mm256_unpacklo_epi64(b, d);
    out[3] = _mm256_unpackhi_epi64(b, d);
  }

  // out[i] = dword i of 8 rows, lane = row.
  static ONEBIT_INLINE void transpose_dwords(
      const char* p, int64_t stride, int last, int bytes, __m256i (&out)[4]) {
    __m256i z[4];
    load_rows(p, stride, last, bytes, z);
    transpose_4(z, out);
  }

  // Scales or biases of 8 rows as floats, lane = row: group i goes to out + i * ld. `p` is the
  // first group of the first row, `stride` the bytes of a row.
  template <DType kType>
  static ONEBIT_INLINE void transpose_levels(
      const char* p, int64_t stride, int last, int groups, float* out, int64_t ld) {
    constexpr int kStep = kType == DType::kFloat ? 4 : 8;
    for (int g = 0; g < groups; g += kStep, p += 16, out += kStep * ld) {
      const int count = groups - g < kStep ? groups - g : kStep;
      __m256i v[4];
      if constexpr (kType == DType::kFloat) {
        transpose_dwords(p, stride, last, count * 4, v);
        ONEBIT_UNROLL
        for (int i = 0; i < 4; ++i) {
          if (i < count) store(out + i * ld, _mm256_castsi256_ps(v[i]));
        }
      } else {
        __m256i z[4];
        load_rows(p, stride, last, count * 2, z);
        const __m256i a = _mm256_unpacklo_epi16(z[0], z[1]), b = _mm256_unpackhi_epi16(z[0], z[1]);
        const __m256i c = _mm256_unpacklo_epi16(z[2], z[3]), d = _mm256_unpackhi_epi16(z[2], z[3]);
        // Each 128 bits of v[i]: four rows of group 2i, then the same rows of group 2i + 1.
        v[0] = _mm256_unpacklo_epi32(a, c);
        v[1] = _mm256_unpackhi_epi32(a, c);
        v[2] = _mm256_unpacklo_epi32(b, d);
        v[3] = _mm256_unpackhi_epi32(b, d);
        ONEBIT_UNROLL
        for (int i = 0; i < 4; ++i) {
          if (2 * i >= count) continue;
          const __m256i pair = _mm256_permute4x64_epi64(v[i], 0xd8);
          store(out + 2 * i * ld, widen(_mm256_castsi256_si128(pair), kType));
          if (2 * i + 1 < count) {
            store(out + (2 * i + 1) * ld, widen(_mm256_extracti128_si256(pair, 1), kType));
          }
        }
      }
    }
  }
};

}  // namespace
}  // namespace onebit::cpu

// The AVX-512 intrinsics that csrc/cpu/kernels uses, lane by lane, for machines with AVX2 only:
// included before the files of csrc/cpu/kernels/avx512 (-include), it lets the tests run their
// tables on any x86. Right, not fast. An intrinsic that is missing here does not compile.
#pragma once

#include <cpuid.h>
#include <immintrin.h>
#include <sys/syscall.h>
#include <unistd.h>

#include <cmath>
#include <cstdint>
#include <cstring>

#define ONEBIT_TARGET_BEGIN(isa) \
  _Pragma("GCC push_options") _Pragma("GCC target(\"avx2,fma,f16c\")")
#define __builtin_cpu_supports(isa) 1
#define asm(...)  // keeps values in registers that are not there

#pragma GCC push_options
#pragma GCC target("avx2,fma,f16c")

namespace emulated {

using V = __m512;
using I = __m512i;
using Mask = uint64_t;

// A vector as lanes of T, and back.
template <class T, int kBytes = 64>
struct Lanes {
  static constexpr int kCount = kBytes / int(sizeof(T));
  T lane[kCount];

  template <class Vector>
  static Lanes of(const Vector& v) {
    static_assert(sizeof v == kBytes);
    Lanes out;
    std::memcpy(&out, &v, kBytes);
    return out;
  }
  template <class Vector>
  Vector as() const {
    static_assert(sizeof(Vector) == kBytes);
    Vector v;
    std::memcpy(&v, this, kBytes);
    return v;
  }
};

// Functions, not templates at every use: calls keep the kernels small enough to compile in seconds.
#define ONEBIT_EMULATED __attribute__((noinline)) inline

// Result lanes are computed from lanes i of a and b, called x and y.
#define ONEBIT_BINARY(name, Vector, T, expression)                \
  ONEBIT_EMULATED Vector name(const Vector& a, const Vector& b) { \
    auto p = Lanes<T>::of(a), q = Lanes<T>::of(b);                \
    for (int i = 0; i < p.kCount; ++i) {                          \
      const T x = p.lane[i], y = q.lane[i];                       \
      p.lane[i] = T(expression);                                  \
    }                                                             \
    return p.template as<Vector>();                               \
  }
ONEBIT_BINARY(add_ps, V, float, x + y)
ONEBIT_BINARY(sub_ps, V, float, x - y)
ONEBIT_BINARY(mul_ps, V, float, x* y)
ONEBIT_BINARY(min_ps, V, float, x < y ? x : y)
ONEBIT_BINARY(max_ps, V, float, x > y ? x : y)
ONEBIT_BINARY(xor_ps, V, uint32_t, x ^ y)
ONEBIT_BINARY(add_epi32, I, uint32_t, x + y)
ONEBIT_BINARY(sub_epi32, I, uint32_t, x - y)
ONEBIT_BINARY(add_epi16, I, uint16_t, x + y)
ONEBIT_BINARY(mulhi_epu16, I, uint16_t, uint32_t(x) * y >> 16)
ONEBIT_BINARY(and_si512, I, uint32_t, x& y)
ONEBIT_BINARY(or_si512, I, uint32_t, x | y)
ONEBIT_BINARY(xor_si512, I, uint32_t, x ^ y)

// The same of one vector and a number n.
#define ONEBIT_UNARY(name, Vector, T, expression)           \
  ONEBIT_EMULATED Vector name(const Vector& a, int n = 0) { \
    auto p = Lanes<T>::of(a);                               \
    for (int i = 0; i < p.kCount; ++i) {                    \
      const T x = p.lane[i];                                \
      p.lane[i] = T(expression + 0 * n);                    \
    }                                                       \
    return p.template as<Vector>();                         \
  }
ONEBIT_UNARY(srli_epi32, I, uint32_t, (x >> n))
ONEBIT_UNARY(slli_epi32, I, uint32_t, (x << n))
ONEBIT_UNARY(srai_epi32, I, int32_t, (x >> n))
ONEBIT_UNARY(srli_epi16, I, uint16_t, (x >> n))
ONEBIT_UNARY(slli_epi16, I, uint16_t, (x << n))
ONEBIT_EMULATED V abs_ps(const V& a) {
  auto p = Lanes<float>::of(a);
  for (auto& x : p.lane) x = std::fabs(x);
  return p.as<V>();
}

template <class T, class Vector>
ONEBIT_EMULATED Vector set1(T v) {
  Lanes<T> p;
  for (auto& x : p.lane) x = v;
  return p.template as<Vector>();
}

template <class T, class Vector>
ONEBIT_EMULATED Vector select(Mask mask, const Vector& on, const Vector& off) {
  auto p = Lanes<T>::of(off);
  const auto q = Lanes<T>::of(on);
  for (int i = 0; i < p.kCount; ++i) {
    if (mask >> i & 1) p.lane[i] = q.lane[i];
  }
  return p.template as<Vector>();
}

// Within each 16 bytes, the low or high halves of a and b in turn.
template <class T>
ONEBIT_EMULATED I unpack(const I& a, const I& b, bool high) {
  constexpr int kIn16 = 16 / int(sizeof(T));
  const auto p = Lanes<T>::of(a), q = Lanes<T>::of(b);
  Lanes<T> out;
  for (int i = 0; i < out.kCount; ++i) {
    const int from = i / kIn16 * kIn16 + (high ? kIn16 / 2 : 0) + i % kIn16 / 2;
    out.lane[i] = i % 2 ? q.lane[from] : p.lane[from];
  }
  return out.template as<I>();
}

template <class T, class Index, class Vector>
ONEBIT_EMULATED Vector permute(const Vector& a, const I& index, const Vector& b) {
  const auto p = Lanes<T>::of(a), q = Lanes<T>::of(b);
  const auto k = Lanes<Index>::of(index);
  Lanes<T> out;
  for (int i = 0; i < out.kCount; ++i) {
    const int from = int(k.lane[i] % (2 * out.kCount));
    out.lane[i] = from < out.kCount ? p.lane[from] : q.lane[from - out.kCount];
  }
  return out.template as<Vector>();
}

template <class Vector>
ONEBIT_EMULATED Vector load(const void* p) {
  Vector v;
  std::memcpy(&v, p, sizeof v);
  return v;
}
template <class Vector>
ONEBIT_EMULATED void store(void* p, const Vector& v) {
  std::memcpy(p, &v, sizeof v);
}
template <class T, class Vector>
ONEBIT_EMULATED Vector load_some(Mask mask, const void* p) {
  Lanes<T, sizeof(Vector)> out{};
  for (int i = 0; i < out.kCount; ++i) {
    if (mask >> i & 1) out.lane[i] = static_cast<const T*>(p)[i];
  }
  return out.template as<Vector>();
}
template <class T, class Vector>
ONEBIT_EMULATED void store_some(void* p, Mask mask, const Vector& v) {
  const auto x = Lanes<T, sizeof(Vector)>::of(v);
  for (int i = 0; i < x.kCount; ++i) {
    if (mask >> i & 1) static_cast<T*>(p)[i] = x.lane[i];
  }
}

ONEBIT_EMULATED __mmask16 cmp_ps(const V& a, const V& b, int how) {
  const auto p = Lanes<float>::of(a), q = Lanes<float>::of(b);
  unsigned bits = 0;
  for (int i = 0; i < 16; ++i) {
    const float x = p.lane[i], y = q.lane[i];
    const bool yes = how == _CMP_GT_OQ ? x > y : how == _CMP_EQ_OQ ? x == y : x != x || y != y;
    bits |= unsigned(yes) << i;
  }
  if (how != _CMP_GT_OQ && how != _CMP_EQ_OQ && how != _CMP_UNORD_Q) __builtin_trap();
  return __mmask16(bits);
}
ONEBIT_EMULATED __mmask16 test_epi32(const I& a, const I& b) {
  const auto p = Lanes<uint32_t>::of(a), q = Lanes<uint32_t>::of(b);
  unsigned bits = 0;
  for (int i = 0; i < 16; ++i) bits |= unsigned((p.lane[i] & q.lane[i]) != 0) << i;
  return __mmask16(bits);
}
inline __mmask16 movepi32(const I& a) { return test_epi32(a, set1<int32_t, I>(INT32_MIN)); }

// As the hardware does it: halves, quarters, eighths, the last two.
template <class T, class Vector, class F>
inline T reduce(const Vector& v, const F& f) {
  auto x = Lanes<T>::of(v);
  for (int n = x.kCount / 2; n >= 1; n /= 2) {
    for (int i = 0; i < n; ++i) x.lane[i] = f(x.lane[i], x.lane[i + n]);
  }
  return x.lane[0];
}
ONEBIT_EMULATED float reduce_add(const V& v) {
  return reduce<float>(v, [](float x, float y) { return x + y; });
}
ONEBIT_EMULATED float reduce_min(const V& v) {
  return reduce<float>(v, [](float x, float y) { return x < y ? x : y; });
}
ONEBIT_EMULATED float reduce_max(const V& v) {
  return reduce<float>(v, [](float x, float y) { return x > y ? x : y; });
}
ONEBIT_EMULATED int32_t reduce_add_ints(const I& v) {
  return int32_t(reduce<uint32_t>(v, [](uint32_t x, uint32_t y) { return x + y; }));
}

ONEBIT_EMULATED V fma(const V& a, const V& b, const V& c, bool negate) {
  auto x = Lanes<float>::of(a), y = Lanes<float>::of(b), z = Lanes<float>::of(c);
  for (int i = 0; i < 16; ++i) {
    z.lane[i] = __builtin_fmaf(negate ? -x.lane[i] : x.lane[i], y.lane[i], z.lane[i]);
  }
  return z.as<V>();
}
ONEBIT_EMULATED I madd_epi16(const I& a, const I& b) {
  const auto p = Lanes<int16_t>::of(a), q = Lanes<int16_t>::of(b);
  Lanes<int32_t> out;
  for (int i = 0; i < 16; ++i) {
    out.lane[i] = p.lane[2 * i] * q.lane[2 * i] + p.lane[2 * i + 1] * q.lane[2 * i + 1];
  }
  return out.as<I>();
}
// Only 0xea, (a & b) | c, is used.
// Bit i of the result is that bit of `table` whose number bits i of a, b and c are.
ONEBIT_EMULATED I ternary(const I& a, const I& b, const I& c, int table) {
  const auto x = Lanes<uint64_t>::of(a), y = Lanes<uint64_t>::of(b), z = Lanes<uint64_t>::of(c);
  Lanes<uint64_t> out{};
  for (int row = 0; row < 8; ++row) {
    if (!(table >> row & 1)) continue;
    const auto same = [](uint64_t v, int bit) { return bit ? v : ~v; };
    for (int i = 0; i < out.kCount; ++i) {
      out.lane[i] |= same(x.lane[i], row & 4) & same(y.lane[i], row & 2) & same(z.lane[i], row & 1);
    }
  }
  return out.as<I>();
}

template <class To, class From, class ToVector, class FromVector>
ONEBIT_EMULATED ToVector convert(const FromVector& v) {
  const auto x = Lanes<From, sizeof v>::of(v);
  Lanes<To, sizeof(ToVector)> out;
  for (int i = 0; i < 16; ++i) out.lane[i] = To(x.lane[i]);
  return out.template as<ToVector>();
}
struct Halves {
  __m256 low, high;
};
ONEBIT_EMULATED I cvtps_epi32(const V& v) {
  const auto h = load<Halves>(&v);
  const __m256i out[] = {_mm256_cvtps_epi32(h.low), _mm256_cvtps_epi32(h.high)};
  return load<I>(out);
}
ONEBIT_EMULATED V cvtph_ps(const __m256i& v) {
  const __m256 out[] = {_mm256_cvtph_ps(_mm256_castsi256_si128(v)),
                        _mm256_cvtph_ps(_mm256_extracti128_si256(v, 1))};
  return load<V>(out);
}
ONEBIT_EMULATED __m256i cvtps_ph(const V& v) {
  const auto h = load<Halves>(&v);
  return _mm256_set_m128i(_mm256_cvtps_ph(h.high, _MM_FROUND_TO_NEAREST_INT),
                          _mm256_cvtps_ph(h.low, _MM_FROUND_TO_NEAREST_INT));
}
ONEBIT_EMULATED I insert(const I& v, const __m128i& part, int i) {
  auto x = Lanes<char>::of(v);
  std::memcpy(x.lane + 16 * i, &part, 16);
  return x.as<I>();
}
ONEBIT_EMULATED __m256i extract(const I& v, int i) {
  return load<__m256i>(Lanes<char>::of(v).lane + 32 * i);
}
ONEBIT_EMULATED I
setr_epi64(int64_t a, int64_t b, int64_t c, int64_t d, int64_t e, int64_t f, int64_t g, int64_t h) {
  const int64_t x[] = {a, b, c, d, e, f, g, h};
  return load<I>(x);
}

// Tile registers, as Intel's manual has them. Shapes are those of the last configuration.
struct TileConfig {
  uint8_t palette, start_row, reserved[14];
  uint16_t row_bytes[16];
  uint8_t rows[16];
};
struct Tile {
  char row[16][64];
};
inline thread_local TileConfig tile_config;
inline thread_local Tile tiles[8];

ONEBIT_EMULATED void tile_copy(int tile, char* p, int64_t stride, bool load) {
  if (load) tiles[tile] = {};
  for (int i = 0; i < tile_config.rows[tile]; ++i, p += stride) {
    char* row = tiles[tile].row[i];
    std::memcpy(load ? row : p, load ? p : row, tile_config.row_bytes[tile]);
  }
}
ONEBIT_EMULATED void tile_load(int tile, const void* p, int64_t stride) {
  tile_copy(tile, static_cast<char*>(const_cast<void*>(p)), stride, true);
}
ONEBIT_EMULATED void tile_store(int tile, void* p, int64_t stride) {
  tile_copy(tile, static_cast<char*>(p), stride, false);
}
inline long granted(long, long, long) { return 0; }
ONEBIT_EMULATED void tile_dpbf16ps(int to, int a, int b) {
  const auto at = [](int tile, int row, int i) {  // bfloat16 value i of a row
    uint16_t half;
    std::memcpy(&half, tiles[tile].row[row] + 2 * i, 2);
    const uint32_t bits = uint32_t(half) << 16;
    float value;
    std::memcpy(&value, &bits, 4);
    return std::fpclassify(value) == FP_SUBNORMAL ? 0.0f : value;
  };
  for (int m = 0; m < tile_config.rows[to]; ++m) {
    for (int k = 0; k < tile_config.row_bytes[a] / 4; ++k) {
      for (int n = 0; n < tile_config.row_bytes[to] / 4; ++n) {
        float sum;
        std::memcpy(&sum, tiles[to].row[m] + 4 * n, 4);
        for (int i = 0; i < 2; ++i) sum = std::fma(at(a, m, 2 * k + i), at(b, k, 2 * n + i), sum);
        std::memcpy(tiles[to].row[m] + 4 * n, &sum, 4);
      }
    }
  }
}

ONEBIT_EMULATED void tile_dpbssd(int to, int a, int b) {
  for (int m = 0; m < tile_config.rows[to]; ++m) {
    for (int k = 0; k < tile_config.row_bytes[a] / 4; ++k) {
      for (int n = 0; n < tile_config.row_bytes[to] / 4; ++n) {
        int32_t sum;
        std::memcpy(&sum, tiles[to].row[m] + 4 * n, 4);
        for (int i = 0; i < 4; ++i) {
          sum += int8_t(tiles[a].row[m][4 * k + i]) * int8_t(tiles[b].row[k][4 * n + i]);
        }
        std::memcpy(tiles[to].row[m] + 4 * n, &sum, 4);
      }
    }
  }
}

// Bit i of every byte: the parity of what byte 7 - i of the matrix leaves of it.
ONEBIT_EMULATED I bit_matrix(const I& a, const I& matrix, int constant) {
  auto p = Lanes<uint8_t>::of(a);
  const auto q = Lanes<uint8_t>::of(matrix);
  for (int n = 0; n < p.kCount; ++n) {
    uint8_t out = 0;
    for (int i = 0; i < 8; ++i) {
      out |= uint8_t(__builtin_parity(p.lane[n] & q.lane[n / 8 * 8 + 7 - i]) << i);
    }
    p.lane[n] = uint8_t(out ^ constant);
  }
  return p.as<I>();
}

}  // namespace emulated

#pragma GCC pop_options

// Macros of the real header.
#undef _mm512_cmp_ps_mask
#undef _mm512_cvtps_ph
#undef _mm512_extracti64x4_epi64
#undef _mm512_gf2p8affine_epi64_epi8
#undef _mm512_inserti32x4
#undef _mm512_setr_epi64
#undef _mm512_slli_epi16
#undef _mm512_slli_epi32
#undef _mm512_srai_epi32
#undef _mm512_srli_epi16
#undef _mm512_srli_epi32
#undef _mm512_ternarylogic_epi32
#define _mm512_setzero_ps() (__m512{})
#define _mm512_setzero_si512() (__m512i{})
#define _mm512_castps_si512(v) __m512i(v)
#define _mm512_castsi512_ps(v) __m512(v)
#define _mm512_castsi512_si256(v) emulated::extract(v, 0)
#define _mm512_castsi128_si512(v) emulated::insert(__m512i{}, v, 0)
#define _mm512_extracti64x4_epi64 emulated::extract
#define _mm512_inserti32x4 emulated::insert
#define _mm512_set1_ps emulated::set1<float, __m512>
#define _mm512_set1_epi32 emulated::set1<int32_t, __m512i>
#define _mm512_set1_epi64 emulated::set1<int64_t, __m512i>
#define _mm512_set1_epi16 emulated::set1<int16_t, __m512i>
#define _mm512_setr_epi64 emulated::setr_epi64
#define _mm512_maskz_set1_epi16(m, v) emulated::select<int16_t>(m, _mm512_set1_epi16(v), __m512i{})
#define _mm512_load_ps emulated::load<__m512>
#define _mm512_loadu_ps emulated::load<__m512>
#define _mm512_load_si512 emulated::load<__m512i>
#define _mm512_loadu_si512 emulated::load<__m512i>
#define _mm512_store_ps emulated::store<__m512>
#define _mm512_storeu_ps emulated::store<__m512>
#define _mm512_store_si512 emulated::store<__m512i>
#define _mm512_storeu_si512 emulated::store<__m512i>
#define _mm512_stream_si512 emulated::store<__m512i>
#define _mm512_maskz_loadu_ps emulated::load_some<float, __m512>
#define _mm512_mask_storeu_ps emulated::store_some<float>
#define _mm256_maskz_loadu_epi16 emulated::load_some<int16_t, __m256i>
#define _mm256_mask_storeu_epi16 emulated::store_some<int16_t>
#define _mm_maskz_loadu_epi8 emulated::load_some<int8_t, __m128i>
#define _mm512_add_ps emulated::add_ps
#define _mm512_sub_ps emulated::sub_ps
#define _mm512_mul_ps emulated::mul_ps
#define _mm512_min_ps emulated::min_ps
#define _mm512_max_ps emulated::max_ps
#define _mm512_xor_ps emulated::xor_ps
#define _mm512_abs_ps emulated::abs_ps
#define _mm512_fmadd_ps(a, b, c) emulated::fma(a, b, c, false)
#define _mm512_fnmadd_ps(a, b, c) emulated::fma(a, b, c, true)
#define _mm512_add_epi32 emulated::add_epi32
#define _mm512_sub_epi32 emulated::sub_epi32
#define _mm512_add_epi16 emulated::add_epi16
#define _mm512_mulhi_epu16 emulated::mulhi_epu16
#define _mm512_and_si512 emulated::and_si512
#define _mm512_or_si512 emulated::or_si512
#define _mm512_xor_si512 emulated::xor_si512
#define _mm512_srai_epi32 emulated::srai_epi32
#define _mm512_srli_epi32 emulated::srli_epi32
#define _mm512_slli_epi32 emulated::slli_epi32
#define _mm512_srli_epi16 emulated::srli_epi16
#define _mm512_slli_epi16 emulated::slli_epi16
#define _mm512_gf2p8affine_epi64_epi8 emulated::bit_matrix
#define _mm512_madd_epi16 emulated::madd_epi16
#define _mm512_ternarylogic_epi32 emulated::ternary
#define _mm512_unpacklo_epi16(a, b) emulated::unpack<int16_t>(a, b, false)
#define _mm512_unpackhi_epi16(a, b) emulated::unpack<int16_t>(a, b, true)
#define _mm512_unpacklo_epi32(a, b) emulated::unpack<int32_t>(a, b, false)
#define _mm512_unpackhi_epi32(a, b) emulated::unpack<int32_t>(a, b, true)
#define _mm512_unpacklo_epi64(a, b) emulated::unpack<int64_t>(a, b, false)
#define _mm512_unpackhi_epi64(a, b) emulated::unpack<int64_t>(a, b, true)
#define _mm512_permutex2var_ps emulated::permute<float, uint32_t>
#define _mm512_permutexvar_ps(i, a) emulated::permute<float, uint32_t>(a, i, a)
#define _mm512_permutex2var_epi8 emulated::permute<int8_t, uint8_t>
#define _mm512_permutex2var_epi16 emulated::permute<int16_t, uint16_t>
#define _mm512_permutexvar_epi16(i, a) emulated::permute<int16_t, uint16_t>(a, i, a)
#define _mm512_permutexvar_epi64(i, a) emulated::permute<int64_t, uint64_t>(a, i, a)
#define _mm512_mask_mov_ps(from, m, v) emulated::select<float>(m, v, from)
#define _mm512_mask_mov_epi32(from, m, v) emulated::select<int32_t>(m, v, from)
#define _mm512_mask_mov_epi16(from, m, v) emulated::select<int16_t>(m, v, from)
#define _mm512_mask_blend_ps(m, a, b) emulated::select<float>(m, b, a)
#define _mm512_mask_blend_epi32(m, a, b) emulated::select<int32_t>(m, b, a)
#define _mm512_mask_add_epi16(from, m, a, b) \
  emulated::select<int16_t>(m, _mm512_add_epi16(a, b), from)
#define _mm512_mask_add_epi32(from, m, a, b) \
  emulated::select<int32_t>(m, _mm512_add_epi32(a, b), from)
#define _mm512_mask_or_epi32(from, m, a, b) \
  emulated::select<int32_t>(m, _mm512_or_si512(a, b), from)
#define _mm512_cmp_ps_mask emulated::cmp_ps
#define _mm512_movepi32_mask emulated::movepi32
#define _mm512_test_epi32_mask emulated::test_epi32
#define _mm512_reduce_add_ps emulated::reduce_add
#define _mm512_reduce_min_ps emulated::reduce_min
#define _mm512_reduce_max_ps emulated::reduce_max
#define _mm512_reduce_add_epi32 emulated::reduce_add_ints
#define _mm512_cvtepi32_ps emulated::convert<float, int32_t, __m512>
#define _mm512_cvtps_epi32 emulated::cvtps_epi32
#define _mm512_cvtepi16_epi32 emulated::convert<int32_t, int16_t, __m512i>
#define _mm512_cvtepu16_epi32 emulated::convert<uint32_t, uint16_t, __m512i>
#define _mm512_cvtepi32_epi16 emulated::convert<int16_t, int32_t, __m256i>
#define _mm512_cvtph_ps emulated::cvtph_ps
#define _mm512_cvtps_ph(v, how) emulated::cvtps_ph(v)
// The tile registers, and the questions whether this machine has them.
#undef _tile_loadd
#undef _tile_stored
#undef _tile_zero
#undef _tile_dpbf16ps
#undef _tile_dpbssd
#undef __get_cpuid_count
#define _tile_loadconfig(p) std::memcpy(&emulated::tile_config, p, 64)
#define _tile_release() void(emulated::tile_config = {})
#define _tile_loadd emulated::tile_load
#define _tile_stored emulated::tile_store
#define _tile_zero(tile) void(emulated::tiles[tile] = {})
#define _tile_dpbf16ps emulated::tile_dpbf16ps
#define _tile_dpbssd emulated::tile_dpbssd
#define __get_cpuid_count(leaf, part, a, b, c, d) (*(a) = *(b) = *(c) = 0, *(d) = ~0u, 1)
#define syscall emulated::granted

// Sums of activations by Intel's tile registers (AMX): up to 16 rows of x by 16 outputs an
// instruction, of 32 columns in bfloat16 or 64 in bytes. All are integers, and exact: products are
// the same, to the last bit, as by lookups.
#pragma once

#include "avx512-inl.h"

namespace onebit::cpu {
namespace {

// Which tile register holds what: sums in the first four, x, bits of weights. Numbers, for the
// intrinsics paste them into instructions.
#define ONEBIT_X_TILE 4
#define ONEBIT_W_TILE 5
#define ONEBIT_W_TILE_2 6

// The shapes of the tile registers while this lives: sums and x of `rows` rows, and `depth` rows of
// weights, which meet as many dwords of x.
class TileShapes {
 public:
  TileShapes(int rows, int depth) {
    for (int i = 0; i < ONEBIT_X_TILE; ++i) set(i, rows, 16);
    set(ONEBIT_X_TILE, rows, depth);
    set(ONEBIT_W_TILE, depth, 16);
    set(ONEBIT_W_TILE_2, depth, 16);
    asm volatile("" : : "m"(shapes_));
    _tile_loadconfig(&shapes_);
  }
  ~TileShapes() { _tile_release(); }
  TileShapes(const TileShapes&) = delete;
  TileShapes& operator=(const TileShapes&) = delete;

 private:
  void set(int tile, int rows, int dwords) {
    shapes_.rows[tile] = uint8_t(rows);
    shapes_.row_bytes[tile] = uint16_t(4 * dwords);
  }

  struct {
    uint8_t palette = 1, start_row = 0, reserved[14] = {};
    uint16_t row_bytes[16] = {};
    uint8_t rows[16] = {};
  } shapes_;
  static_assert(sizeof shapes_ == 64, "what the instruction reads");
};

// 64 output rows in a tile. An index holds bits as numbers: S::spread makes S::kSpread dwords per
// output of a word. Tables hold x in the same order, a row of a tile register, or S::kTileRows of
// them, for each row of x.
template <class S>
struct TilesAmx : Avx512 {
  static constexpr int kVectors = 4;
  static constexpr int kRows = kVectors * kLanes;

  // Rows of weights in a tile register.
  template <int kWords>
  static constexpr int depth() {
    return S::kSpread * kWords < 16 ? S::kSpread * kWords : 16;
  }

  // Up to 4 words of each of `rows` rows, to index + group * ld. The last row stands for those
  // after it.
  template <int kWords>
  static void pack_rows(
      const uint32_t* w, int64_t stride, int rows, int words, uint32_t* index, int64_t ld) {
    for (int r = 0; r < kVectors; ++r) {
      const int row = r * kLanes < rows ? r * kLanes : rows - 1;
      __m512i v[4];
      transpose_dwords(reinterpret_cast<const char*>(w + row * stride), stride * 4, rows - 1 - row,
                       words * 4, v);
      ONEBIT_UNROLL
      for (int i = 0; i < 4; ++i) {
        if (i < words) S::spread(v[i], index + i / kWords * ld + S::dword(i % kWords * 32, r));
      }
    }
  }

  // The same of a tile of prepacked weights.
  template <int kWords>
  static void pack_prepacked(const char* block, uint32_t* index) {
    constexpr int kPairs = kVectors / 2;
    ONEBIT_UNROLL
    for (int word = 0; word < kWords; ++word) {
      ONEBIT_UNROLL
      for (int pair = 0; pair < kPairs; ++pair) {
        // 16 columns, and the next 16, of a row and of the 16th after it.
        const auto* p = block + (2 * word * kPairs + pair) * 64;
        const __m512i a = _mm512_loadu_si512(p), b = _mm512_loadu_si512(p + kPairs * 64);
        constexpr __mmask32 kUpper = 0xaaaaaaaa;
        S::spread(_mm512_mask_mov_epi16(a, kUpper, _mm512_slli_epi32(b, 16)),
                  index + S::dword(word * 32, 2 * pair));
        S::spread(_mm512_mask_mov_epi16(_mm512_srli_epi32(a, 16), kUpper, b),
                  index + S::dword(word * 32, 2 * pair + 1));
      }
    }
  }

 protected:
  // All sums of one group: 16 rows of a tile register for each vector of outputs.
  template <int kWords>
  static ONEBIT_INLINE void add_up(const uint32_t* index, const float* table, void* sums) {
    constexpr int kDepth = depth<kWords>(), kSteps = S::kSpread * kWords / kDepth;
    constexpr int kRowOfW = kRows * 4, kRowOfX = 4 * S::kSpread * kWords, kRowOfSums = kLanes * 4;
    const auto *w = reinterpret_cast<const char*>(index), *x = reinterpret_cast<const char*>(table);
    auto* out = static_cast<char*>(sums);
    asm volatile("" ::: "memory");  // the intrinsics do not say which memory they use
    _tile_zero(0);
    _tile_zero(1);
    _tile_zero(2);
    _tile_zero(3);
#define ONEBIT_ADD(sums, w)                 \
  if constexpr (S::kTileRows > 1) {         \
    _tile_dpbssd(sums, ONEBIT_X_TILE, w);   \
  } else {                                  \
    _tile_dpbf16ps(sums, ONEBIT_X_TILE, w); \
  }
    ONEBIT_UNROLL
    for (int i = 0; i < kSteps; ++i, x += 4 * kDepth, w += kDepth * kRowOfW) {
      _tile_loadd(ONEBIT_X_TILE, x, kRowOfX);
      _tile_loadd(ONEBIT_W_TILE, w, kRowOfW);
      ONEBIT_ADD(0, ONEBIT_W_TILE);
      _tile_loadd(ONEBIT_W_TILE_2, w + 64, kRowOfW);
      ONEBIT_ADD(1, ONEBIT_W_TILE_2);
      _tile_loadd(ONEBIT_W_TILE, w + 128, kRowOfW);
      ONEBIT_ADD(2, ONEBIT_W_TILE);
      _tile_loadd(ONEBIT_W_TILE_2, w + 192, kRowOfW);
      ONEBIT_ADD(3, ONEBIT_W_TILE_2);
    }
#undef ONEBIT_ADD
    constexpr int kTile = 16 * kRowOfSums;
    _tile_stored(0, out, kRowOfSums);
    _tile_stored(1, out + kTile, kRowOfSums);
    _tile_stored(2, out + 2 * kTile, kRowOfSums);
    _tile_stored(3, out + 3 * kTile, kRowOfSums);
    asm volatile("" ::: "memory");
  }
};

// x in bfloat16: in fixed point a value keeps the 8 significant bits it has, so that it is a
// bfloat16 again, and sums are below 2^24. For the columns j and 16 + j of every 32, a dword per
// output: 2 where a bit is set and 0 elsewhere.
struct TilesBFloat16 : TilesAmx<TilesBFloat16> {
  using Integer = int16_t;
  using Numbers = const int16_t*;
  static constexpr int kSpread = 16;
  static constexpr int kTileRows = 1;
  static constexpr int kMaxM = 16;

  static constexpr int index_size(int words) { return words * kSpread * kRows; }
  static constexpr int table_size(int words) { return words * kSpread; }

  static constexpr int dword(int column, int r) {
    return ((column / 32 * 16 + column % 16) * kVectors + r) * kLanes;
  }
  static constexpr int bit(int column, int) { return column % 32 / 16 * 16 + 14; }

  // 32 columns of 16 outputs: bit j of each 16 goes to bit 14.
  static ONEBIT_INLINE void spread(__m512i words, uint32_t* out) {
    const __m512i twos = _mm512_set1_epi16(0x4000);
    ONEBIT_UNROLL
    for (int j = 0; j < 16; ++j) {
      const __m512i there = j < 15 ? _mm512_slli_epi16(words, 14 - j) : _mm512_srli_epi16(words, 1);
      _mm512_store_si512(out + j * kRows, _mm512_and_si512(there, twos));
    }
  }

  // Row m of a table: halves of integers, for bits are doubled.
  template <int kM, int kWords>
  static ONEBIT_INLINE void build(const int16_t* q, int m, float* table) {
    float* out = table + m * table_size(kWords);
    ONEBIT_UNROLL
    for (int word = 0; word < kWords; ++word, q += 32) {
      const auto halves = [&](const int16_t* some) __attribute__((always_inline)) {
        const __m256i v = _mm256_load_si256(reinterpret_cast<const __m256i*>(some));
        return mul(set(0.5f), to_floats(_mm512_cvtepi16_epi32(v)));
      };
      const __m512i low = _mm512_castps_si512(halves(q)),
                    high = _mm512_castps_si512(halves(q + 16));
      const __m512i both = _mm512_mask_mov_epi16(high, 0x55555555, _mm512_srli_epi32(low, 16));
      store(out + word * kLanes, _mm512_castsi512_ps(both));
    }
  }

  // emit(r, v): v[m] = the sums of one group of row m of x where the bits of the rows of vector r
  // are set: integers, as floats.
  template <int kM, int kWords, bool = true, class Emit>
  static ONEBIT_INLINE void tile(const uint32_t* index,
                                 const float* table,
                                 const int32_t*,
                                 const Emit& emit) {
    alignas(64) float all[kVectors][kMaxM][kLanes];
    add_up<kWords>(index, table, all);
    ONEBIT_UNROLL
    for (int r = 0; r < kVectors; ++r) {
      Vec sums[kM];
      ONEBIT_UNROLL
      for (int m = 0; m < kM; ++m) sums[m] = _mm512_load_ps(all[r][m]);
      emit(r, sums);
    }
  }
};

// x in 4 bytes, each a row of a tile register. For the columns j, 8 + j, 16 + j and 24 + j of every
// 32, a dword per output: 1 where a bit is set and 0 elsewhere.
struct TilesBytes : TilesAmx<TilesBytes> {
  using Integer = int32_t;
  using Numbers = const int32_t*;
  static constexpr int kSpread = 8;
  static constexpr int kTileRows = 4;
  static constexpr int kMaxM = 4;

  static constexpr int index_size(int words) { return words * kSpread * kRows; }
  static constexpr int table_size(int words) { return words * kSpread * kTileRows; }

  static constexpr int dword(int column, int r) {
    return ((column / 32 * 8 + column % 8) * kVectors + r) * kLanes;
  }
  static constexpr int bit(int column, int) { return column % 32 / 8 * 8; }

  // 32 columns of 16 outputs: bit j of each byte goes to bit 0, by a matrix of bits.
  static ONEBIT_INLINE void spread(__m512i words, uint32_t* out) {
    ONEBIT_UNROLL
    for (int j = 0; j < 8; ++j) {
      const __m512i from = _mm512_set1_epi64(int64_t(uint64_t(1) << (56 + j)));
      _mm512_store_si512(out + j * kRows, _mm512_gf2p8affine_epi64_epi8(words, from, 0));
    }
  }

  // Row m of a table. All bytes are signed: the higher ones make up for it.
  template <int kM, int kWords>
  static ONEBIT_INLINE void build(const int32_t* q, int m, float* table) {
    constexpr int kRow = kSpread * kWords;
    float* out = table + m * table_size(kWords);
    ONEBIT_UNROLL
    for (int word = 0; word < kWords; ++word, q += 32, out += kSpread) {
      const auto signed_bytes = [&](const int32_t* from) __attribute__((always_inline)) {
        const __m512i sign = _mm512_set1_epi32(0x808080);
        return _mm512_xor_si512(_mm512_add_epi32(_mm512_load_si512(from), sign), sign);
      };
      const __m512i low = signed_bytes(q), high = signed_bytes(q + 16);
      ONEBIT_UNROLL
      for (int b = 0; b < kTileRows; b += 2) {
        const __m512i two = _mm512_permutex2var_epi8(low, order(b), high);
        auto* to = reinterpret_cast<__m256i*>(out + b * kRow);
        auto* next = reinterpret_cast<__m256i*>(out + (b + 1) * kRow);
        _mm256_store_si256(to, _mm512_castsi512_si256(two));
        _mm256_store_si256(next, _mm512_extracti64x4_epi64(two, 1));
      }
    }
  }

  // emit(r, v): v[m] = the sums of one group of row m of x where the bits of the rows of vector r
  // are set, doubled, less those of the whole group, `group`.
  template <int kM, int kWords, bool = true, class Emit>
  static ONEBIT_INLINE void tile(const uint32_t* index,
                                 const float* table,
                                 const int32_t* group,
                                 const Emit& emit) {
    alignas(64) int32_t all[kVectors][kMaxM][kTileRows][kLanes];
    add_up<kWords>(index, table, all);
    ONEBIT_UNROLL
    for (int r = 0; r < kVectors; ++r) {
      __m512i sums[kM];
      ONEBIT_UNROLL
      for (int m = 0; m < kM; ++m) {
        sums[m] = _mm512_load_si512(all[r][m][3]);
        ONEBIT_UNROLL
        for (int b = 2; b >= 0; --b) {
          sums[m] =
              _mm512_add_epi32(_mm512_slli_epi32(sums[m], 8), _mm512_load_si512(all[r][m][b]));
        }
        sums[m] = _mm512_sub_epi32(sums[m], _mm512_set1_epi32(group[m]));
      }
      emit(r, sums);
    }
  }

 private:
  // Bytes `first` and the next of integers j, 8 + j, 16 + j, 24 + j to dwords j and 8 + j.
  static ONEBIT_INLINE __m512i order(int first) {
    struct Orders {
      alignas(64) uint8_t byte[2][64];
    };
    static constexpr Orders kOrders = [] {
      Orders orders{};
      for (int i = 0; i < 128; ++i) {
        const int at = i % 64, integer = at % 4 * 8 + at % 32 / 4;
        orders.byte[i / 64][at] = uint8_t(integer * 4 + i / 32);
      }
      return orders;
    }();
    return _mm512_load_si512(kOrders.byte[first / 2]);
  }
};

#undef ONEBIT_X_TILE
#undef ONEBIT_W_TILE
#undef ONEBIT_W_TILE_2

}  // namespace
}  // namespace onebit::cpu

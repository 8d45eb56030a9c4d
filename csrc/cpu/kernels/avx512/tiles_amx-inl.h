// Sums of bfloat16 activations by Intel's tile registers (AMX): 16 rows of x by 16 outputs by 32
// columns an instruction. In fixed point a bfloat16 value keeps the 8 significant bits it has, so
// that it is a bfloat16 again, and all sums are integers below 2^24: exact, and products the same,
// to the last bit, as by lookups.
#pragma once

#include "avx512-inl.h"

namespace onebit::cpu {
namespace {

// Which tile register holds what: sums in the first four, x, bits of weights. Numbers, for the
// intrinsics paste them into instructions.
#define ONEBIT_X_TILE 4
#define ONEBIT_W_TILE 5
#define ONEBIT_W_TILE_2 6

// The shapes of the tile registers while this lives: for products of up to `rows` rows of x.
class TileShapes {
 public:
  explicit TileShapes(int rows) {
    for (int i = 0; i <= ONEBIT_X_TILE; ++i) set(i, rows);
    set(ONEBIT_W_TILE, 16);
    set(ONEBIT_W_TILE_2, 16);
    asm volatile("" : : "m"(shapes_));
    _tile_loadconfig(&shapes_);
  }
  ~TileShapes() { _tile_release(); }
  TileShapes(const TileShapes&) = delete;
  TileShapes& operator=(const TileShapes&) = delete;

 private:
  void set(int tile, int rows) {
    shapes_.rows[tile] = uint8_t(rows);
    shapes_.row_bytes[tile] = 64;
  }

  struct {
    uint8_t palette = 1, start_row = 0, reserved[14] = {};
    uint16_t row_bytes[16] = {};
    uint8_t rows[16] = {};
  } shapes_;
  static_assert(sizeof shapes_ == 64, "what the instruction reads");
};

// 64 output rows in a tile. `index`: for the columns j and 16 + j of every 32, a dword per output:
// 2 where a bit is set and 0 elsewhere, in bfloat16. Tables hold x in this order.
struct TilesAmx : Avx512 {
  using Integer = int16_t;
  using Numbers = const int16_t*;
  static constexpr int kVectors = 4;
  static constexpr int kRows = kVectors * kLanes;
  static constexpr int kMaxM = 16;

  static constexpr int index_size(int words) { return words * 16 * kRows; }
  static constexpr int table_size(int words) { return words * 16; }

  static constexpr int dword(int column, int r) {
    return ((column / 32 * 16 + column % 16) * kVectors + r) * kLanes;
  }
  static constexpr int bit(int column, int) { return column % 32 / 16 * 16 + 14; }

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
        if (i < words) spread(v[i], index + i / kWords * ld + dword(i % kWords * 32, r));
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
        spread(_mm512_mask_mov_epi16(a, kUpper, _mm512_slli_epi32(b, 16)),
               index + dword(word * 32, 2 * pair));
        spread(_mm512_mask_mov_epi16(_mm512_srli_epi32(a, 16), kUpper, b),
               index + dword(word * 32, 2 * pair + 1));
      }
    }
  }

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
    add_up<kWords>(reinterpret_cast<const char*>(index), reinterpret_cast<const char*>(table),
                   reinterpret_cast<char*>(all));
    ONEBIT_UNROLL
    for (int r = 0; r < kVectors; ++r) {
      Vec sums[kM];
      ONEBIT_UNROLL
      for (int m = 0; m < kM; ++m) sums[m] = _mm512_load_ps(all[r][m]);
      emit(r, sums);
    }
  }

 private:
  template <int kWords>
  static ONEBIT_INLINE void add_up(const char* w, const char* x, char* out) {
    constexpr int kRowOfW = kRows * 4, kRowOfX = 64 * kWords, kRowOfSums = kLanes * 4;
    asm volatile("" ::: "memory");  // the intrinsics do not say which memory they use
    _tile_zero(0);
    _tile_zero(1);
    _tile_zero(2);
    _tile_zero(3);
    ONEBIT_UNROLL
    for (int i = 0; i < kWords; ++i, x += 64, w += 16 * kRowOfW) {
      _tile_loadd(ONEBIT_X_TILE, x, kRowOfX);
      _tile_loadd(ONEBIT_W_TILE, w, kRowOfW);
      _tile_dpbf16ps(0, ONEBIT_X_TILE, ONEBIT_W_TILE);
      _tile_loadd(ONEBIT_W_TILE_2, w + 64, kRowOfW);
      _tile_dpbf16ps(1, ONEBIT_X_TILE, ONEBIT_W_TILE_2);
      _tile_loadd(ONEBIT_W_TILE, w + 128, kRowOfW);
      _tile_dpbf16ps(2, ONEBIT_X_TILE, ONEBIT_W_TILE);
      _tile_loadd(ONEBIT_W_TILE_2, w + 192, kRowOfW);
      _tile_dpbf16ps(3, ONEBIT_X_TILE, ONEBIT_W_TILE_2);
    }
    constexpr int kTile = kMaxM * kRowOfSums;
    _tile_stored(0, out, kRowOfSums);
    _tile_stored(1, out + kTile, kRowOfSums);
    _tile_stored(2, out + 2 * kTile, kRowOfSums);
    _tile_stored(3, out + 3 * kTile, kRowOfSums);
    asm volatile("" ::: "memory");
  }
};

#undef ONEBIT_X_TILE
#undef ONEBIT_W_TILE
#undef ONEBIT_W_TILE_2

}  // namespace
}  // namespace onebit::cpu

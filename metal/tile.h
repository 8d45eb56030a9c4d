// The tile products of qmm and qmm_sorted, on 8 x 8 simdgroup matrices of E with float sums.
//
// E is float, or the dtype of x when that has 16 bits: x is then multiplied as it is, with levels
// that are rounded to its dtype as plain torch rounds its weights, and the products are exact in
// float. (Neither bits that are scaled afterwards nor the ratio of the two levels do without the
// rounding: scale * set + bias * all cancels when outliers meet a level of 0, and a ratio is
// rounded where both levels would not be.) simdgroup_matrix<bfloat> is emulated by the oldest GPUs:
// launch_plan.h knows from which on it is not.
#pragma once
#include "tile_levels.h"

// Threadgroup memory in units of 16 bytes: x and w, twice. While one half is multiplied the other
// is filled, so that a step of k needs one barrier.
template <typename E, uint I>
constexpr uint half_vectors() {
  return (16 * I + kTileN) * stride_of<E>() * sizeof(E) / 16;
}

// One half of it.
template <typename E>
struct Tiles {
  threadgroup E* x;  // [16 * I, 32]
  threadgroup E* w;  // [kTileN, 32]
};
template <typename E, uint I>
inline Tiles<E> tiles_of(threadgroup float4* memory, uint half_index) {
  Tiles<E> tiles;
  tiles.x = (threadgroup E*)(memory + half_index * half_vectors<E, I>());
  tiles.w = tiles.x + 16 * I * stride_of<E>();
  return tiles;
}

// Element by element, so that which lane holds what does not matter.
inline void add_to(thread simdgroup_float8x8& sum, thread simdgroup_float8x8& block) {
  reinterpret_cast<thread float2&>(sum.thread_elements()) +=
      reinterpret_cast<thread float2&>(block.thread_elements());
}

// sum += x . w^T for one simdgroup's 8 I x 16 of the output tile. The terms of a step are summed by
// themselves, in two halves: longer sums in one register round more, 2.6 times the error of plain
// torch (which has 16) at 192 terms.
template <typename E, uint I>
inline void multiply_tiles(Tiles<E> tiles, uint simdgroup, thread simdgroup_float8x8 (&sum)[I][2]) {
  const uint m = simdgroup / 2 * 8 * I, n = simdgroup % 2 * 16;
  const ulong stride = stride_of<E>();
  simdgroup_matrix<E, 8, 8> a[4], b[2][4];
  ONEBIT_UNROLL
  for (uint j = 0; j < 2; j++) {
    ONEBIT_UNROLL
    for (uint k = 0; k < 4; k++) {
      simdgroup_load(b[j][k], tiles.w + (n + j * 8) * stride + k * 8, stride, ulong2(0), true);
    }
  }
  ONEBIT_UNROLL
  for (uint i = 0; i < I; i++) {
    ONEBIT_UNROLL
    for (uint k = 0; k < 4; k++) {
      simdgroup_load(a[k], tiles.x + (m + i * 8) * stride + k * 8, stride);
    }
    ONEBIT_UNROLL
    for (uint j = 0; j < 2; j++) {
      simdgroup_float8x8 block[2];
      ONEBIT_UNROLL
      for (uint h = 0; h < 2; h++) {
        block[h] = make_filled_simdgroup_matrix<float, 8, 8>(0.0f);
        simdgroup_multiply_accumulate(block[h], a[2 * h], b[j][2 * h], block[h]);
        simdgroup_multiply_accumulate(block[h], a[2 * h + 1], b[j][2 * h + 1], block[h]);
      }
      add_to(block[0], block[1]);
      add_to(sum[i][j], block[0]);
    }
  }
}

// One word of w, four threads to a row of it. Where their two vectors of four lie is what lets the
// threads of a simdgroup meet every bank equally often.
template <typename E>
inline void load_w(threadgroup E* tile, uint bits, TileLevels<E> levels, uint thread_index) {
  const uint row = thread_index / 4, part = thread_index % 4;
  const bool is_float = sizeof(E) == sizeof(float);
  const uint first = is_float ? part * 8 : part * 4, step = is_float ? 4 : 16;
  ONEBIT_UNROLL
  for (uint i = 0; i < 2; i++) {
    const uint column = first + i * step;
    vec<E, 4> four;
    ONEBIT_UNROLL
    for (uint j = 0; j < 4; j++) four[j] = bit_of(bits, column + j) ? levels.one : levels.zero;
    *(threadgroup vec<E, 4>*)(tile + row * stride_of<E>() + column) = four;
  }
}

// One matrix of w.
struct Weights {
  const device uint* packed;
  const device void* scales;
  const device void* biases;
  uint first_level;  // of the matrix, in scales and biases
};

// The part of one output tile that is summed and stored.
struct Extent {
  uint n0;                    // first output
  uint row_begin, row_end;    // of the tile's rows of x
  uint word_begin, word_end;  // of k
  bool valid;                 // else the result is NaN
};

// y[row, n0 + column] = tile, for the rows of the extent and columns inside n.
template <uint I, typename O>
inline void store_tile(
    device O* y, uint n, Extent extent, const threadgroup float* tile, uint thread_index) {
  for (uint i = thread_index; i < 16 * I * kTileN; i += kTileThreads) {
    const uint row = i / kTileN, column = i % kTileN;
    const bool inside = row >= extent.row_begin && row < extent.row_end && extent.n0 + column < n;
    if (!inside) continue;
    const float value = tile[row * stride_of<float>() + column];
    y[row * n + extent.n0 + column] = extent.valid ? O(value) : O(NAN);
  }
}

// One output tile of 16 I rows. The tiles in threadgroup memory are free again when it returns.
template <typename E, uint I, typename T, typename O>
inline void product_tile(const device T* x,
                         XRows<I> rows,
                         Weights w,
                         Extent extent,
                         device O* y,
                         constant QmmParams& p,
                         threadgroup float4* memory,
                         uint simdgroup,
                         uint thread_index) {
  const uint words = p.k / kWordBits, groups = words >> p.group_shift;
  ONEBIT_UNROLL
  for (uint i = 0; i < I; i++) {
    const uint row = x_row(thread_index, i);
    rows.inside[i] = row >= extent.row_begin && row < extent.row_end;
  }
  const uint w_row = extent.n0 + thread_index / 4;
  const bool w_inside = w_row < p.n;
  const device uint* packed = w.packed + (w_inside ? w_row : 0) * words;
  const uint group_mask = (1u << p.group_shift) - 1;

  simdgroup_float8x8 sum[I][2];
  ONEBIT_UNROLL
  for (uint i = 0; i < I; i++) {
    ONEBIT_UNROLL
    for (uint j = 0; j < 2; j++) sum[i][j] = make_filled_simdgroup_matrix<float, 8, 8>(0.0f);
  }
  Levels levels = {0.0f, 0.0f};
  TileLevels<E> in_tile = tile_levels<E>(levels);
  uint held = 0;
  for (uint word = extent.word_begin; word < extent.word_end; word++) {
    const uint step = word - extent.word_begin;
    if (step % 4 == 0) held = hold_word<4>(packed, word, extent.word_end, thread_index);
    // Read once per group and kept in registers over its words.
    if (w_inside && ((word & group_mask) == 0 || word == extent.word_begin)) {
      const uint level = w.first_level + w_row * groups + (word >> p.group_shift);
      levels = read_levels(w.scales, w.biases, level);
      in_tile = tile_levels<E>(levels);
    }
    const Tiles<E> tiles = tiles_of<E, I>(memory, word & 1);
    load_x<E, I>(tiles.x, x, rows, word * kWordBits, thread_index);
    load_w(tiles.w, held_word<4>(held, step, thread_index), in_tile, thread_index);
    // One barrier a step: the half that is filled next was multiplied before this one.
    threadgroup_barrier(mem_flags::mem_threadgroup);
    multiply_tiles<E, I>(tiles, simdgroup, sum);
  }
  // Out through threadgroup memory, for the edges and for whole lines.
  threadgroup_barrier(mem_flags::mem_threadgroup);
  threadgroup float* out = (threadgroup float*)memory;
  const uint m = simdgroup / 2 * 8 * I, n = simdgroup % 2 * 16;
  ONEBIT_UNROLL
  for (uint i = 0; i < I; i++) {
    ONEBIT_UNROLL
    for (uint j = 0; j < 2; j++) {
      simdgroup_store(sum[i][j], out + (m + i * 8) * stride_of<float>() + n + j * 8,
                      stride_of<float>());
    }
  }
  threadgroup_barrier(mem_flags::mem_threadgroup);
  store_tile<I>(y, p.n, extent, out, thread_index);
  threadgroup_barrier(mem_flags::mem_threadgroup);
}

// The tile products of qmm, qmm_sorted and qmm_n, on 8 x 8 simdgroup matrices of float.
//
// Tiles hold float whatever the dtype of x: the products are then as exact as the float sums, and
// simdgroup_matrix<bfloat>, which the oldest GPUs emulate, is not needed.
#pragma once
#include "common.h"

// Row stride of a tile in threadgroup memory: 4 floats more than its width, so that the 8 rows of a
// matrix start in different banks.
constant constexpr uint kPad = 4;
constant constexpr uint kStride = 32 + kPad;

// Terms of k summed in one accumulator before it is added to the total: long sums in one register
// round more, 2.6 times the error of plain torch (16 accumulators) at 192 terms; of 64, 1.5 times.
constant constexpr uint kBlockK = 64;

// total += block, block = 0. Element by element, so that which lane holds what does not matter.
inline void flush(thread simdgroup_float8x8& total, thread simdgroup_float8x8& block) {
  reinterpret_cast<thread float2&>(total.thread_elements()) +=
      reinterpret_cast<thread float2&>(block.thread_elements());
  block = make_filled_simdgroup_matrix<float, 8, 8>(0.0f);
}

// acc += x_tile . w_tile^T for one simdgroup's 16 x 16 of the 32 x 32 output tile.
inline void multiply_tiles(const threadgroup float* x_tile,
                           const threadgroup float* w_tile,
                           uint simdgroup,
                           thread simdgroup_float8x8 (&acc)[2][2]) {
  const uint m = simdgroup / 2 * 16, n = simdgroup % 2 * 16;
  for (uint k = 0; k < 32; k += 8) {
    simdgroup_float8x8 a[2], b[2];
    for (uint i = 0; i < 2; i++) {
      simdgroup_load(a[i], x_tile + (m + i * 8) * kStride + k, kStride);
      simdgroup_load(b[i], w_tile + (n + i * 8) * kStride + k, kStride, ulong2(0), true);
    }
    for (uint i = 0; i < 2; i++) {
      for (uint j = 0; j < 2; j++) simdgroup_multiply_accumulate(acc[i][j], a[i], b[j], acc[i][j]);
    }
  }
}

// One thread's part of loading a tile: eight values of one row.
struct Eighth {
  uint row, column;
};
inline Eighth eighth_of(uint thread_index) {
  Eighth part = {thread_index / 4, thread_index % 4 * 8};
  return part;
}

// tile[row, column..] = x[0..8), or zeros when the row is outside (x is null).
template <typename T>
inline void load_x(threadgroup float* tile, Eighth part, const device T* x, bool inside) {
  threadgroup float* to = tile + part.row * kStride + part.column;
  for (uint i = 0; i < 8; i += 4) {
    const vec<float, 4> four = inside ? read_four(x + i) : vec<float, 4>(0.0f);
    for (uint j = 0; j < 4; j++) to[i + j] = four[j];
  }
}

// tile[row, column..] = eight decoded weights.
inline void load_w(threadgroup float* tile, Eighth part, uint bits, Levels levels) {
  threadgroup float* to = tile + part.row * kStride + part.column;
  const float one = levels.scale + levels.bias;
  for (uint i = 0; i < 8; i++) to[i] = select(levels.bias, one, bit_of(bits, part.column + i));
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
  uint row_begin, row_end;    // of the tile's 32 rows of x
  uint word_begin, word_end;  // of k
  bool valid;                 // else the result is NaN
};

// y[row, n0 + column] = tile, for the rows of the extent and columns inside n.
template <typename O>
inline void store_tile(
    device O* y, uint n, Extent extent, const threadgroup float* tile, uint thread_index) {
  for (uint i = thread_index; i < kTileM * kTileN; i += kTileThreads) {
    const uint row = i / kTileN, column = i % kTileN;
    const bool inside = row >= extent.row_begin && row < extent.row_end && extent.n0 + column < n;
    if (!inside) continue;
    y[row * n + extent.n0 + column] = extent.valid ? O(tile[row * kStride + column]) : O(NAN);
  }
}

// One output tile; x_row is this thread's row of x. The tiles in threadgroup memory are free again
// when it returns.
template <typename T, typename O>
inline void product_tile(const device T* x_row,
                         Weights w,
                         Extent extent,
                         device O* y,
                         constant QmmParams& p,
                         threadgroup float* x_tile,
                         threadgroup float* w_tile,
                         uint simdgroup,
                         uint thread_index) {
  const Eighth part = eighth_of(thread_index);
  const uint words = p.k / kWordBits, groups = words >> p.group_shift;
  const bool x_inside = part.row >= extent.row_begin && part.row < extent.row_end;
  const bool w_inside = extent.n0 + part.row < p.n;
  const uint w_row = w_inside ? extent.n0 + part.row : 0;
  const uint group_mask = (1u << p.group_shift) - 1;

  simdgroup_float8x8 acc[2][2], total[2][2];
  for (uint i = 0; i < 2; i++) {
    for (uint j = 0; j < 2; j++) {
      acc[i][j] = make_filled_simdgroup_matrix<float, 8, 8>(0.0f);
      total[i][j] = make_filled_simdgroup_matrix<float, 8, 8>(0.0f);
    }
  }
  Levels levels = {0.0f, 0.0f};
  for (uint word = extent.word_begin; word < extent.word_end; word++) {
    // Read once per group and kept in registers over its words.
    if (w_inside && (word & group_mask) == 0) {
      const uint level = w.first_level + w_row * groups + (word >> p.group_shift);
      levels = read_levels(w.scales, w.biases, level);
    }
    const uint bits = w_inside ? w.packed[w_row * words + word] : 0u;
    load_x(x_tile, part, x_row + word * kWordBits + part.column, x_inside);
    load_w(w_tile, part, bits, levels);
    threadgroup_barrier(mem_flags::mem_threadgroup);
    multiply_tiles(x_tile, w_tile, simdgroup, acc);
    threadgroup_barrier(mem_flags::mem_threadgroup);
    if ((word + 1) % (kBlockK / kWordBits) != 0 && word + 1 < extent.word_end) continue;
    for (uint i = 0; i < 2; i++) {
      for (uint j = 0; j < 2; j++) flush(total[i][j], acc[i][j]);
    }
  }
  const uint m = simdgroup / 2 * 16, n = simdgroup % 2 * 16;
  for (uint i = 0; i < 2; i++) {
    for (uint j = 0; j < 2; j++) {
      simdgroup_store(total[i][j], x_tile + (m + i * 8) * kStride + n + j * 8, kStride);
    }
  }
  threadgroup_barrier(mem_flags::mem_threadgroup);
  store_tile(y, p.n, extent, x_tile, thread_index);
  threadgroup_barrier(mem_flags::mem_threadgroup);
}

// What the kernels of tensor operations share. Sums are a cooperative tensor of float, whose layout
// is the system's affair.
#pragma once
#include <MetalPerformancePrimitives/MetalPerformancePrimitives.h>
#include <metal_tensor>

#include "tile_levels.h"

using namespace mpp::tensor_ops;

// Operands may not be const. A step of k is a word: less than 32 fails on macOS 26.1.
template <typename T>
using XTile = tensor<device T, dextents<int, 2>, tensor_inline>;
template <typename T>
using WTile = tensor<threadgroup T, dextents<int, 2>, tensor_inline>;

// 16 weights of a word, two threads to a word, such that the threads of a simdgroup meet every bank
// equally often.
template <typename T>
inline void load_half_word(threadgroup T* row, uint bits, TileLevels<T> levels, uint part) {
  ONEBIT_UNROLL
  for (uint i = 0; i < 4; i++) {
    const uint column = part * 4 + i * 8;
    vec<T, 4> four;
    ONEBIT_UNROLL
    for (uint j = 0; j < 4; j++) four[j] = bit_of(bits, column + j) ? levels.one : levels.zero;
    *(threadgroup vec<T, 4>*)(row + column) = four;
  }
}

template <typename Sum>
inline void clear_sums(thread Sum& sum) {
  ONEBIT_UNROLL
  for (ushort i = 0; i < sum.get_capacity(); i++) {
    if (sum.is_valid_element(i)) sum[i] = 0.0f;
  }
}

// The part of an output tile that is stored.
struct Block {
  uint n0;                  // first output
  uint row_begin, row_end;  // of the tile
  bool valid;               // else the result is NaN
};

template <typename Sum, typename O>
inline void store_sums(thread Sum& sum, device O* y, uint n, Block block) {
  ONEBIT_UNROLL
  for (ushort i = 0; i < sum.get_capacity(); i++) {
    if (!sum.is_valid_element(i)) continue;
    const auto at = sum.get_multidimensional_index(i);  // column, row
    const uint row = uint(at[1]), column = block.n0 + uint(at[0]);
    if (row < block.row_begin || row >= block.row_end || column >= n) continue;
    y[row * n + column] = block.valid ? O(sum[i]) : O(NAN);
  }
}

// Tiles of 32, 64 and 128 rows.
#define ONEBIT_INSTANTIATE_ROWS(kernel, type, rows)                         \
  ONEBIT_INSTANTIATE(#kernel "_" #type "_" #rows, kernel<type, type, rows>) \
  ONEBIT_INSTANTIATE(#kernel "_" #type "_" #rows "_partial", kernel<type, float, rows>)
#define ONEBIT_INSTANTIATE_TENSOR(kernel, type) \
  ONEBIT_INSTANTIATE_ROWS(kernel, type, 32)     \
  ONEBIT_INSTANTIATE_ROWS(kernel, type, 64)     \
  ONEBIT_INSTANTIATE_ROWS(kernel, type, 128)

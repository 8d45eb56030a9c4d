// What the host and the kernels must agree on: the argument of each kernel, passed by value, and
// tile sizes that both sides compute with.
#pragma once
#if defined(__CUDACC_RTC__)
typedef unsigned char uint8_t;
typedef unsigned short uint16_t;
typedef unsigned int uint32_t;
typedef long long int64_t;
typedef unsigned long long uint64_t;
#else
#include <cstdint>
#endif

#include "../format.h"

namespace onebit {

// Threads of a block in kernels whose blocks do not cooperate.
constexpr uint32_t kBlockThreads = 256;

// quantize: a thread reads 16 bytes kQuantizeChunks times.
constexpr uint32_t kQuantizeChunks = 2;
struct QuantizeArgs {
  const void* w;  // [groups, group_size]
  uint32_t* packed;
  void* scales;
  void* biases;
  int64_t groups;
};

// dequantize, embedding: a thread writes 16 bytes kDecodeChunks times.
constexpr uint32_t kDecodeChunks = 2;
struct DecodeArgs {
  const uint32_t* packed;  // [rows, words]
  const void* scales;      // [rows, words / group_words]
  const void* biases;      // as scales, or null
  const int64_t* indices;  // rows of packed, or null: all in order
  void* out;
  int64_t rows;             // of packed
  int64_t words;            // of a row
  uint32_t blocks_per_row;  // of the grid
};

// y[b] [m, n] = x[x_index[b]] [m, k] . w[w_index[b]]; the indices are null when there is one matrix
// of each.
struct ProductArgs {
  const void* x;           // [x_matrices, m, k]
  const uint32_t* packed;  // [w_matrices, n, k / 32], or [w_matrices, k, n / 32]
  const void* scales;
  const void* biases;  // or null
  void* y;             // [batches, m, n]
  const int64_t* x_index;
  const int64_t* w_index;
  int64_t x_matrices, w_matrices;
  uint32_t m, n, k;
  // of b1 alone
  uint32_t* planes;  // [k / 128, m, planes / 8, 32]
  float* groups;  // [k / group_size, m, 4]: unit of the fixed point (NaN: none), sum of x, its rest
};

// A CUtensorMap, which cuda.h aligns and the driver fills.
struct alignas(64) TensorMap {
  uint64_t opaque[16];
};

// As ProductArgs, for one matrix whose tiles the copy engine brings.
struct WgmmaArgs {
  TensorMap x;      // [parts, k / 64, m, 64]
  TensorMap words;  // [n, k / 32]
  const void* scales;
  const void* biases;
  const float* sums;  // [2, k / group_size, sum_rows], of float32 x: of its first part, of the rest
  void* y;            // [m, n], or [splits, m, n] partial sums
  uint32_t m, n, k;
  uint32_t steps;     // stages in one split
  uint32_t sum_rows;  // m, up to whole tiles: no bound is checked there
};

// As ProductArgs, for one matrix in tiles.
struct TileArgs {
  const void* x;
  const uint32_t* packed;
  const void* scales;
  const void* biases;
  void* y;  // [m, n], or [splits, m, n] partial sums
  uint32_t m, n, k;
  uint32_t steps;  // of 128 columns, in one split
};
constexpr int kTileOutputs = 128;
constexpr int kTileThreads = 256;

// x = p0 + p1 + p2, bfloat16 each, and the group sums of p0 and of the others.
struct SplitArgs {
  const float* x;   // [m, k]
  uint16_t* parts;  // [3, m, k]
  float* sums;      // [2, k / group_size, sum_rows], zeros beyond m
  uint32_t m, k, sum_rows;
};

struct SumArgs {
  const float* partial;  // [splits, count]
  void* y;               // [count]
  int64_t count;
  uint32_t splits;
};

// dW = by_row^T . by_column, with by_row [m, rows] the gradient and by_column [m, columns] x, or
// the other way round when w is not transposed.
struct AffineGradArgs {
  const void* grad;        // [batches, m, n]
  const void* x;           // [x_matrices, m, k]
  const uint32_t* packed;  // [w_matrices, rows, columns / 32]
  float* grad_scales;      // [w_matrices, rows, columns / group_size]
  float* grad_biases;
  const int64_t* x_index;
  const int64_t* w_index;
  int64_t x_matrices;
  uint32_t batches, m, rows, columns;
  uint32_t x_by_row;  // 1 when x is by_row
};
constexpr uint32_t kGradRows = 4;
constexpr uint32_t kGradWarps = 4;

// quantize_levels, fake_quantize, ...: a warp owns a group of w; of the best cut several, so that a
// block has a group for every lane of the warp that sums them, as far as its shared memory goes.
struct GroupArgs {
  const void* w;
  const void* grad;         // as w, in the other dtype
  const void* scales;       // of the affine kernels
  const void* biases;       // as scales
  const float* importance;  // [period, group_size]
  uint32_t* packed;
  void* out;     // as w
  void* first;   // [groups]: scales, or their gradient
  void* second;  // [groups]: biases, or their gradient
  int64_t groups;
  int64_t period;  // importance repeats after so many groups
};
constexpr uint32_t kGroupWarps = 8;
constexpr uint32_t groups_of_warp(Rule rule, bool has_importance) {
  return rule != Rule::kOptimal ? 1 : has_importance ? 2 : 4;
}

struct FlipArgs {
  bool* bits;            // [rows, columns]
  float* error;          // [rows, width], follows the flips
  const float* scales;   // [rows, columns / group_size]
  const float* moments;  // [columns, columns]
  float* changes;        // [rows, width]
  uint32_t rows, columns;
  uint32_t begin, width;  // of the block
};
constexpr uint32_t kFlipWarps = 4;

}  // namespace onebit

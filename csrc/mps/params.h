// What the host and the shaders must agree on: arguments, tile sizes, function constants.
#pragma once
#if !defined(__METAL_VERSION__)
#include <cstdint>
#endif

#include "../format.h"

namespace onebit {

ONEBIT_CONSTANT uint32_t kLanes = 32;  // of a simdgroup, on every Apple GPU

// Function constants: a pipeline is compiled for one value of each, so a branch on them is free.
// The dtypes of levels and of fake-quantized weights (a DType each), whether there are biases and
// an index, words of a group, the rule (a Rule) and whether values are weighted. Template
// parameters would make nine instances of a kernel where dtypes are mixed; these leave three.
#define ONEBIT_FUNCTION_CONSTANTS(X) \
  X(uint, LevelType, 0)              \
  X(bool, HasBiases, 1)              \
  X(bool, Indexed, 2)                \
  X(uint, GroupWords, 3)             \
  X(uint, OtherType, 4)              \
  X(uint, Rule, 5)                   \
  X(bool, HasImportance, 6)
#if !defined(__METAL_VERSION__)  // metal/common.h for the shaders
#define ONEBIT_INDEX(type, name, index) constexpr uint32_t k##name##Constant = index;
ONEBIT_FUNCTION_CONSTANTS(ONEBIT_INDEX)
#endif

// Arguments. group_shift is log2 of the words in a group; every size counts elements.

// quantize, quantize_levels, fake_quantize, ...: a simdgroup owns a group of w.
struct GroupParams {
  uint32_t groups;
  uint32_t period;  // importance repeats after so many groups
};
ONEBIT_CONSTANT uint32_t kGroupSimdgroups = 8;

struct FlipParams {
  uint32_t rows, columns;  // of the bits
  uint32_t begin, width;   // of the block
};
ONEBIT_CONSTANT uint32_t kFlipSimdgroups = 8;

struct DecodeParams {
  uint32_t rows;   // of packed; one when all of it is decoded as one long row
  uint32_t words;  // of a row
  uint32_t group_shift;
};
ONEBIT_CONSTANT uint32_t kDecodeThreads = 256;  // 8 values each: one byte of packed

// y[b] [m, n] = x[x_index[b]] [m, k] . w[w_index[b]]. Where a repeat is not 0 there is no index:
// the matrix is (b / repeat) % matrices.
struct QmmParams {
  uint32_t m, n, k;
  uint32_t group_shift;
  uint32_t x_matrices, w_matrices;
  uint32_t batches;
  uint32_t split_k;  // terms of k in one split; k when the sum is not split
  uint32_t x_repeat, w_repeat;
};

// qmv: one row of x. A simdgroup owns kQmvRows outputs.
ONEBIT_CONSTANT uint32_t kQmvRows = 8;
ONEBIT_CONSTANT uint32_t kQmvSimdgroups = 2;

// qmv_wide: 2 to 8 rows of x share every decoded weight. A simdgroup owns so many outputs that it
// keeps 16 sums a lane: more spill (3 rows in float32: 7 times the time of reading w,
// PrismML mlx #9).
ONEBIT_CONSTANT uint32_t kWideSimdgroups = 2;
ONEBIT_CONSTANT uint32_t kWideMaxM = 8;
constexpr uint32_t wide_outputs(uint32_t m) { return m <= 4 ? 4 : 2; }

// qmm: tiles of y [kTileM, kTileN], or of twice the rows; k in steps of one word.
ONEBIT_CONSTANT uint32_t kTileM = 32;
ONEBIT_CONSTANT uint32_t kTileN = 32;
// qmm_n: a tile is as wide as the largest group, so that every scale is read once per tile row.
ONEBIT_CONSTANT uint32_t kTileWideN = 128;
ONEBIT_CONSTANT uint32_t kTileK = 32;
ONEBIT_CONSTANT uint32_t kTileThreads = 128;
ONEBIT_CONSTANT uint32_t kTileWideThreads = 256;

// qmm_tensor, qmm_n_tensor: tiles of y [32, 64 or 128, kTensorN]; k in steps of kTileK.
// qmm_sorted_tensor: tiles of [kTileM, kTensorN].
ONEBIT_CONSTANT uint32_t kTensorN = 64;
ONEBIT_CONSTANT uint32_t kTensorSimdgroups = 4;

// qvm: a lane owns one word, 32 outputs; simdgroups share the rows of w.
ONEBIT_CONSTANT uint32_t kQvmSimdgroups = 8;

struct SumParams {
  uint32_t count;   // elements of y
  uint32_t splits;  // partial sums of each
};
ONEBIT_CONSTANT uint32_t kSumThreads = 256;

// grad_scales, grad_biases [w_matrices, rows, groups] of w [rows, columns]: dW = by_row^T .
// by_column, with by_row [m, rows] the gradient and by_column [m, columns] x, or the other way
// round when w is not transposed.
struct AffineGradParams {
  uint32_t m, rows, columns;
  uint32_t group_shift;
  uint32_t batches;  // matrices of the gradient
  uint32_t x_matrices, w_matrices;
  uint32_t x_by_row;  // 1 when x is by_row
  uint32_t x_repeat, w_repeat;
};
ONEBIT_CONSTANT uint32_t kGradRows = 4;
ONEBIT_CONSTANT uint32_t kGradSimdgroups = 4;

}  // namespace onebit

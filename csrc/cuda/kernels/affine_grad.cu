// Gradients of scales and biases. With dW = by_row^T . by_column [rows, columns]:
//   grad_scales[r, g] = sum of dW[r, j] over the group where the bit is 1
//   grad_biases[r, g] = sum of dW[r, j] over the group
// dW itself is never formed: per row m of the two, a lane sums 32 values of by_column once under
// the bits of each of its rows of w and once in full, and multiplies both sums with by_row[m, r].
// Block: kGradWarps warps of kGradRows rows each; a lane owns one word.
#include "common.cuh"

using X = ONEBIT_X;

ONEBIT_KERNEL __launch_bounds__(kGradWarps * 32)
    affine_grad(const __grid_constant__ AffineGradArgs p) {
  const uint32_t lane = threadIdx.x & 31, warp = threadIdx.x >> 5;
  constexpr uint32_t kRowsOfBlock = kGradRows * kGradWarps;
  const uint32_t row_blocks = (p.rows + kRowsOfBlock - 1) / kRowsOfBlock;
  const int64_t matrix = blockIdx.x / row_blocks;
  const uint32_t row0 = blockIdx.x % row_blocks * kRowsOfBlock + warp * kGradRows;
  if (row0 >= p.rows) return;
  const uint32_t words = p.columns / kWordBits, groups = words / kGroupWords;
  const uint32_t word = blockIdx.y * 32 + lane;
  const bool inside = word < words;

  uint32_t row[kGradRows], bits[kGradRows];
  float scale_sum[kGradRows] = {}, bias_sum[kGradRows] = {};
  ONEBIT_UNROLL
  for (int r = 0; r < int(kGradRows); r++) {
    row[r] = min(row0 + r, p.rows - 1);  // past the end: the last row again, not stored
    bits[r] = inside ? p.packed[(matrix * p.rows + row[r]) * words + word] : 0u;
  }
  for (uint32_t b = 0; b < p.batches; b++) {
    // An index out of range names no matrix: its product was NaN and moves no gradient.
    const int64_t x_matrix = p.x_index ? p.x_index[b] : 0;
    if (p.w_index && p.w_index[b] != matrix) continue;
    if (x_matrix < 0 || x_matrix >= p.x_matrices || !inside) continue;
    for (uint32_t m = 0; m < p.m; m++) {
      const int64_t x_row = x_matrix * p.m + m, grad_row = int64_t(b) * p.m + m;
      const X *x = static_cast<const X*>(p.x), *grad = static_cast<const X*>(p.grad);
      const X* by_row = p.x_by_row ? x + x_row * p.rows : grad + grad_row * p.rows;
      const X* by_column =
          (p.x_by_row ? grad + grad_row * p.columns : x + x_row * p.columns) + word * kWordBits;
      float value[kWordBits], all = 0;
      ONEBIT_UNROLL
      for (int i = 0; i < kWordBits; i += Vector<X>::kCount) {
        const Vector<X> loaded = load_vector(by_column + i);
        ONEBIT_UNROLL
        for (int j = 0; j < Vector<X>::kCount; j++) {
          value[i + j] = to_float(loaded.values[j]);
          all += value[i + j];
        }
      }
      ONEBIT_UNROLL
      for (int r = 0; r < int(kGradRows); r++) {
        float set = 0;
        ONEBIT_UNROLL
        for (int i = 0; i < kWordBits; i++) set += bits[r] >> i & 1 ? value[i] : 0.0f;
        const float factor = to_float(by_row[row[r]]);
        scale_sum[r] += factor * set;
        bias_sum[r] += factor * all;
      }
    }
  }
  // The words of a group are neighbouring lanes.
  ONEBIT_UNROLL
  for (int r = 0; r < int(kGradRows); r++) {
    ONEBIT_UNROLL
    for (int d = 1; d < kGroupWords; d *= 2) {
      scale_sum[r] += __shfl_xor_sync(kAll, scale_sum[r], d);
      bias_sum[r] += __shfl_xor_sync(kAll, bias_sum[r], d);
    }
    if (inside && word % kGroupWords == 0 && row0 + r < p.rows) {
      const int64_t at = (matrix * p.rows + row0 + r) * groups + word / kGroupWords;
      p.grad_scales[at] = scale_sum[r];
      p.grad_biases[at] = bias_sum[r];
    }
  }
}

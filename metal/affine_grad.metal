// Gradients of scales and biases. With dW = by_row^T . by_column [rows, columns]:
//   grad_scales[r, g] = sum of dW[r, j] over the group where the bit is 1
//   grad_biases[r, g] = sum of dW[r, j] over the group
// dW itself is never formed: per row m of the two, a lane sums 32 values of by_column once under
// the bits of each of its rows of w and once in full, and multiplies both sums with by_row[m, r].
// Threadgroup: kGradSimdgroups simdgroups of kGradRows rows each; a lane owns one word.
// Held per lane: 32 values, 8 sums, 4 words. Grid: x over words, y over rows, z over matrices of w.
#include "common.h"

template <typename T>
[[kernel]] void affine_grad(const device T* grad [[buffer(0)]],       // [batches, m, n]
                            const device T* x [[buffer(1)]],          // [x_matrices, m, k]
                            const device uint* packed [[buffer(2)]],  // [w_matrices, rows, words]
                            device float* grad_scales [[buffer(3)]],  // [w_matrices, rows, groups]
                            device float* grad_biases [[buffer(4)]],  // as grad_scales
                            const device long* x_index [[buffer(5)]],
                            const device long* w_index [[buffer(6)]],
                            constant AffineGradParams& p [[buffer(7)]],
                            uint3 group [[threadgroup_position_in_grid]],
                            uint simdgroup [[simdgroup_index_in_threadgroup]],
                            uint lane [[thread_index_in_simdgroup]]) {
  const uint row0 = (group.y * kGradSimdgroups + simdgroup) * kGradRows;
  if (row0 >= p.rows) return;
  const uint words = p.columns / kWordBits, groups = words >> p.group_shift;
  const uint word = group.x * kLanes + lane;
  const bool inside = word < words;

  uint row[kGradRows], bits[kGradRows];
  float scale_sum[kGradRows], bias_sum[kGradRows];
  ONEBIT_UNROLL
  for (uint r = 0; r < kGradRows; r++) {
    row[r] = min(row0 + r, p.rows - 1);  // past the end: the last row again, not stored
    bits[r] = inside ? packed[(group.z * p.rows + row[r]) * words + word] : 0u;
    scale_sum[r] = 0;
    bias_sum[r] = 0;
  }
  for (uint b = 0; b < p.batches; b++) {
    // An index out of range names no matrix: its product was NaN and moves no gradient.
    const long x_matrix = kIndexed ? matrix_of(x_index, p.x_repeat, p.x_matrices, b) : 0;
    if (kIndexed && matrix_of(w_index, p.w_repeat, p.w_matrices, b) != long(group.z)) continue;
    if (x_matrix < 0 || x_matrix >= long(p.x_matrices) || !inside) continue;
    for (uint m = 0; m < p.m; m++) {
      const uint x_row = uint(x_matrix) * p.m + m, grad_row = b * p.m + m;
      const device T* by_row = p.x_by_row ? x + x_row * p.rows : grad + grad_row * p.rows;
      const device T* by_column =
          (p.x_by_row ? grad + grad_row * p.columns : x + x_row * p.columns) + word * kWordBits;
      float value[kWordBits];
      float all = 0;
      ONEBIT_UNROLL
      for (uint i = 0; i < kWordBits; i += 4) {
        const vec<float, 4> four = read_four(by_column + i);
        ONEBIT_UNROLL
        for (uint j = 0; j < 4; j++) {
          value[i + j] = four[j];
          all += four[j];
        }
      }
      ONEBIT_UNROLL
      for (uint r = 0; r < kGradRows; r++) {
        float set = 0;
        ONEBIT_UNROLL
        for (uint i = 0; i < kWordBits; i++) set += select(0.0f, value[i], bit_of(bits[r], i));
        const float factor = float(by_row[row[r]]);
        scale_sum[r] = fma(factor, set, scale_sum[r]);
        bias_sum[r] = fma(factor, all, bias_sum[r]);
      }
    }
  }
  // The words of a group are neighbouring lanes.
  ONEBIT_UNROLL
  for (uint r = 0; r < kGradRows; r++) {
    for (uint offset = 1; offset < (1u << p.group_shift); offset *= 2) {
      scale_sum[r] += simd_shuffle_xor(scale_sum[r], ushort(offset));
      bias_sum[r] += simd_shuffle_xor(bias_sum[r], ushort(offset));
    }
    if (inside && (word & ((1u << p.group_shift) - 1)) == 0 && row0 + r < p.rows) {
      const uint at = (group.z * p.rows + row0 + r) * groups + (word >> p.group_shift);
      grad_scales[at] = scale_sum[r];
      grad_biases[at] = bias_sum[r];
    }
  }
}

ONEBIT_INSTANTIATE("affine_grad_float", affine_grad<float>)
ONEBIT_INSTANTIATE("affine_grad_half", affine_grad<half>)
ONEBIT_INSTANTIATE("affine_grad_bfloat", affine_grad<bfloat>)

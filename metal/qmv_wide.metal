// y[m, n] = x[m, :] . dequantize(w)[n, :] for 2 to 8 rows of x (speculative decoding, small
// batches). A word is read and decoded once and multiplied with all rows: per weight 3 operations
// to decode and M fused multiply-adds, where M passes of qmv would read and decode it M times.
// Threadgroup: kWideSimdgroups simdgroups, each owning wide_outputs(M) outputs; lanes as in qmv.
// Held per lane at M = 8: 16 sums, 32 values of x in its dtype, widened where they are used, 2
// words, 4 levels; about 60 registers, or 45 under x of 16 bits.
#include "common.h"

template <typename T, uint M>
[[kernel]] void qmv_wide(const device T* x [[buffer(0)]],          // [x_matrices, m, k]
                         const device uint* packed [[buffer(1)]],  // [w_matrices, n, k / 32]
                         const device void* scales [[buffer(2)]],  // [w_matrices, n, groups]
                         const device void* biases [[buffer(3)]],  // as scales
                         device T* y [[buffer(4)]],                // [batches, m, n]
                         const device long* x_index [[buffer(5)]],
                         const device long* w_index [[buffer(6)]],
                         constant QmmParams& p [[buffer(7)]],
                         uint3 group [[threadgroup_position_in_grid]],
                         uint simdgroup [[simdgroup_index_in_threadgroup]],
                         uint lane [[thread_index_in_simdgroup]]) {
  constexpr uint kRows = wide_outputs(M);
  const uint row0 = (group.x * kWideSimdgroups + simdgroup) * kRows;
  if (row0 >= p.n) return;
  const Matrices matrices = find_matrices(x_index, w_index, p, group.z);
  const uint words = p.k / kWordBits, groups = words >> p.group_shift;
  x += matrices.x * p.m * p.k;

  uint row[kRows];  // past the end: the last row again, not stored
  float sum[kRows][M];
  ONEBIT_UNROLL
  for (uint r = 0; r < kRows; r++) {
    row[r] = matrices.w * p.n + min(row0 + r, p.n - 1);
    ONEBIT_UNROLL
    for (uint m = 0; m < M; m++) sum[r][m] = 0;
  }
  for (uint word = lane; word < words; word += kLanes) {
    uint bits[kRows];
    float zero[kRows], one[kRows];  // what the two bits stand for
    ONEBIT_UNROLL
    for (uint r = 0; r < kRows; r++) {
      bits[r] = packed[row[r] * words + word];
      const Levels levels = read_levels(scales, biases, row[r] * groups + (word >> p.group_shift));
      zero[r] = levels.bias;
      one[r] = levels.scale + levels.bias;
    }
    for (uint i = 0; i < kWordBits; i += 4) {
      vec<T, 4> value[M];
      ONEBIT_UNROLL
      for (uint m = 0; m < M; m++) {
        const uint x_row = min(m, p.m - 1);
        value[m] = *(const device vec<T, 4>*)(x + x_row * p.k + word * kWordBits + i);
      }
      ONEBIT_UNROLL
      for (uint r = 0; r < kRows; r++) {
        ONEBIT_UNROLL
        for (uint j = 0; j < 4; j++) {
          const float weight = select(zero[r], one[r], bit_of(bits[r], i + j));
          ONEBIT_UNROLL
          for (uint m = 0; m < M; m++) sum[r][m] = fma(weight, float(value[m][j]), sum[r][m]);
        }
      }
    }
  }
  ONEBIT_UNROLL
  for (uint r = 0; r < kRows; r++) {
    ONEBIT_UNROLL
    for (uint m = 0; m < M; m++) {
      const float total = simd_sum(sum[r][m]);
      if (lane == 0 && row0 + r < p.n && m < p.m) {
        y[(group.z * p.m + m) * p.n + row0 + r] = matrices.valid ? T(total) : T(NAN);
      }
    }
  }
}

// An M without an instance takes the next one: 5 and 7 waste one multiply-add in 6 and 8.
#define ONEBIT_INSTANTIATE_WIDE(type)                           \
  ONEBIT_INSTANTIATE("qmv_wide_" #type "_2", qmv_wide<type, 2>) \
  ONEBIT_INSTANTIATE("qmv_wide_" #type "_3", qmv_wide<type, 3>) \
  ONEBIT_INSTANTIATE("qmv_wide_" #type "_4", qmv_wide<type, 4>) \
  ONEBIT_INSTANTIATE("qmv_wide_" #type "_6", qmv_wide<type, 6>) \
  ONEBIT_INSTANTIATE("qmv_wide_" #type "_8", qmv_wide<type, 8>)
ONEBIT_INSTANTIATE_WIDE(float)
ONEBIT_INSTANTIATE_WIDE(half)
ONEBIT_INSTANTIATE_WIDE(bfloat)

// y[m, n] = x[m, :] . dequantize(w)[n, :] for 2 to 8 rows of x (speculative decoding, small
// batches). A word is read and decoded once and multiplied with all rows: per weight 3 operations
// to decode and M fused multiply-adds, where M passes of qmv would read and decode it M times.
// Threadgroup: kWideSimdgroups simdgroups, each owning wide_outputs(M) outputs; lanes as in qmv.
// Held per lane at M = 8: 16 sums, 16 weights, 8 values of x in its dtype, widened where they are
// used, 2 words, 4 levels; about 60 registers. Under float32 x a sum is made of parts of 8 terms,
// even ones and odd ones, for long sums of one sign round alike in every lane: 10 operations for 8
// multiply-adds. (Under x of 16 bits they do not show.)
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
  constexpr bool short_sums = sizeof(T) == sizeof(float);
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
    for (uint i = 0; i < kWordBits; i += 8) {
      float weight[kRows][8];
      ONEBIT_UNROLL
      for (uint r = 0; r < kRows; r++) {
        ONEBIT_UNROLL
        for (uint j = 0; j < 8; j++) weight[r][j] = select(zero[r], one[r], bit_of(bits[r], i + j));
      }
      ONEBIT_UNROLL
      for (uint m = 0; m < M; m++) {
        const device T* from = x + min(m, p.m - 1) * p.k + word * kWordBits + i;
        vec<T, 4> value[2];
        ONEBIT_UNROLL
        for (uint h = 0; h < 2; h++) value[h] = *(const device vec<T, 4>*)(from + h * 4);
        ONEBIT_UNROLL
        for (uint r = 0; r < kRows; r++) {
          float part[2] = {short_sums ? 0.0f : sum[r][m], 0.0f};
          ONEBIT_UNROLL
          for (uint j = 0; j < 8; j++) {
            const uint of = short_sums ? j % 2 : 0;
            part[of] = fma(weight[r][j], float(value[j / 4][j % 4]), part[of]);
          }
          sum[r][m] = short_sums ? sum[r][m] + (part[0] + part[1]) : part[0];
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

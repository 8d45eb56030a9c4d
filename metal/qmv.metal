// y[n] = x . dequantize(w)[n, :] for one row of x.
// Threadgroup: kQmvSimdgroups simdgroups, each owning kQmvRows outputs, which share the values of
// x. A lane takes every 32nd word of k, a step of 1024 values: k = 2560 or 5120 stay here, and the
// last step is a loop bound. Per weight: test the bit, select bias or bias + scale, multiply-add;
// summing x under the bits instead (scale * sum of set + bias * sum of all) takes as many
// operations, and its two halves cancel. Held per lane: 32 values of x, 8
// words, 8 sums, 2 levels; about 60 of the 128 registers that let a GPU core keep its full number
// of simdgroups. 64 values of x would spill that.
#include "common.h"

template <typename T>
[[kernel]] void qmv(const device T* x [[buffer(0)]],          // [x_matrices, k]
                    const device uint* packed [[buffer(1)]],  // [w_matrices, n, k / 32]
                    const device void* scales [[buffer(2)]],  // [w_matrices, n, groups]
                    const device void* biases [[buffer(3)]],  // as scales
                    device T* y [[buffer(4)]],                // [batches, n]
                    const device long* x_index [[buffer(5)]],
                    const device long* w_index [[buffer(6)]],
                    constant QmmParams& p [[buffer(7)]],
                    uint3 group [[threadgroup_position_in_grid]],
                    uint simdgroup [[simdgroup_index_in_threadgroup]],
                    uint lane [[thread_index_in_simdgroup]]) {
  const uint row0 = (group.x * kQmvSimdgroups + simdgroup) * kQmvRows;
  if (row0 >= p.n) return;
  const Matrices matrices = find_matrices(x_index, w_index, p, group.z);
  const uint words = p.k / kWordBits, groups = words >> p.group_shift;
  x += matrices.x * p.k;

  uint row[kQmvRows];  // past the end: the last row again, not stored
  float sum[kQmvRows];
  ONEBIT_UNROLL
  for (uint r = 0; r < kQmvRows; r++) {
    row[r] = matrices.w * p.n + min(row0 + r, p.n - 1);
    sum[r] = 0;
  }
  for (uint word = lane; word < words; word += kLanes) {
    uint bits[kQmvRows];  // loaded together: eight 128-byte lines in flight per simdgroup
    ONEBIT_UNROLL
    for (uint r = 0; r < kQmvRows; r++) bits[r] = packed[row[r] * words + word];
    float value[kWordBits];
    ONEBIT_UNROLL
    for (uint i = 0; i < kWordBits; i += 4) {
      const vec<float, 4> four = read_four(x + word * kWordBits + i);
      ONEBIT_UNROLL
      for (uint j = 0; j < 4; j++) value[i + j] = four[j];
    }
    ONEBIT_UNROLL
    for (uint r = 0; r < kQmvRows; r++) {
      const Levels levels = read_levels(scales, biases, row[r] * groups + (word >> p.group_shift));
      const float one = levels.scale + levels.bias;
      // Of one word, in four parts: what long sums of one sign round off, all lanes round off.
      float part[4] = {0, 0, 0, 0};
      ONEBIT_UNROLL
      for (uint i = 0; i < kWordBits; i++) {
        part[i % 4] = fma(select(levels.bias, one, bit_of(bits[r], i)), value[i], part[i % 4]);
      }
      sum[r] += (part[0] + part[2]) + (part[1] + part[3]);
    }
  }
  ONEBIT_UNROLL
  for (uint r = 0; r < kQmvRows; r++) {
    const float total = simd_sum(sum[r]);
    if (lane == 0 && row0 + r < p.n) {
      y[group.z * p.n + row0 + r] = matrices.valid ? T(total) : T(NAN);
    }
  }
}

ONEBIT_INSTANTIATE("qmv_float", qmv<float>)
ONEBIT_INSTANTIATE("qmv_half", qmv<half>)
ONEBIT_INSTANTIATE("qmv_bfloat", qmv<bfloat>)

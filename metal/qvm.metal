// y[n] = sum over k of x[k] * dequantize(w)[k, n] for one row of x, with w [k, n].
// Threadgroup: kQvmSimdgroups simdgroups share 1024 outputs, a word (32 outputs) to a lane;
// simdgroup s takes rows s, s + 8, ... of its split of k, each a 128-byte line. Per weight: test
// the bit, select bias or bias + scale, multiply-add, as in qmv: a common sum of bias * x would
// make NaN of an infinity in x, and cancel. Held per lane: 32 sums. Grid: x over n, z over batches
// times splits of k. A split writes float partial sums.
#include "common.h"

template <typename T, typename O>
[[kernel]] void qvm(const device T* x [[buffer(0)]],          // [x_matrices, k]
                    const device uint* packed [[buffer(1)]],  // [w_matrices, k, n / 32]
                    const device void* scales [[buffer(2)]],  // [w_matrices, k, groups]
                    const device void* biases [[buffer(3)]],  // as scales
                    device O* y [[buffer(4)]],                // [splits, batches, n]
                    const device long* x_index [[buffer(5)]],
                    const device long* w_index [[buffer(6)]],
                    constant QmmParams& p [[buffer(7)]],
                    uint3 group [[threadgroup_position_in_grid]],
                    uint simdgroup [[simdgroup_index_in_threadgroup]],
                    uint lane [[thread_index_in_simdgroup]]) {
  threadgroup float partial[kQvmSimdgroups * 8 * kLanes];
  const uint split = group.z / p.batches, batch = group.z % p.batches;
  const Matrices matrices = find_matrices(x_index, w_index, p, batch);
  const uint words = p.n / kWordBits, groups = words >> p.group_shift;
  const uint word = group.x * kLanes + lane;
  const uint k_begin = split * p.split_k, k_end = min(p.k, k_begin + p.split_k);
  x += matrices.x * p.k;

  float sum[kWordBits];
  ONEBIT_UNROLL
  for (uint i = 0; i < kWordBits; i++) sum[i] = 0;
  if (word < words) {
    for (uint k = k_begin + simdgroup; k < k_end; k += kQvmSimdgroups) {
      const uint row = matrices.w * p.k + k;
      const uint bits = packed[row * words + word];
      const Levels levels = read_levels(scales, biases, row * groups + (word >> p.group_shift));
      const float value = float(x[k]);
      const float one = levels.scale + levels.bias;
      ONEBIT_UNROLL
      for (uint i = 0; i < kWordBits; i++) {
        sum[i] = fma(select(levels.bias, one, bit_of(bits, i)), value, sum[i]);
      }
    }
  }
  // Sums of the simdgroups meet in threadgroup memory, 8 of a lane's 32 at a time.
  ONEBIT_UNROLL
  for (uint i0 = 0; i0 < kWordBits; i0 += 8) {
    ONEBIT_UNROLL
    for (uint i = 0; i < 8; i++) partial[(simdgroup * 8 + i) * kLanes + lane] = sum[i0 + i];
    threadgroup_barrier(mem_flags::mem_threadgroup);
    float total = 0;
    for (uint s = 0; s < kQvmSimdgroups; s++) total += partial[(s * 8 + simdgroup) * kLanes + lane];
    if (word < words) {
      const uint column = word * kWordBits + i0 + simdgroup;
      y[group.z * p.n + column] = matrices.valid ? O(total) : O(NAN);
    }
    threadgroup_barrier(mem_flags::mem_threadgroup);
  }
}

ONEBIT_INSTANTIATE("qvm_float", qvm<float, float>)
ONEBIT_INSTANTIATE("qvm_half", qvm<half, half>)
ONEBIT_INSTANTIATE("qvm_bfloat", qvm<bfloat, bfloat>)
ONEBIT_INSTANTIATE("qvm_half_partial", qvm<half, float>)
ONEBIT_INSTANTIATE("qvm_bfloat_partial", qvm<bfloat, float>)

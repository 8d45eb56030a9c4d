// One pass of coordinate descent over a block of columns: a flip moves w_hat by d = +-scale and the
// loss by d^2 moments[j, j] - 2 d error[j]; then error -= d * moments[j, :].
// Threadgroup: kFlipSimdgroups simdgroups, one row each; lane l owns columns l, 32 + l, ... of the
// block, and nobody else reads or writes there.
#include "common.h"

template <typename T>
[[kernel]] void flip_bits(device bool* bits [[buffer(0)]],       // [rows, columns]
                          device T* error [[buffer(1)]],         // [rows, width], follows the flips
                          const device T* scales [[buffer(2)]],  // [rows, columns / group size]
                          const device T* moments [[buffer(3)]],  // [columns, columns]
                          device T* changes [[buffer(4)]],        // [rows, width]
                          constant FlipParams& p [[buffer(5)]],
                          uint threadgroup_index [[threadgroup_position_in_grid]],
                          uint simdgroup [[simdgroup_index_in_threadgroup]],
                          uint lane [[thread_index_in_simdgroup]]) {
  const uint row = threadgroup_index * kFlipSimdgroups + simdgroup;
  if (row >= p.rows) return;
  const uint group_size = kGroupWords * kLanes;
  device T* errors = error + row * p.width;

  for (uint j = 0; j < p.width; j++) {
    const uint column = p.begin + j;
    T d = 0;
    if (lane == j % kLanes) {
      const uint at = row * p.columns + column;
      const T scale = scales[row * (p.columns / group_size) + column / group_size];
      const T step = bits[at] ? -scale : scale;
      if (2 * step * errors[j] > step * step * moments[column * p.columns + column]) {
        d = step;
        bits[at] = !bits[at];
      }
      changes[row * p.width + j] = d;
    }
    d = simd_shuffle(d, ushort(j % kLanes));
    if (d == 0) continue;
    for (uint i = lane; i < p.width; i += kLanes) {
      errors[i] -= d * moments[column * p.columns + p.begin + i];
    }
  }
}

ONEBIT_INSTANTIATE("flip_bits_float", flip_bits<float>)

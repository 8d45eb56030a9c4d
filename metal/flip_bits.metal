// One pass of coordinate descent over a block of columns: a flip moves w_hat by d = +-scale and the
// loss by d^2 moments[j, j] - 2 d error[j]; then error -= d * moments[j, :].
// Threadgroup: kFlipSimdgroups simdgroups, one row each; lane l owns columns l, 32 + l, ... of the
// block, and nobody else reads or writes there.
#include "common.h"

[[host_name("flip_bits_float")]] [[kernel]] void flip_bits(
    device bool* bits [[buffer(0)]],            // [rows, columns]
    device float* error [[buffer(1)]],          // [rows, width], follows the flips
    const device float* scales [[buffer(2)]],   // [rows, columns / group size]
    const device float* moments [[buffer(3)]],  // [columns, columns]
    device float* changes [[buffer(4)]],        // [rows, width]
    constant FlipParams& p [[buffer(5)]],
    uint threadgroup_index [[threadgroup_position_in_grid]],
    uint simdgroup [[simdgroup_index_in_threadgroup]],
    uint lane [[thread_index_in_simdgroup]]) {
  const uint row = threadgroup_index * kFlipSimdgroups + simdgroup;
  if (row >= p.rows) return;
  const uint group_size = kGroupWords * kLanes;
  device float* errors = error + row * p.width;

  for (uint j = 0; j < p.width; j++) {
    const uint column = p.begin + j;
    float d = 0;
    if (lane == j % kLanes) {
      const uint at = row * p.columns + column;
      const float scale = scales[row * (p.columns / group_size) + column / group_size];
      const float step = bits[at] ? -scale : scale;
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

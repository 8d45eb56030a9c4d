// One pass of coordinate descent over a block of columns: a flip moves w_hat by d = +-scale and the
// loss by d^2 moments[j, j] - 2 d error[j]; then error -= d * moments[j, :].
// A warp owns a row; lane l owns columns l, 32 + l, ... of the block, and nobody else reads or
// writes there. Compiled without contraction, as the CPU computes.
#include "common.cuh"

ONEBIT_KERNEL __launch_bounds__(kFlipWarps * 32) flip_bits(const __grid_constant__ FlipArgs p) {
  const uint32_t lane = threadIdx.x & 31;
  const int64_t row = int64_t(blockIdx.x) * kFlipWarps + (threadIdx.x >> 5);
  if (row >= p.rows) return;
  float* errors = p.error + row * p.width;
  for (uint32_t j = 0; j < p.width; j++) {
    const uint32_t column = p.begin + j;
    const float* moments = p.moments + int64_t(column) * p.columns;
    float d = 0;
    if (lane == j % 32) {
      bool& bit = p.bits[row * p.columns + column];
      const float scale = p.scales[row * (p.columns / kGroupSize) + column / kGroupSize];
      const float step = bit ? -scale : scale;
      if (2 * step * errors[j] > step * step * moments[column]) {
        d = step;
        bit = !bit;
      }
      p.changes[row * p.width + j] = d;
    }
    d = __shfl_sync(kAll, d, j % 32);
    if (d == 0) continue;
    for (uint32_t i = lane; i < p.width; i += 32) errors[i] -= d * moments[p.begin + i];
  }
}

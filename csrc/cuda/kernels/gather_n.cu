// y[b] [m, n] = x[x_index[b]] [m, k] . w[w_index[b]] [k, n], groups along n.
// A block owns one row of x and 1024 outputs: lane l of every warp the word l of them, 32 sums. The
// warps take turns at rows of w, each a line of 128 bytes, and add up at the end.
#include "common.cuh"

using X = ONEBIT_X;
using Level = ONEBIT_LEVELS;
constexpr int kWarps = kBlockThreads / 32;

ONEBIT_KERNEL __launch_bounds__(kBlockThreads) gather_n(const __grid_constant__ ProductArgs p) {
  __shared__ float part[kWarps][8][32];
  const int lane = threadIdx.x & 31, warp = threadIdx.x >> 5;
  const uint32_t batch = blockIdx.x / p.m, m = blockIdx.x % p.m;
  const Matrices found = find_matrices(p, batch);
  const uint32_t words = p.n / kWordBits, groups = words / kGroupWords;
  const uint32_t word = blockIdx.y * 32 + lane;
  const X* x = static_cast<const X*>(p.x) + (found.x * p.m + m) * p.k;
  float sum[kWordBits] = {};
  if (word < words) {
    for (uint32_t k = warp; k < p.k; k += kWarps) {
      const int64_t row = found.w * p.k + k;
      const uint32_t bits = p.packed[row * words + word];
      const int64_t level = row * groups + word / kGroupWords;
      const float scale = to_float(static_cast<const Level*>(p.scales)[level]);
      const float bias =
          kHasBiases ? to_float(static_cast<const Level*>(p.biases)[level]) : scale * -0.5f;
      const float value = to_float(x[k]), high = scale + bias;
      // Levels are chosen before they are multiplied: sums of scales and of biases would cancel.
      ONEBIT_UNROLL
      for (int i = 0; i < kWordBits; i++) sum[i] += (bits >> i & 1 ? high : bias) * value;
    }
  }
  X* y = static_cast<X*>(p.y) + int64_t(blockIdx.x) * p.n;
  ONEBIT_UNROLL
  for (int i0 = 0; i0 < kWordBits; i0 += 8) {  // 8 of a lane's sums at a time
    ONEBIT_UNROLL
    for (int i = 0; i < 8; i++) part[warp][i][lane] = sum[i0 + i];
    __syncthreads();
    float total = 0;
    ONEBIT_UNROLL
    for (int w = 0; w < kWarps; w++) total += part[w][warp][lane];
    if (word < words) {
      y[word * kWordBits + i0 + warp] = from_float<X>(found.valid ? total : nan_value());
    }
    __syncthreads();
  }
}

// y[m, n] = sum over k of x[m, k] * dequantize(w)[k, n], with w [k, n] and groups along n: the
// backward pass of a layer.
// Threadgroup: 4 simdgroups, a tile of kTileM x kTileWideN outputs, 32 x 32 each; k in steps of
// kTileK rows of w. Held per lane: 64 sums in two stages and 16 matrix elements.
// Grid: x over n, y over m, z over batches times splits of k. A split writes float partial sums.
#include "tile.h"

constant constexpr uint kXStride = kTileK + kPad;
constant constexpr uint kWStride = kTileWideN + kPad;

template <typename T, typename O>
[[kernel]] void qmm_n(const device T* x [[buffer(0)]],          // [x_matrices, m, k]
                      const device uint* packed [[buffer(1)]],  // [w_matrices, k, n / 32]
                      const device void* scales [[buffer(2)]],  // [w_matrices, k, groups]
                      const device void* biases [[buffer(3)]],  // as scales
                      device O* y [[buffer(4)]],                // [splits, batches, m, n]
                      const device long* x_index [[buffer(5)]],
                      const device long* w_index [[buffer(6)]],
                      constant QmmParams& p [[buffer(7)]],
                      uint3 group [[threadgroup_position_in_grid]],
                      uint simdgroup [[simdgroup_index_in_threadgroup]],
                      uint thread_index [[thread_index_in_threadgroup]]) {
  threadgroup float x_tile[kTileM * kXStride];
  threadgroup float w_tile[kTileK * kWStride];
  const uint split = group.z / p.batches, batch = group.z % p.batches;
  const Matrices matrices = find_matrices(x_index, w_index, p, batch);
  const uint m0 = group.y * kTileM, n0 = group.x * kTileWideN;
  const uint words = p.n / kWordBits, groups = words >> p.group_shift;
  const uint k_begin = split * p.split_k, k_end = min(p.k, k_begin + p.split_k);

  // A thread loads 4 values of x, and half a word of w: k has no alignment, so x is read by
  // element.
  const uint x_row = thread_index / 4, x_column = thread_index % 4 * 4;
  const bool x_inside = m0 + x_row < p.m;
  const uint w_row = thread_index / 8, w_half = thread_index % 2 * 16;
  const uint w_column = thread_index % 8 / 2, word = n0 / kWordBits + w_column;
  x += (matrices.x * p.m + m0 + (x_inside ? x_row : 0)) * p.k;
  packed += matrices.w * p.k * words;
  const uint first_level = matrices.w * p.k * groups;

  simdgroup_float8x8 acc[4][4], total[4][4];
  for (uint i = 0; i < 4; i++) {
    for (uint j = 0; j < 4; j++) {
      acc[i][j] = make_filled_simdgroup_matrix<float, 8, 8>(0.0f);
      total[i][j] = make_filled_simdgroup_matrix<float, 8, 8>(0.0f);
    }
  }
  for (uint k0 = k_begin; k0 < k_end; k0 += kTileK) {
    for (uint i = 0; i < 4; i++) {
      const uint k = k0 + x_column + i;
      x_tile[x_row * kXStride + x_column + i] = x_inside && k < k_end ? float(x[k]) : 0.0f;
    }
    const uint k = k0 + w_row;
    uint bits = 0;
    Levels levels = {0.0f, 0.0f};
    if (k < k_end && word < words) {
      bits = packed[k * words + word];
      levels = read_levels(scales, biases, first_level + k * groups + (word >> p.group_shift));
    }
    const float one = levels.scale + levels.bias;
    threadgroup float* to = w_tile + w_row * kWStride + w_column * kWordBits + w_half;
    for (uint i = 0; i < 16; i++) to[i] = select(levels.bias, one, bit_of(bits, w_half + i));
    threadgroup_barrier(mem_flags::mem_threadgroup);
    for (uint kk = 0; kk < kTileK; kk += 8) {
      simdgroup_float8x8 a[4], b[4];
      for (uint i = 0; i < 4; i++) {
        simdgroup_load(a[i], x_tile + i * 8 * kXStride + kk, kXStride);
        simdgroup_load(b[i], w_tile + kk * kWStride + simdgroup * 32 + i * 8, kWStride);
      }
      for (uint i = 0; i < 4; i++) {
        for (uint j = 0; j < 4; j++) {
          simdgroup_multiply_accumulate(acc[i][j], a[i], b[j], acc[i][j]);
        }
      }
    }
    threadgroup_barrier(mem_flags::mem_threadgroup);
    if ((k0 + kTileK) % kBlockK != 0 && k0 + kTileK < k_end) continue;
    for (uint i = 0; i < 4; i++) {
      for (uint j = 0; j < 4; j++) flush(total[i][j], acc[i][j]);
    }
  }

  // Out through threadgroup memory, 8 rows at a time, for the edges and for whole-line writes.
  for (uint i = 0; i < 4; i++) {
    for (uint j = 0; j < 4; j++) {
      simdgroup_store(total[i][j], w_tile + simdgroup * 32 + j * 8, kWStride);
    }
    threadgroup_barrier(mem_flags::mem_threadgroup);
    const uint column = n0 + thread_index;
    for (uint r = 0; r < 8; r++) {
      const uint row = m0 + i * 8 + r;
      if (row < p.m && column < p.n) {
        const float value = w_tile[r * kWStride + thread_index];
        y[(group.z * p.m + row) * p.n + column] = matrices.valid ? O(value) : O(NAN);
      }
    }
    threadgroup_barrier(mem_flags::mem_threadgroup);
  }
}

ONEBIT_INSTANTIATE("qmm_n_float", qmm_n<float, float>)
ONEBIT_INSTANTIATE("qmm_n_half", qmm_n<half, half>)
ONEBIT_INSTANTIATE("qmm_n_bfloat", qmm_n<bfloat, bfloat>)
ONEBIT_INSTANTIATE("qmm_n_half_partial", qmm_n<half, float>)
ONEBIT_INSTANTIATE("qmm_n_bfloat_partial", qmm_n<bfloat, float>)

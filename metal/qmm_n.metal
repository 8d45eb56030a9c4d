// y[m, n] = sum over k of x[m, k] * dequantize(w)[k, n], with w [k, n] and groups along n: the
// backward pass of a layer. Tiles hold float whatever the dtype of x: a group has its own levels in
// every row of w, so they cannot be multiplied with the sums.
// Threadgroup: 8 simdgroups, a tile of kTileM x kTileWideN outputs, 16 x 32 each, so 8 matrices of
// sums; k in steps of kTileK rows of w, which are summed by themselves as in tile.h; 22 KB.
// Grid: x over n, y over m, z over batches times splits of k. A split writes float partial sums.
#include "tile.h"

// 16 bytes more than a row, so that the rows of a matrix start in different banks.
constant constexpr uint kXStride = kTileK + 4;
constant constexpr uint kWStride = kTileWideN + 4;

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
  threadgroup float4 x_memory[kTileM * kXStride / 4];
  threadgroup float4 w_memory[kTileK * kWStride / 4];
  threadgroup float* x_tile = (threadgroup float*)x_memory;
  threadgroup float* w_tile = (threadgroup float*)w_memory;
  const uint split = group.z / p.batches, batch = group.z % p.batches;
  const Matrices matrices = find_matrices(x_index, w_index, p, batch);
  const uint m0 = group.y * kTileM, n0 = group.x * kTileWideN;
  const uint words = p.n / kWordBits, groups = words >> p.group_shift;
  const uint k_begin = split * p.split_k, k_end = min(p.k, k_begin + p.split_k);

  // Eight threads load a row: four values of x, and four weights of each of the row's four words.
  // k has no alignment, so x is read by element.
  const uint row = thread_index / 8, part = thread_index % 8 * 4;
  const bool x_inside = m0 + row < p.m;
  x += (matrices.x * p.m + m0 + (x_inside ? row : 0)) * p.k;
  packed += matrices.w * p.k * words;
  const uint first_level = matrices.w * p.k * groups, first_word = n0 / kWordBits;
  const uint group_mask = (1u << p.group_shift) - 1;
  const uint m = simdgroup / 4 * 16, n = simdgroup % 4 * 32;

  simdgroup_float8x8 sum[2][4];
  ONEBIT_UNROLL
  for (uint i = 0; i < 2; i++) {
    ONEBIT_UNROLL
    for (uint j = 0; j < 4; j++) sum[i][j] = make_filled_simdgroup_matrix<float, 8, 8>(0.0f);
  }
  for (uint k0 = k_begin; k0 < k_end; k0 += kTileK) {
    float4 values;
    ONEBIT_UNROLL
    for (uint i = 0; i < 4; i++) {
      values[i] = x_inside && k0 + part + i < k_end ? float(x[k0 + part + i]) : 0.0f;
    }
    *(threadgroup float4*)(x_tile + row * kXStride + part) = values;
    const uint k = k0 + row;
    Levels levels = {0.0f, 0.0f};
    for (uint i = 0; i < kTileWideN / kWordBits; i++) {
      const uint word = first_word + i;
      uint bits = 0;
      if (k < k_end && word < words) {
        bits = packed[k * words + word];
        if (i == 0 || (word & group_mask) == 0) {
          levels = read_levels(scales, biases, first_level + k * groups + (word >> p.group_shift));
        }
      }
      float4 weights;
      ONEBIT_UNROLL
      for (uint j = 0; j < 4; j++) {
        weights[j] = select(levels.bias, levels.scale + levels.bias, bit_of(bits, part + j));
      }
      *(threadgroup float4*)(w_tile + row * kWStride + i * kWordBits + part) = weights;
    }
    threadgroup_barrier(mem_flags::mem_threadgroup);
    simdgroup_float8x8 a[2][4], b[4];
    ONEBIT_UNROLL
    for (uint i = 0; i < 2; i++) {
      ONEBIT_UNROLL
      for (uint kk = 0; kk < 4; kk++) {
        simdgroup_load(a[i][kk], x_tile + (m + i * 8) * kXStride + kk * 8, kXStride);
      }
    }
    ONEBIT_UNROLL
    for (uint j = 0; j < 4; j++) {
      ONEBIT_UNROLL
      for (uint kk = 0; kk < 4; kk++) {
        simdgroup_load(b[kk], w_tile + kk * 8 * kWStride + n + j * 8, kWStride);
      }
      ONEBIT_UNROLL
      for (uint i = 0; i < 2; i++) {
        simdgroup_float8x8 block[2];
        ONEBIT_UNROLL
        for (uint h = 0; h < 2; h++) {
          block[h] = make_filled_simdgroup_matrix<float, 8, 8>(0.0f);
          simdgroup_multiply_accumulate(block[h], a[i][2 * h], b[2 * h], block[h]);
          simdgroup_multiply_accumulate(block[h], a[i][2 * h + 1], b[2 * h + 1], block[h]);
        }
        add_to(block[0], block[1]);
        add_to(sum[i][j], block[0]);
      }
    }
    threadgroup_barrier(mem_flags::mem_threadgroup);
  }

  // Out through threadgroup memory, for the edges and for whole lines.
  ONEBIT_UNROLL
  for (uint i = 0; i < 2; i++) {
    ONEBIT_UNROLL
    for (uint j = 0; j < 4; j++) {
      simdgroup_store(sum[i][j], w_tile + (m + i * 8) * kWStride + n + j * 8, kWStride);
    }
  }
  threadgroup_barrier(mem_flags::mem_threadgroup);
  for (uint i = thread_index; i < kTileM * kTileWideN; i += kTileWideThreads) {
    const uint r = i / kTileWideN, column = i % kTileWideN;
    if (m0 + r >= p.m || n0 + column >= p.n) continue;
    const float value = w_tile[r * kWStride + column];
    y[(group.z * p.m + m0 + r) * p.n + n0 + column] = matrices.valid ? O(value) : O(NAN);
  }
}

ONEBIT_INSTANTIATE("qmm_n_float", qmm_n<float, float>)
ONEBIT_INSTANTIATE("qmm_n_half", qmm_n<half, half>)
ONEBIT_INSTANTIATE("qmm_n_bfloat", qmm_n<bfloat, bfloat>)
ONEBIT_INSTANTIATE("qmm_n_half_partial", qmm_n<half, float>)
ONEBIT_INSTANTIATE("qmm_n_bfloat_partial", qmm_n<bfloat, float>)

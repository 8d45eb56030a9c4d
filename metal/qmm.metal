// y[m, n] = x[m, :] . dequantize(w)[n, :] for many rows of x; w stays packed in device memory and
// is decoded tile by tile in threadgroup memory (9 KB of it). Threadgroup: 4 simdgroups, one tile
// of kTileM x kTileN outputs; each simdgroup 16 x 16 of it. Held per lane: 16 sums in two stages, 8
// matrix elements; registers do not limit. Grid: x over n, y over m, z over batches times splits of
// k. A split writes float partial sums.
#include "tile.h"

template <typename T, typename O>
[[kernel]] void qmm(const device T* x [[buffer(0)]],          // [x_matrices, m, k]
                    const device uint* packed [[buffer(1)]],  // [w_matrices, n, k / 32]
                    const device void* scales [[buffer(2)]],  // [w_matrices, n, groups]
                    const device void* biases [[buffer(3)]],  // as scales
                    device O* y [[buffer(4)]],                // [splits, batches, m, n]
                    const device long* x_index [[buffer(5)]],
                    const device long* w_index [[buffer(6)]],
                    constant QmmParams& p [[buffer(7)]],
                    uint3 group [[threadgroup_position_in_grid]],
                    uint simdgroup [[simdgroup_index_in_threadgroup]],
                    uint thread_index [[thread_index_in_threadgroup]]) {
  threadgroup float x_tile[kTileM * kStride];
  threadgroup float w_tile[kTileN * kStride];
  const uint split = group.z / p.batches, batch = group.z % p.batches;
  const Matrices matrices = find_matrices(x_index, w_index, p, batch);
  const uint m0 = group.y * kTileM, rows = min(kTileM, p.m - m0);
  const uint words = p.k / kWordBits, groups = words >> p.group_shift;
  const uint row = min(eighth_of(thread_index).row, rows - 1);
  const uint k_begin = split * p.split_k, k_end = min(p.k, k_begin + p.split_k);
  const Weights w = {packed + matrices.w * p.n * words, scales, biases, matrices.w * p.n * groups};
  const Extent extent = {
      group.x * kTileN, 0, rows, k_begin / uint(kWordBits), k_end / uint(kWordBits),
      matrices.valid};
  product_tile(x + (matrices.x * p.m + m0 + row) * p.k, w, extent, y + (group.z * p.m + m0) * p.n,
               p, x_tile, w_tile, simdgroup, thread_index);
}

// y[b, n] = x[x_index[b], :] . dequantize(w[w_index[b]])[n, :] for many single rows, sorted by
// matrix (mixture of experts): a tile of 32 rows makes one pass per matrix it meets, usually one.
// Unsorted indices are right too, only slow.
template <typename T>
[[kernel]] void qmm_sorted(const device T* x [[buffer(0)]],          // [x_matrices, k]
                           const device uint* packed [[buffer(1)]],  // [w_matrices, n, k / 32]
                           const device void* scales [[buffer(2)]],  // [w_matrices, n, groups]
                           const device void* biases [[buffer(3)]],  // as scales
                           device T* y [[buffer(4)]],                // [batches, n]
                           const device long* x_index [[buffer(5)]],
                           const device long* w_index [[buffer(6)]],
                           constant QmmParams& p [[buffer(7)]],
                           uint3 group [[threadgroup_position_in_grid]],
                           uint simdgroup [[simdgroup_index_in_threadgroup]],
                           uint thread_index [[thread_index_in_threadgroup]]) {
  threadgroup float x_tile[kTileM * kStride];
  threadgroup float w_tile[kTileN * kStride];
  const uint m0 = group.y * kTileM, rows = min(kTileM, p.batches - m0);
  const uint words = p.k / kWordBits, groups = words >> p.group_shift;
  const uint row = min(eighth_of(thread_index).row, rows - 1);
  const Matrices mine = find_matrices(x_index, w_index, p, m0 + row);
  uint begin = 0;
  while (begin < rows) {
    const Matrices first = find_matrices(x_index, w_index, p, m0 + begin);
    uint end = begin + 1;
    while (end < rows) {
      const Matrices next = find_matrices(x_index, w_index, p, m0 + end);
      if (next.w != first.w || next.valid != first.valid) break;
      end++;
    }
    const Weights w = {packed + first.w * p.n * words, scales, biases, first.w * p.n * groups};
    const Extent extent = {group.x * kTileN, begin, end, 0, words, first.valid};
    product_tile(x + mine.x * p.k, w, extent, y + m0 * p.n, p, x_tile, w_tile, simdgroup,
                 thread_index);
    begin = end;
  }
}

ONEBIT_INSTANTIATE("qmm_float", qmm<float, float>)
ONEBIT_INSTANTIATE("qmm_half", qmm<half, half>)
ONEBIT_INSTANTIATE("qmm_bfloat", qmm<bfloat, bfloat>)
ONEBIT_INSTANTIATE("qmm_half_partial", qmm<half, float>)
ONEBIT_INSTANTIATE("qmm_bfloat_partial", qmm<bfloat, float>)
ONEBIT_INSTANTIATE("qmm_sorted_float", qmm_sorted<float>)
ONEBIT_INSTANTIATE("qmm_sorted_half", qmm_sorted<half>)
ONEBIT_INSTANTIATE("qmm_sorted_bfloat", qmm_sorted<bfloat>)

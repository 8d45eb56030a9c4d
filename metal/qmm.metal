// y[m, n] = x[m, :] . dequantize(w)[n, :] for many rows of x; w stays packed in device memory and
// is decoded tile by tile in threadgroup memory (10 to 18 KB of it). Threadgroup: 4 simdgroups, one
// tile of 16 I x kTileN outputs, 8 I x 16 for each simdgroup: 8 matrices of float sums at I = 4,
// which is what the registers hold (ggml-org/llama.cpp #10982). 64 rows are for tiles of 16 bits.
// Grid: x over n, y over m, z over batches times splits of k. A split writes float partial sums.
#include "tile.h"

template <typename T, typename O, typename E, uint I>
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
  threadgroup float4 memory[2 * half_vectors<E, I>()];
  const uint split = group.z / p.batches, batch = group.z % p.batches;
  const Matrices matrices = find_matrices(x_index, w_index, p, batch);
  const uint m0 = group.y * 16 * I, count = min(16 * I, p.m - m0);
  const uint words = p.k / kWordBits, groups = words >> p.group_shift;
  XRows<I> rows;
  ONEBIT_UNROLL
  for (uint i = 0; i < I; i++) rows.start[i] = min(x_row(thread_index, i), count - 1) * p.k;
  const uint k_begin = split * p.split_k, k_end = min(p.k, k_begin + p.split_k);
  const Weights w = {packed + matrices.w * p.n * words, scales, biases, matrices.w * p.n * groups};
  const Extent extent = {
      group.x * kTileN, 0, count, k_begin / uint(kWordBits), k_end / uint(kWordBits),
      matrices.valid};
  product_tile<E, I>(x + (matrices.x * p.m + m0) * p.k, rows, w, extent,
                     y + (group.z * p.m + m0) * p.n, p, memory, simdgroup, thread_index);
}

// y[b, n] = x[x_index[b], :] . dequantize(w[w_index[b]])[n, :] for many single rows, sorted by
// matrix (mixture of experts): a tile of 32 rows makes one pass per matrix it meets, usually one.
// Unsorted indices are right too, only slow.
template <typename T, typename E>
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
  threadgroup float4 memory[2 * half_vectors<E, 2>()];
  const uint m0 = group.y * kTileM, count = min(kTileM, p.batches - m0);
  const uint words = p.k / kWordBits, groups = words >> p.group_shift;
  XRows<2> rows;
  ONEBIT_UNROLL
  for (uint i = 0; i < 2; i++) {
    const uint row = m0 + min(x_row(thread_index, i), count - 1);
    rows.start[i] = find_matrices(x_index, w_index, p, row).x * p.k;
  }
  uint begin = 0;
  while (begin < count) {
    const Matrices first = find_matrices(x_index, w_index, p, m0 + begin);
    uint end = begin + 1;
    while (end < count) {
      const Matrices next = find_matrices(x_index, w_index, p, m0 + end);
      if (next.w != first.w || next.valid != first.valid) break;
      end++;
    }
    const Weights w = {packed + first.w * p.n * words, scales, biases, first.w * p.n * groups};
    const Extent extent = {group.x * kTileN, begin, end, 0, words, first.valid};
    product_tile<E, 2>(x, rows, w, extent, y + m0 * p.n, p, memory, simdgroup, thread_index);
    begin = end;
  }
}

ONEBIT_INSTANTIATE("qmm_float", qmm<float, float, float, 2>)
// Tiles of float under x of 16 bits, for GPUs that emulate bfloat.
ONEBIT_INSTANTIATE("qmm_bfloat", qmm<bfloat, bfloat, float, 2>)
ONEBIT_INSTANTIATE("qmm_bfloat_partial", qmm<bfloat, float, float, 2>)
#define ONEBIT_INSTANTIATE_QMM(type)                                        \
  ONEBIT_INSTANTIATE("qmm_" #type "_32", qmm<type, type, type, 2>)          \
  ONEBIT_INSTANTIATE("qmm_" #type "_32_partial", qmm<type, float, type, 2>) \
  ONEBIT_INSTANTIATE("qmm_" #type "_64", qmm<type, type, type, 4>)          \
  ONEBIT_INSTANTIATE("qmm_" #type "_64_partial", qmm<type, float, type, 4>)
ONEBIT_INSTANTIATE_QMM(half)
ONEBIT_INSTANTIATE_QMM(bfloat)
ONEBIT_INSTANTIATE("qmm_sorted_float", qmm_sorted<float, float>)
ONEBIT_INSTANTIATE("qmm_sorted_bfloat", qmm_sorted<bfloat, float>)
ONEBIT_INSTANTIATE("qmm_sorted_half_32", qmm_sorted<half, half>)
ONEBIT_INSTANTIATE("qmm_sorted_bfloat_32", qmm_sorted<bfloat, bfloat>)

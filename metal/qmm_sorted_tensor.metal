// y[b, n] = x[x_index[b], :] . dequantize(w[w_index[b]])[n, :] for many single rows of 16 bits,
// sorted by matrix: qmm_sorted by tensor operations, as qmm_tensor is qmm. Rows of x come from
// anywhere, so their tile is in threadgroup memory too (15 KB with that of w). Grid: x over n, y
// over tiles of kTileM rows.
#include "tensor_tile.h"

template <typename T>
[[kernel]] void qmm_sorted_tensor(const device T* x [[buffer(0)]],  // [x_matrices, k]
                                  const device uint* packed
                                  [[buffer(1)]],  // [w_matrices, n, k / 32]
                                  const device void* scales
                                  [[buffer(2)]],  // [w_matrices, n, groups]
                                  const device void* biases [[buffer(3)]],  // as scales
                                  device T* y [[buffer(4)]],                // [batches, n]
                                  const device long* x_index [[buffer(5)]],
                                  const device long* w_index [[buffer(6)]],
                                  constant QmmParams& p [[buffer(7)]],
                                  uint3 group [[threadgroup_position_in_grid]],
                                  uint thread_index [[thread_index_in_threadgroup]]) {
  constexpr uint stride = stride_of<T>(), half_elements = (kTileM + kTensorN) * stride;
  threadgroup float4 memory[2 * half_elements * sizeof(T) / sizeof(float4)];
  const uint m0 = group.y * kTileM, n0 = group.x * kTensorN, count = min(kTileM, p.batches - m0);
  const uint words = p.k / kWordBits, groups = words >> p.group_shift;
  const uint group_mask = (1u << p.group_shift) - 1;
  XRows<2> rows;
  ONEBIT_UNROLL
  for (uint i = 0; i < 2; i++) {
    const uint r = m0 + min(x_row(thread_index, i), count - 1);
    rows.start[i] = find_matrices(x_index, w_index, p, r).x * p.k;
    rows.inside[i] = true;  // a row of another pass is multiplied and not stored
  }
  const uint row = thread_index / 2, part = thread_index % 2;
  const bool inside = n0 + row < p.n;

  constexpr auto shape = matmul2d_descriptor(kTileM, kTensorN, kTileK, false, true, false,
                                             matmul2d_descriptor::mode::multiply_accumulate);
  matmul2d<shape, execution_simdgroups<kTensorSimdgroups>> product;
  auto sum = product.template get_destination_cooperative_tensor<WTile<T>, WTile<T>, float>();
  uint begin = 0;
  while (begin < count) {  // one pass for each matrix that the rows meet
    const Matrices first = find_matrices(x_index, w_index, p, m0 + begin);
    uint end = begin + 1;
    while (end < count) {
      const Matrices next = find_matrices(x_index, w_index, p, m0 + end);
      if (next.w != first.w || next.valid != first.valid) break;
      end++;
    }
    const uint w_row = first.w * p.n + (inside ? n0 + row : 0);
    clear_sums(sum);
    TileLevels<T> levels = {T(0.0f), T(0.0f)};
    uint held = 0;
    for (uint word = 0; word < words; word++) {
      if (word % 2 == 0) held = hold_word<2>(packed + w_row * words, word, words, thread_index);
      if (inside && (word & group_mask) == 0) {
        const uint level = w_row * groups + (word >> p.group_shift);
        levels = tile_levels<T>(read_levels(scales, biases, level));
      }
      threadgroup T* tile_x = (threadgroup T*)memory + (word & 1) * half_elements;
      threadgroup T* tile_w = tile_x + kTileM * stride;
      load_x<T, 2>(tile_x, x, rows, word * kWordBits, thread_index);
      load_half_word(tile_w + row * stride, held_word<2>(held, word, thread_index), levels, part);
      // One barrier a step: the half that is filled next was multiplied before this one.
      threadgroup_barrier(mem_flags::mem_threadgroup);
      const array<int, 2> strides = {1, int(stride)};
      WTile<T> x_tile(tile_x, dextents<int, 2>(int(kTileK), int(kTileM)), strides);
      WTile<T> w_tile(tile_w, dextents<int, 2>(int(kTileK), int(kTensorN)), strides);
      product.run(x_tile, w_tile, sum);
    }
    const Block block = {n0, begin, end, first.valid};
    store_sums(sum, y + m0 * p.n, p.n, block);
    // The next pass fills the half that may still be multiplied.
    threadgroup_barrier(mem_flags::mem_threadgroup);
    begin = end;
  }
}

ONEBIT_INSTANTIATE("qmm_sorted_tensor_half_32", qmm_sorted_tensor<half>)
ONEBIT_INSTANTIATE("qmm_sorted_tensor_bfloat_32", qmm_sorted_tensor<bfloat>)

// y[m, n] = x[m, :] . dequantize(w)[n, :] for many rows of 16-bit x, by the tensor operations of
// Metal 4, which newer GPUs have units for. w stays packed in device memory and is decoded tile by
// tile in threadgroup memory (10 KB), with levels rounded to the dtype of x as in tile.h; x is read
// where it is. Threadgroup: 4 simdgroups, which multiply one tile of M x kTensorN outputs together.
// Grid: x over n, y over m, z over batches times splits of k. A split writes float partial sums.
#include "tensor_tile.h"

template <typename T, typename O, uint M>
[[kernel]] void qmm_tensor(const device T* x [[buffer(0)]],          // [x_matrices, m, k]
                           const device uint* packed [[buffer(1)]],  // [w_matrices, n, k / 32]
                           const device void* scales [[buffer(2)]],  // [w_matrices, n, groups]
                           const device void* biases [[buffer(3)]],  // as scales
                           device O* y [[buffer(4)]],                // [splits, batches, m, n]
                           const device long* x_index [[buffer(5)]],
                           const device long* w_index [[buffer(6)]],
                           constant QmmParams& p [[buffer(7)]],
                           uint3 group [[threadgroup_position_in_grid]],
                           uint thread_index [[thread_index_in_threadgroup]]) {
  constexpr uint stride = stride_of<T>(), half_elements = kTensorN * stride;
  threadgroup float4 memory[2 * half_elements * sizeof(T) / sizeof(float4)];
  const uint split = group.z / p.batches, batch = group.z % p.batches;
  const Matrices matrices = find_matrices(x_index, w_index, p, batch);
  const uint m0 = group.y * M, n0 = group.x * kTensorN, count = min(M, p.m - m0);
  const uint words = p.k / kWordBits, groups = words >> p.group_shift;
  const uint group_mask = (1u << p.group_shift) - 1;
  const uint begin = split * p.split_k / kWordBits;
  const uint end = min(p.k, split * p.split_k + p.split_k) / kWordBits;

  const uint row = thread_index / 2, part = thread_index % 2;
  const bool inside = n0 + row < p.n;
  packed += (matrices.w * p.n + (inside ? n0 + row : 0)) * words;
  const uint first_level = (matrices.w * p.n + n0 + row) * groups;
  device T* x_rows = (device T*)(x + (matrices.x * p.m + m0) * p.k);

  constexpr auto shape = matmul2d_descriptor(M, kTensorN, kTileK, false, true, false,
                                             matmul2d_descriptor::mode::multiply_accumulate);
  matmul2d<shape, execution_simdgroups<kTensorSimdgroups>> product;
  auto sum = product.template get_destination_cooperative_tensor<XTile<T>, WTile<T>, float>();
  clear_sums(sum);
  TileLevels<T> levels = {T(0.0f), T(0.0f)};
  uint held = 0;
  for (uint word = begin; word < end; word++) {
    if ((word - begin) % 2 == 0) held = hold_word<2>(packed, word, end, thread_index);
    if (inside && ((word & group_mask) == 0 || word == begin)) {
      const uint level = first_level + (word >> p.group_shift);
      levels = tile_levels<T>(read_levels(scales, biases, level));
    }
    threadgroup T* tile = (threadgroup T*)memory + (word & 1) * half_elements;
    load_half_word(tile + row * stride, held_word<2>(held, word - begin, thread_index), levels,
                   part);
    // One barrier a step: the half that is filled next was multiplied before this one.
    threadgroup_barrier(mem_flags::mem_threadgroup);
    // Rows of x past the last count as zeros: the operation minds the extents.
    XTile<T> x_tile(x_rows + word * kWordBits, dextents<int, 2>(int(kTileK), int(count)),
                    array<int, 2>({1, int(p.k)}));
    WTile<T> w_tile(tile, dextents<int, 2>(int(kTileK), int(kTensorN)),
                    array<int, 2>({1, int(stride)}));
    product.run(x_tile, w_tile, sum);
  }
  const Block block = {n0, 0, count, matrices.valid};
  store_sums(sum, y + (group.z * p.m + m0) * p.n, p.n, block);
}

ONEBIT_INSTANTIATE_TENSOR(qmm_tensor, half)
ONEBIT_INSTANTIATE_TENSOR(qmm_tensor, bfloat)

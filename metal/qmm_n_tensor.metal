// y[m, n] = sum over k of x[m, k] * dequantize(w)[k, n], with w [k, n] and groups along n, for
// 16-bit x: qmm_n by tensor operations, as qmm_tensor is qmm; 9 KB of threadgroup memory. Levels of
// groups of 128 are read twice, for a tile is half as wide. Grid: x over n, y over m, z over
// batches times splits of k. A split writes float partial sums.
#include "tensor_tile.h"

template <typename T, typename O, uint M>
[[kernel]] void qmm_n_tensor(const device T* x [[buffer(0)]],          // [x_matrices, m, k]
                             const device uint* packed [[buffer(1)]],  // [w_matrices, k, n / 32]
                             const device void* scales [[buffer(2)]],  // [w_matrices, k, groups]
                             const device void* biases [[buffer(3)]],  // as scales
                             device O* y [[buffer(4)]],                // [splits, batches, m, n]
                             const device long* x_index [[buffer(5)]],
                             const device long* w_index [[buffer(6)]],
                             constant QmmParams& p [[buffer(7)]],
                             uint3 group [[threadgroup_position_in_grid]],
                             uint thread_index [[thread_index_in_threadgroup]]) {
  constexpr uint stride = kTensorN + 16 / sizeof(T), half_elements = kTileK * stride;
  threadgroup float4 memory[2 * half_elements * sizeof(T) / sizeof(float4)];
  const uint split = group.z / p.batches, batch = group.z % p.batches;
  const Matrices matrices = find_matrices(x_index, w_index, p, batch);
  const uint m0 = group.y * M, n0 = group.x * kTensorN, count = min(M, p.m - m0);
  const uint words = p.n / kWordBits, groups = words >> p.group_shift;
  const uint k_begin = split * p.split_k, k_end = min(p.k, k_begin + p.split_k);

  // Four threads decode a row of w, two words.
  const uint row = thread_index / 4, part = thread_index % 2, column = thread_index % 4 / 2;
  const uint word = n0 / kWordBits + column;
  packed += matrices.w * p.k * words + word;
  const uint first_level = matrices.w * p.k * groups + (word >> p.group_shift);
  device T* x_rows = (device T*)(x + (matrices.x * p.m + m0) * p.k);

  constexpr auto shape = matmul2d_descriptor(M, kTensorN, kTileK, false, false, false,
                                             matmul2d_descriptor::mode::multiply_accumulate);
  matmul2d<shape, execution_simdgroups<kTensorSimdgroups>> product;
  auto sum = product.template get_destination_cooperative_tensor<XTile<T>, WTile<T>, float>();
  clear_sums(sum);
  for (uint k0 = k_begin; k0 < k_end; k0 += kTileK) {
    const uint k = k0 + row;
    uint bits = 0;
    TileLevels<T> levels = {T(0.0f), T(0.0f)};
    if (k < k_end && word < words) {
      bits = packed[k * words];
      levels = tile_levels<T>(read_levels(scales, biases, first_level + k * groups));
    }
    threadgroup T* tile = (threadgroup T*)memory + k0 / kTileK % 2 * half_elements;
    load_half_word(tile + row * stride + column * kWordBits, bits, levels, part);
    // One barrier a step: the half that is filled next was multiplied before this one.
    threadgroup_barrier(mem_flags::mem_threadgroup);
    // Past the last row of x and past k there are zeros: the operation minds the extents.
    XTile<T> x_tile(x_rows + k0, dextents<int, 2>(int(min(kTileK, k_end - k0)), int(count)),
                    array<int, 2>({1, int(p.k)}));
    WTile<T> w_tile(tile, dextents<int, 2>(int(kTensorN), int(kTileK)),
                    array<int, 2>({1, int(stride)}));
    product.run(x_tile, w_tile, sum);
  }
  const Block block = {n0, 0, count, matrices.valid};
  store_sums(sum, y + (group.z * p.m + m0) * p.n, p.n, block);
}

ONEBIT_INSTANTIATE_TENSOR(qmm_n_tensor, half)
ONEBIT_INSTANTIATE_TENSOR(qmm_n_tensor, bfloat)

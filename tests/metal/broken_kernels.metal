// Kernels with one defect each; test_emulator.py says what must be reported. All get 64 values of x
// in 64 threads, two simdgroups, and write 64 values of y.
#include <metal_stdlib>
using namespace metal;

struct Params {
  uint n;
  uint zero;
};

#define KERNEL(name, ...)                                                                  \
  [[kernel]] void name(                                                                    \
      const device float* x [[buffer(0)]], device float* y [[buffer(1)]],                  \
      constant Params& p [[buffer(2)]], __VA_ARGS__                                        \
      uint group [[threadgroup_position_in_grid]], uint i [[thread_index_in_threadgroup]], \
      uint lane [[thread_index_in_simdgroup]], uint simdgroup [[simdgroup_index_in_threadgroup]])

// Sound: what the others are broken versions of.
KERNEL(sound) {
  threadgroup float tile[64];
  tile[i] = x[i];
  threadgroup_barrier(mem_flags::mem_threadgroup);
  y[i] = tile[63 - i] + simd_sum(1.0f);
}

// Order
KERNEL(missing_barrier) {
  threadgroup float tile[64];
  tile[i] = x[i];
  y[i] = tile[63 - i];
}
KERNEL(missing_barrier_before_reuse) {
  threadgroup float tile[64];
  float sum = 0;
  for (uint round = 0; round < 2; round++) {
    tile[i] = x[i] + round;
    threadgroup_barrier(mem_flags::mem_threadgroup);
    sum += tile[63 - i];
  }
  y[i] = sum;
}
KERNEL(barrier_of_other_memory) {
  threadgroup float tile[64];
  tile[i] = x[i];
  threadgroup_barrier(mem_flags::mem_device);
  y[i] = tile[63 - i];
}
KERNEL(simdgroup_barrier_between_simdgroups) {
  threadgroup float tile[64];
  tile[i] = 0;
  threadgroup_barrier(mem_flags::mem_threadgroup);
  tile[i] = x[i];
  simdgroup_barrier(mem_flags::mem_threadgroup);
  y[i] = tile[63 - i];
}
KERNEL(simd_sum_is_no_barrier) {
  threadgroup float tile[64];
  tile[i] = x[i];
  const float sum = simd_sum(tile[i]);
  y[i] = tile[i ^ 1] + sum;
}
KERNEL(device_memory_without_barrier) {
  y[i] = x[i];
  threadgroup_barrier(mem_flags::mem_threadgroup);
  if (i == 0) y[63] = 0;
}
KERNEL(two_threads_write_one_value) {
  y[i / 2] = x[i];
  y[32 + i / 2] = x[i];
}
KERNEL(two_threadgroups_write_one_value) { y[i] = x[i] + group; }

// Bounds
KERNEL(read_past_the_end) { y[i] = x[i + 1]; }
KERNEL(read_before_the_start) { y[i] = x[int(i) - 1]; }
KERNEL(read_far_outside) { y[i] = x[i + 100000000]; }
KERNEL(write_past_the_end) { y[i + 1] = x[i]; }
KERNEL(tail_without_bound) {
  for (uint k = i; k < 65; k += 64) y[k] = x[k % 64];
}
KERNEL(past_a_threadgroup_array) {
  threadgroup float tile[64];
  tile[i + 1] = x[i];
  threadgroup_barrier(mem_flags::mem_threadgroup);
  y[i] = tile[i + 1];
}
KERNEL(write_to_read_only) {
  ((device float*)x)[i] = 0;
  y[i] = 0;
}
KERNEL(struct_longer_than_its_buffer) { y[i] = x[i] + p.zero; }
// Read or not: Metal's API validation ends the process for either.
KERNEL(buffer_not_bound, const device float* unbound [[buffer(3)]],) { y[i] = unbound[i]; }
KERNEL(unused_buffer_not_bound, const device float* unbound [[buffer(3)]],) { y[i] = x[i]; }

// Contents
KERNEL(uninitialised_threadgroup_memory) {
  threadgroup float tile[64];
  if (i != 5) tile[i] = x[i];
  threadgroup_barrier(mem_flags::mem_threadgroup);
  y[i] = tile[i];
}
KERNEL(uninitialised_output) { y[i] += x[i]; }
KERNEL(output_not_written) {
  if (i < 60) y[i] = x[i];
}

// Divergence
KERNEL(barrier_in_a_branch) {
  if (i < 32) threadgroup_barrier(mem_flags::mem_threadgroup);
  y[i] = x[i];
}
KERNEL(return_before_a_barrier) {
  y[i] = x[i];
  if (i >= 60) return;
  threadgroup_barrier(mem_flags::mem_threadgroup);
}
KERNEL(two_barriers_in_two_branches) {
  y[i] = x[i];
  if (i < 32) {
    threadgroup_barrier(mem_flags::mem_threadgroup);
  } else {
    threadgroup_barrier(mem_flags::mem_threadgroup);
  }
}
KERNEL(barriers_of_different_number) {
  y[i] = x[i];
  for (uint k = 0; k < 1 + simdgroup; k++) threadgroup_barrier(mem_flags::mem_threadgroup);
}
KERNEL(simd_sum_in_a_branch) {
  y[i] = x[i];
  if (lane < 16) y[i] = simd_sum(x[i]);
}
KERNEL(shuffle_after_return) {
  y[i] = x[i];
  if (lane == 31) return;
  y[i] = simd_shuffle_xor(x[i], 1);
}

// Alignment, resources, arithmetic
KERNEL(misaligned_vector_load) { y[i] = (*(const device float4*)(x + 1 + i / 64))[0]; }
KERNEL(misaligned_vector_store) {
  y[i] = 0;
  threadgroup_barrier(mem_flags::mem_device);
  if (i == 0) *(device float4*)(y + 2) = float4(1.0f);
}
KERNEL(misaligned_word) { y[i] = float(*(const device uint*)((const device uchar*)x + 2)); }
KERNEL(too_much_threadgroup_memory) {
  threadgroup float tile[10000];
  tile[i] = x[i];
  y[i] = tile[i];
}
KERNEL(division_by_zero) { y[i] = float(i / p.zero); }

// Tensor operations: a tile of 16 x 16 of what is in threadgroup memory.
template <int Simdgroups>
inline void multiply(threadgroup float* tile) {
  using Tile = tensor<threadgroup float, dextents<int, 2>, tensor_inline>;
  Tile a(tile, dextents<int, 2>(32, 2), array<int, 2>({1, 32}));
  constexpr auto shape = mpp::tensor_ops::matmul2d_descriptor(16, 16, 32, false, true);
  mpp::tensor_ops::matmul2d<shape, execution_simdgroups<Simdgroups>> product;
  auto sum = product.template get_destination_cooperative_tensor<Tile, Tile, float>();
  product.run(a, a, sum);
}
KERNEL(operation_of_too_few_threads) {
  threadgroup float tile[64];
  y[i] = tile[i] = x[i];
  threadgroup_barrier(mem_flags::mem_threadgroup);
  multiply<1>(tile);
}
KERNEL(operation_in_a_branch) {
  threadgroup float tile[64];
  y[i] = tile[i] = x[i];
  threadgroup_barrier(mem_flags::mem_threadgroup);
  if (simdgroup == 0) multiply<2>(tile);
}
KERNEL(no_barrier_before_an_operation) {
  threadgroup float tile[64];
  y[i] = tile[i] = x[i];
  multiply<2>(tile);
}
KERNEL(no_barrier_after_an_operation) {
  threadgroup float tile[64];
  y[i] = tile[i] = x[i];
  threadgroup_barrier(mem_flags::mem_threadgroup);
  multiply<2>(tile);
  tile[i] = 0;
}

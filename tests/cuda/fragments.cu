// One instruction of instructions.cuh a kernel, its matrices in memory: element by element where
// the PTX ISA says that a lane holds it ("Matrix Fragments for mma.m16n8k16", ".m16n8k128",
// "Register Fragments for wgmma.mma_async.m64nNk16"). One warp, or one warpgroup.
//   x       A, then B, in rows
//   packed  the same for bits
//   y       D, in rows
#include "../../csrc/cuda/kernels/common.cuh"

struct Fragment {
  uint32_t group, thread;  // groupID and threadID_in_group
  __device__ __forceinline__ uint32_t row_of_a(int i) const {
    return (0 <= i && i < 2) || (4 <= i && i < 6) ? group : group + 8;
  }
  __device__ __forceinline__ uint32_t column_of_a(int i) const {
    return i < 4 ? thread * 2 + (i & 1) : thread * 2 + (i & 1) + 8;
  }
  __device__ __forceinline__ uint32_t row_of_b(int i) const {
    return i < 2 ? thread * 2 + (i & 1) : thread * 2 + (i & 1) + 8;
  }
};
__device__ __forceinline__ Fragment fragment() {
  const uint32_t lane = threadIdx.x % 32;
  return {lane >> 2, lane % 4};
}

// Registers of 8 elements of A, rows of 16 columns.
__device__ __forceinline__ void load_a(uint32_t (&a)[4], const uint16_t* matrix) {
  const Fragment f = fragment();
  for (int i = 0; i < 4; i++) a[i] = 0;
  for (int i = 0; i < 8; i++) {
    a[i / 2] |= uint32_t(matrix[f.row_of_a(i) * 16 + f.column_of_a(i)]) << i % 2 * 16;
  }
}

// [16, 16] . [16, 8]
ONEBIT_KERNEL product_of_warp(const __grid_constant__ ProductArgs p) {
  const Fragment f = fragment();
  const uint16_t *a = static_cast<const uint16_t*>(p.x), *b = a + 16 * 16;
  uint32_t of_a[4], of_b[2] = {};
  load_a(of_a, a);
  for (int i = 0; i < 4; i++) {
    of_b[i / 2] |= uint32_t(b[f.row_of_b(i) * 8 + f.group]) << i % 2 * 16;
  }
  float d[4] = {};
  mma(d, of_a[0], of_a[1], of_a[2], of_a[3], of_b[0], of_b[1]);
  float* y = static_cast<float*>(p.y);
  for (int i = 0; i < 4; i++) {
    y[(i < 2 ? f.group : f.group + 8) * 8 + f.thread * 2 + (i & 1)] = d[i];
  }
}

// [16, 128] . [128, 8] of bits; A in rows of four words, B in columns of four.
ONEBIT_KERNEL product_of_bits(const __grid_constant__ ProductArgs p) {
  const Fragment f = fragment();
  const uint32_t *a = p.packed, *b = a + 16 * 4;
  int d[4];
  bmma(d, a[f.group * 4 + f.thread], a[(f.group + 8) * 4 + f.thread], b[f.group * 4 + f.thread]);
  int* y = static_cast<int*>(p.y);
  for (int i = 0; i < 4; i++) {
    y[(i < 2 ? f.group : f.group + 8) * 8 + f.thread * 2 + (i & 1)] = d[i];
  }
}

// Four tiles [8, 8]: row r of tile i from the address of lane 8 i + r, to the lanes of row r.
ONEBIT_KERNEL tiles_of_warp(const __grid_constant__ ProductArgs p) {
  __shared__ uint4 tile[32];
  const uint32_t lane = threadIdx.x;
  const Fragment f = fragment();
  tile[lane] = static_cast<const uint4*>(p.x)[lane];
  __syncthreads();
  uint32_t b[2][2];
  load_tiles(b, shared_address(&tile[lane]));
  uint32_t* y = static_cast<uint32_t*>(p.y);
  for (int i = 0; i < 4; i++) y[(8 * i + f.group) * 4 + f.thread] = b[i / 2][i % 2];
}

// [64, 64] . [64, 32] by four wgmma; B comes as its columns [32, 64], put where the copy engine
// puts 16 bytes of a row: part ^ row % 8.
ONEBIT_KERNEL product_of_warpgroup(const __grid_constant__ ProductArgs p) {
  __shared__ uint4 tile[2 * 32 * 8];
  // A block of 8 rows begins at a multiple of 1024 bytes.
  uint4* aligned = tile + (1024 - (shared_address(tile) & 1023)) % 1024 / 16;
  const uint16_t* a = static_cast<const uint16_t*>(p.x);
  const uint4* b = reinterpret_cast<const uint4*>(a + 64 * 64);
  for (uint32_t i = threadIdx.x; i < 32 * 8; i += 128) {
    const uint32_t row = i / 8, part = i % 8;
    aligned[row * 8 + (part ^ row % 8)] = b[i];
  }
#if defined(__CUDA_ARCH__)
  asm volatile("fence.proxy.async;" ::: "memory");  // tensor cores read what threads wrote
#endif
  __syncthreads();
  const Fragment f = fragment();
  const uint32_t row0 = threadIdx.x / 32 * 16;
  uint32_t of_a[16] = {};
  for (int k = 0; k < 4; k++) {
    for (int i = 0; i < 8; i++) {
      const uint32_t column = 16 * k + f.column_of_a(i);
      of_a[4 * k + i / 2] |= uint32_t(a[(row0 + f.row_of_a(i)) * 64 + column]) << i % 2 * 16;
    }
  }
  float d[16] = {};
  wgmma_fence();
  ONEBIT_UNROLL
  for (int k = 0; k < 4; k++) {
    Wgmma<32>::multiply(d, of_a + 4 * k, tile_descriptor(aligned) + (k * 32 >> 4), k > 0);
  }
  wgmma_commit();
  wgmma_wait<0>(of_a);
  float* y = static_cast<float*>(p.y);
  for (int i = 0; i < 16; i++) {
    const uint32_t row = row0 + f.group + 8 * (i / 2 % 2);
    y[row * 32 + 8 * (i / 4) + f.thread * 2 + (i & 1)] = d[i];
  }
}

// Conversions of every 16-bit float, and bytes: y[i] = {float, back as float16, as bfloat16}.
ONEBIT_KERNEL conversions(const __grid_constant__ ProductArgs p) {
  const uint32_t i = blockIdx.x * 256 + threadIdx.x;
  const float half = float_of_half(uint16_t(i)), wide = __uint_as_float(i * 65537u + 0x1234u);
  uint32_t* y = static_cast<uint32_t*>(p.y) + 4 * i;
  y[0] = __float_as_uint(half);
  y[1] = half_of_float(wide) | uint32_t(bfloat_of_float(wide)) << 16;
  y[2] = min_of_halves(i * 65537u, (i * 40503u & 0xffffu) * 65537u);
  y[3] = signs(i * 2654435761u, ~i * 2246822519u, i & 3);
}

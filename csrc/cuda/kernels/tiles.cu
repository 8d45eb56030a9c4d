// y[m, n] = x[m, :] . W[n, :] for tens to hundreds of rows of x, where there is no wgmma.
//
// A block owns 128 rows of W and kRows rows of x; its warps split both. Stages of 128 columns of x
// and of packed words come by asynchronous copies. A warp decodes W as the kernel of wgmma does
// into the A operand of mma.m16n8k16 and reads x as B by ldmatrix: fragment by fragment, for all
// its tiles. y^T = W . x^T.
//   ONEBIT_ROWS      rows of x in a tile: 32, 64, 128
//   ONEBIT_STAGES
//   ONEBIT_PARTIAL   1: y holds float sums of a split of k
#include "tiles.cuh"

constexpr int kRows = ONEBIT_ROWS, kStages = ONEBIT_STAGES;
constexpr int kStep = 128;  // columns of a stage
constexpr int kGroups = kStep / kGroupSize;
constexpr int kWarps = kTileThreads / 32;
constexpr int kWarpsOfX = kRows >= 64 ? 2 : 1;
constexpr int kRowTiles = kTileOutputs / 16 / (kWarps / kWarpsOfX);  // of a warp: 16 rows of W
constexpr int kColumnTiles = kRows / 8 / kWarpsOfX;                  // 8 rows of x
constexpr int kXBytes = kRows * kStep * 2;
constexpr int kStageBytes = kXBytes + kTileOutputs * 16;

// One stage: rows of x, whose 16-byte parts are swapped by row against bank conflicts, then words.
__device__ __forceinline__ void fetch(
    const TileArgs& p, uint32_t stage, uint32_t m0, uint32_t n0, uint32_t step) {
  ONEBIT_UNROLL
  for (int i = 0; i < kRows * 16 / kTileThreads; i++) {
    const uint32_t at = i * kTileThreads + threadIdx.x, row = at / 16, part = at % 16;
    const uint32_t m = m0 + row;
    const uint16_t* from = static_cast<const uint16_t*>(p.x) + int64_t(min(m, p.m - 1)) * p.k +
                           step * kStep + part * 8;
    copy(stage + row * (kStep * 2) + ((part ^ (row & 7)) << 4), from, m < p.m);
  }
  if (threadIdx.x < kTileOutputs) {
    const uint32_t row = min(n0 + threadIdx.x, p.n - 1);
    copy(stage + kXBytes + threadIdx.x * 16,
         p.packed + int64_t(row) * (p.k / kWordBits) + step * (kStep / kWordBits), true);
  }
}

ONEBIT_KERNEL __launch_bounds__(kTileThreads, kRows == 128 || kGroups == 4 ? 1 : 2)
    tiles(const __grid_constant__ TileArgs p) {
  extern __shared__ __align__(16) uint8_t shared[];
  wait_for_previous();
  const int lane = threadIdx.x & 31, warp = threadIdx.x >> 5, g = lane >> 2, t = lane & 3;
  const uint32_t m0 = blockIdx.x * kRows, n0 = blockIdx.y * kTileOutputs;
  const uint32_t first = blockIdx.z * p.steps, steps = min(p.steps, p.k / kStep - first);
  const int first_row = warp / kWarpsOfX * kRowTiles * 16;  // of W, in the tile
  const int first_m = warp % kWarpsOfX * kColumnTiles * 8;  // of x
  const uint32_t base = shared_address(shared);
  // ldmatrix takes an address a lane: of two tiles of 8 rows, each with two parts of 16 bytes.
  const uint32_t line = (first_m + (lane >> 4) * 8 + (lane & 7)) * (kStep * 2);
  const uint32_t part = lane >> 3 & 1, swap = lane & 7;
  const uint32_t first_shift = 7 - 2 * t;

  uint32_t row[kRowTiles][2];
  using Levels = LevelsOf<kGroups>;
  Levels next[kRowTiles];
  ONEBIT_UNROLL
  for (int r = 0; r < kRowTiles; r++) {
    ONEBIT_UNROLL
    for (int h = 0; h < 2; h++) row[r][h] = min(n0 + first_row + r * 16 + h * 8 + g, p.n - 1);
    next[r].load(p.scales, p.biases, p.k, row[r], first);
  }
  ONEBIT_UNROLL
  for (int s = 0; s < kStages - 1; s++) {
    if (s < steps) fetch(p, base + s * kStageBytes, m0, n0, first + s);
    commit_copies();
  }

  float sum[kRowTiles][kColumnTiles][4] = {};
#pragma unroll 1
  for (uint32_t i = 0; i < steps; i++) {
    wait_for_copies<kStages - 2>();
    __syncthreads();  // the stage is there for all, and what it replaces was read by all
    if (i + kStages - 1 < steps) {
      fetch(p, base + (i + kStages - 1) % kStages * kStageBytes, m0, n0, first + i + kStages - 1);
    }
    commit_copies();
    const uint32_t stage = i % kStages * kStageBytes;

    uint32_t word[kRowTiles][2][4], low[kRowTiles][2][kGroups], change[kRowTiles][2][kGroups];
    ONEBIT_UNROLL
    for (int r = 0; r < kRowTiles; r++) {
      ONEBIT_UNROLL
      for (int h = 0; h < 2; h++) {
        const uint4 v = *reinterpret_cast<const uint4*>(shared + stage + kXBytes +
                                                        (first_row + r * 16 + h * 8 + g) * 16);
        word[r][h][0] = v.x, word[r][h][1] = v.y, word[r][h][2] = v.z, word[r][h][3] = v.w;
        ONEBIT_UNROLL
        for (int j = 0; j < kGroups; j++) {
          const float scale = next[r].scale(h, j), bias = next[r].bias(h, j);
          low[r][h][j] = twice<X>(bias + scale * 0.0f);  // infinity times 0 is NaN
          change[r][h][j] = low[r][h][j] ^ twice<X>(bias + scale);
        }
      }
      if (i + 1 < steps) next[r].load(p.scales, p.biases, p.k, row[r], first + i + 1);
    }
    ONEBIT_UNROLL
    for (int f = 0; f < kStep / 16; f++) {
      uint32_t b[kColumnTiles][2];
      ONEBIT_UNROLL
      for (int c = 0; c < kColumnTiles; c += 2) {
        load_tiles(*reinterpret_cast<uint32_t (*)[2][2]>(b[c]),
                   base + stage + line + c * 8 * (kStep * 2) + ((2 * f + part ^ swap) << 4));
      }
      ONEBIT_UNROLL
      for (int r = 0; r < kRowTiles; r++) {
        uint32_t a[4];
        ONEBIT_UNROLL
        for (int h = 0; h < 2; h++) {
          const uint32_t bits = word[r][h][f / 2];
          const uint32_t even = bits << first_shift, odd = bits << (first_shift - 1);
          const int group = f / 2 / kGroupWords;
          ONEBIT_UNROLL
          for (int j = 0; j < 2; j++) {
            a[2 * j + h] =
                low[r][h][group] ^ (signs(even, odd, f % 2 * 2 + j) & change[r][h][group]);
          }
        }
        ONEBIT_UNROLL
        for (int c = 0; c < kColumnTiles; c++) {
          mma(sum[r][c], a[0], a[1], a[2], a[3], b[c][0], b[c][1]);
        }
      }
    }
  }

  // y [kRows, 128] through shared memory, so that rows are written in whole lines.
  constexpr int kPitch = kTileOutputs + 4;
  static_assert(kRows * kPitch * 4 <= 2 * kStageBytes, "y fits where the stages were");
  float* tile = reinterpret_cast<float*>(shared);
  wait_for_copies<0>();
  __syncthreads();
  ONEBIT_UNROLL
  for (int r = 0; r < kRowTiles; r++) {
    ONEBIT_UNROLL
    for (int c = 0; c < kColumnTiles; c++) {
      ONEBIT_UNROLL
      for (int e = 0; e < 4; e++) {
        tile[(first_m + c * 8 + 2 * t + (e & 1)) * kPitch + first_row + r * 16 + (e >> 1) * 8 + g] =
            sum[r][c][e];
      }
    }
  }
  __syncthreads();
  store_tile<kRows, kTileOutputs, kTileThreads>(
      tile, static_cast<Out*>(p.y) + int64_t(blockIdx.z) * p.m * p.n, m0, n0, p.m, p.n);
}

// y[m, n] = x[m, :] . W[n, :] on Hopper, for tens to hundreds of rows of x.
//
// A block owns 64 * kConsumers rows of W and kRows rows of x. One warp asks the copy engine for x
// and for packed words, 128 * kSteps columns a stage: 16 bytes of a row at a time are too little
// work for an engine that takes row after row, where few rows of x leave little else to do. Every
// other warpgroup decodes 64 rows of W straight into wgmma's A registers and multiplies them with x
// in shared memory. y^T = W . x^T.
//
// Decoding: in a fragment of 16 columns lane t of a quad owns columns 2 t, 2 t + 1, 2 t + 8 and
// 2 t + 9. Two shifts per word bring those bits to the tops of its bytes; a byte permutation that
// copies signs makes masks of two weights, and one logic operation chooses between the two levels
// of the group, rounded once to the dtype of x: 1.25 operations a weight, for any dtype of the
// levels. While the tensor cores multiply one half of a stage, the other half is decoded.
//
// float32 x comes as three bfloat16 parts; bits are then 1 and -1, and scales and the middles of
// the levels meet the float sums after every group.
//   ONEBIT_ROWS       rows of x in a tile: 32, 64, 128, 256
//   ONEBIT_CONSUMERS  warpgroups that multiply
//   ONEBIT_STAGES
//   ONEBIT_STEPS      1, or 4 when k is a multiple of 512
//   ONEBIT_PARTIAL    1: y holds float sums of a split of k
#include "tiles.cuh"

constexpr int kRows = ONEBIT_ROWS, kConsumers = ONEBIT_CONSUMERS, kStages = ONEBIT_STAGES;
constexpr int kParts = kSame<X, Float> ? 3 : 1;
constexpr int kOutputs = 64 * kConsumers;
constexpr int kSteps = ONEBIT_STEPS;         // of a stage
constexpr int kStep = 128;                   // columns
constexpr int kGroups = kStep / kGroupSize;  // of a step
constexpr int kTileBytes = kRows * 128;      // 64 columns of x
constexpr int kXBytes = kParts * 2 * kSteps * kTileBytes;
constexpr int kStageBytes = kXBytes + kOutputs * 16 * kSteps;
constexpr int kSums = kRows / 2;  // of a thread
constexpr int kThreads = 128 * (kConsumers + 1);
// Registers of a multiplying thread; the copying warpgroup gives the rest away.
constexpr bool kLarge = kSums * (kParts == 3 ? 2 : 1) >= 128;

// A fragments of 64 columns: 4 times 4 registers.
__device__ __forceinline__ void decode(const uint32_t (&word)[2][4],
                                       int half,
                                       const uint32_t (&low)[2][kGroups],
                                       const uint32_t (&change)[2][kGroups],
                                       uint32_t first_shift,
                                       uint32_t (&a)[16]) {
  ONEBIT_UNROLL
  for (int j = 0; j < 2; j++) {
    ONEBIT_UNROLL
    for (int h = 0; h < 2; h++) {
      const uint32_t bits = word[h][2 * half + j];
      const uint32_t even = bits << first_shift, odd = bits << (first_shift - 1);
      const int group = (2 * half + j) / kGroupWords;
      ONEBIT_UNROLL
      for (int b = 0; b < 4; b++) {  // byte b: fragment 2 j + b / 2, columns + 8 * (b % 2)
        const uint32_t mask = signs(even, odd, b);
        uint32_t& to = a[(2 * j + b / 2) * 4 + 2 * (b & 1) + h];
        to = low[h][group] ^ (mask & change[h][group]);
      }
    }
  }
}

ONEBIT_KERNEL __launch_bounds__(kThreads, 1) wgmma(const __grid_constant__ WgmmaArgs p) {
  extern __shared__ uint8_t unaligned[];
  // The swizzle counts rows from multiples of 1024 bytes.
  uint8_t* shared = unaligned + (1024 - (shared_address(unaligned) & 1023)) % 1024;
  __shared__ uint64_t full[kStages], empty[kStages];
  // What precedes this kernel may have written x or the weights; of float32 x, they are done before
  // the parts of x are.
  if constexpr (kParts == 1) wait_for_previous();
  const int warpgroup = threadIdx.x / 128;
  const uint32_t m0 = blockIdx.x * kRows, n0 = blockIdx.y * kOutputs;
  const uint32_t first = blockIdx.z * p.steps;
  const uint32_t steps = min(p.steps, p.k / (kStep * kSteps) - first);  // stages
  if (threadIdx.x == 0) {
    for (int s = 0; s < kStages; s++) {
      barrier_init(&full[s], 1);
      barrier_init(&empty[s], kConsumers);
    }
    publish_barriers();
  }
  __syncthreads();

  if (warpgroup == kConsumers) {
    if constexpr (kLarge) give_registers<24>();
    if (threadIdx.x == kConsumers * 128) {
      if constexpr (kParts == 3) wait_for_previous();  // the parts of x are ready
      for (uint32_t i = 0; i < steps; i++) {
        const uint32_t s = i % kStages;
        if (i >= kStages) barrier_wait(&empty[s], i / kStages - 1 & 1);
        uint8_t* stage = shared + s * kStageBytes;
        barrier_expect(&full[s], kStageBytes);
        copy_box(stage + kXBytes, &p.words, &full[s], (first + i) * 4 * kSteps, n0);
        copy_box(stage, &p.x, &full[s], 0, m0, (first + i) * 2 * kSteps, 0);
      }
    }
    return;
  }

  if constexpr (kLarge) take_registers<240>();
  const int lane = threadIdx.x & 31, warp = threadIdx.x / 32 & 3, g = lane >> 2, t = lane & 3;
  const int row_in_tile = warpgroup * 64 + warp * 16 + g;
  const uint32_t row[2] = {min(n0 + row_in_tile, p.n - 1), min(n0 + row_in_tile + 8, p.n - 1)};
  const uint32_t first_shift = 7 - 2 * t;
  float sum[kSums] = {};
  uint32_t a[2][16];
  ONEBIT_UNROLL
  for (int i = 0; i < 32; i++) a[i / 16][i % 16] = 0;
  float total[kParts == 3 ? kSums : 1] = {};
  using Levels = LevelsOf<kSteps * kGroups>;
  Levels next;
  next.load(p.scales, p.biases, p.k, row, first);
  if constexpr (kParts == 3) wait_for_previous();  // so are the sums

#pragma unroll 1
  for (uint32_t i = 0; i < steps; i++) {
    const uint32_t s = i % kStages;
    uint8_t* stage = shared + s * kStageBytes;
    const Levels levels = next;
    if (i + 1 < steps) next.load(p.scales, p.biases, p.k, row, first + i + 1);
    barrier_wait(&full[s], i / kStages & 1);
    const uint64_t tile = tile_descriptor(stage);
    ONEBIT_UNROLL
    for (int step = 0; step < kSteps; step++) {
      uint32_t word[2][4];
      ONEBIT_UNROLL
      for (int h = 0; h < 2; h++) {
        // In rows of 64 bytes the copy engine swaps 16-byte parts, which spares bank conflicts.
        const int line = row_in_tile + 8 * h, part = kSteps == 4 ? step ^ (line >> 1 & 3) : 0;
        const uint4 v =
            *reinterpret_cast<const uint4*>(stage + kXBytes + (line * kSteps + part) * 16);
        word[h][0] = v.x, word[h][1] = v.y, word[h][2] = v.z, word[h][3] = v.w;
      }
      uint32_t low[2][kGroups], change[2][kGroups];
      if constexpr (kParts == 1) {
        ONEBIT_UNROLL
        for (int h = 0; h < 2; h++) {
          ONEBIT_UNROLL
          for (int j = 0; j < kGroups; j++) {
            const float scale = levels.scale(h, step * kGroups + j);
            const float bias = levels.bias(h, step * kGroups + j);
            low[h][j] = twice<X>(bias + scale * 0.0f);  // infinity times 0 is NaN
            change[h][j] = low[h][j] ^ twice<X>(bias + scale);
          }
        }
        ONEBIT_UNROLL
        for (int half = 0; half < 2; half++) {
          wgmma_wait<1>(a[half]);  // the products of two halves ago
          if (step == 0 && half == 1 && i > 0 && threadIdx.x % 128 == 0) {
            barrier_arrive(&empty[(i - 1) % kStages]);
          }
          decode(word, half, low, change, first_shift, a[half]);
          wgmma_fence();
          ONEBIT_UNROLL
          for (int j = 0; j < 4; j++) {
            Wgmma<kRows>::multiply(sum, a[half] + 4 * j,
                                   tile + ((step * 2 + half) * kTileBytes + j * 32 >> 4), 1);
          }
          wgmma_commit();
        }
      } else {
        Form form[2][kGroups];
        ONEBIT_UNROLL
        for (int h = 0; h < 2; h++) {
          ONEBIT_UNROLL
          for (int j = 0; j < kGroups; j++) {
            form[h][j] = form_of(levels.scale(h, j), levels.bias(h, j));
            low[h][j] = form[h][j].is_signed ? 0xbf80bf80u : 0u;              // -1.0 or 0
            change[h][j] = form[h][j].is_signed ? 0x80008000u : 0x3f803f80u;  // to 1.0
          }
        }
        decode(word, 0, low, change, first_shift, a[0]);
        decode(word, 1, low, change, first_shift, a[1]);
        ONEBIT_UNROLL
        for (int j = 0; j < kGroups; j++) {
          // The last two parts, then the first: tensor cores cut off what they add, and the first
          // part alone fits their 24 bits.
          ONEBIT_UNROLL
          for (int phase = 0; phase < 2; phase++) {
            const uint32_t group = (first + i) * kGroups + j;
            const float* sums =
                p.sums + (phase == 0 ? p.k / kGroupSize + group : group) * int64_t(p.sum_rows) +
                m0 + 2 * t;
            wgmma_fence();
            ONEBIT_UNROLL
            for (int part = phase == 0 ? 2 : 0; part >= (phase == 0 ? 1 : 0); part--) {
              ONEBIT_UNROLL
              for (int c = j * kGroupSize / 16; c < (j + 1) * kGroupSize / 16; c++) {
                Wgmma<kRows>::multiply(sum, a[c / 4] + 4 * (c % 4),
                                       tile + ((part * 2 + c / 4) * kTileBytes + c % 4 * 32 >> 4),
                                       part == 1 || c > j * kGroupSize / 16);
              }
            }
            wgmma_commit();
            wgmma_wait<0>(a[0]);
            wgmma_wait<0>(a[1]);
            ONEBIT_UNROLL
            for (int c = 0; c < kSums; c++) pin(sum[c]);
            ONEBIT_UNROLL
            for (int c = 0; c < kSums; c++) {
              const int h = c >> 1 & 1;
              // One sum per group, and then the total: which rounds it once.
              float of_group = form[h][j].of_bits * sum[c];
              if constexpr (kHasBiases) {
                of_group += form[h][j].of_x * __ldg(sums + c / 4 * 8 + (c & 1));
              }
              total[c] += of_group;
            }
          }
        }
        if (threadIdx.x % 128 == 0) barrier_arrive(&empty[s]);
      }
    }
  }
  wgmma_wait<0>(a[0]);
  wgmma_wait<0>(a[1]);
  ONEBIT_UNROLL
  for (int c = 0; c < kSums; c++) pin(sum[c]);

  // y [kRows, kOutputs] through shared memory, so that rows are written in whole lines. As floats:
  // ptxas moves a conversion in front of the last wait, and then serializes every product.
  constexpr int kPitch = kOutputs + 4;
  static_assert(kRows * kPitch * 4 <= kStages * kStageBytes, "y fits where the stages were");
  float* tile = reinterpret_cast<float*>(shared);
  barrier_of_some<128 * kConsumers>();
  ONEBIT_UNROLL
  for (int c = 0; c < kSums; c++) {
    const int m = c / 4 * 8 + 2 * t + (c & 1);
    tile[m * kPitch + row_in_tile + 8 * (c >> 1 & 1)] =
        kParts == 3 ? total[kParts == 3 ? c : 0] : sum[c];
  }
  barrier_of_some<128 * kConsumers>();
  Out* y = static_cast<Out*>(p.y) + int64_t(blockIdx.z) * p.m * p.n;
  store_tile<kRows, kOutputs, 128 * kConsumers>(tile, y, m0, n0, p.m, p.n);
}

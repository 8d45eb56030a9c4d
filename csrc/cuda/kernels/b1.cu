// y[m, n] = x[m, :] . W[n, :] for m <= 4 with no decoding at all: packed words are the A operand of
// the 1-bit tensor-core product (and, then population count), and x comes as bit planes: kPlanes
// bits of fixed point per block of 128 columns, relative to the block's largest |x|.
//   y = sum over groups of scale * 2^e * sum over planes p of 2^p * popcount(word & plane_p)
//       + bias * (sum of x)
// Native on sm_80 to sm_90; later architectures emulate it, and hmma.cu serves there.
//
// The instruction takes 128 columns at once: of a block that holds several groups, it is repeated
// with the planes of one group and zeros for the others.
//
// Fixed point costs small values bits: beside an outlier they would lose all of them. A block more
// than half of whose values are not exact in fixed point is not multiplied as planes: its unit is
// NaN, and its bits choose floats. So is a block with an infinity or a NaN.
//   ONEBIT_M   rows of x
//   ONEBIT_WARPS, ONEBIT_ROW_TILES   of a block of the product
#include "common.cuh"

using X = ONEBIT_X;
using Level = ONEBIT_LEVELS;
constexpr int M = ONEBIT_M, kWarps = ONEBIT_WARPS, kRowTiles = ONEBIT_ROW_TILES;
constexpr int kOctets = kSame<X, Float> ? 4 : 2;  // of planes: an mma has 8 columns
constexpr int kPlanes = 8 * kOctets;
constexpr int kBlock = 128;
constexpr int kShares = kBlock / kGroupSize;  // groups of a block

// Two's complement makes each lane's sum large and the four lanes' sum small: float32 would lose 3
// bits in that cancellation (1.4e-6 measured), so float32 x adds up in float64.
template <class T>
struct SumOf {
  using type = float;
};
template <>
struct SumOf<Float> {
  using type = double;
};
using Sum = SumOf<X>::type;

// planes [k / 128, M, kOctets, 32]: what lane (g, t) needs, word t of plane 8 h + g.
// groups [k / 128, M, kShares]: {unit, sum of x, what is left of it}. One warp a block and row.
ONEBIT_KERNEL __launch_bounds__(128) planes(const __grid_constant__ ProductArgs p) {
  wait_for_previous();
  let_next_start();  // after the wait: what precedes this kernel may write the weights
  const int lane = threadIdx.x & 31;
  const uint32_t item = blockIdx.x * 4 + (threadIdx.x >> 5);
  const uint32_t block = item / M, m = item % M;
  if (block >= p.k / kBlock) return;
  const X* x = static_cast<const X*>(p.x) + int64_t(m) * p.k + block * kBlock;
  float value[4], top = 0;
  Sum sum[kShares] = {};
  bool finite = true;
  ONEBIT_UNROLL
  for (int i = 0; i < 4; i++) {
    value[i] = to_float(x[i * 32 + lane]);
    top = fmaxf(top, fabsf(value[i]));
    finite = finite && isfinite(value[i]);
    sum[i / kGroupWords] += value[i];
  }
  ONEBIT_UNROLL
  for (int d = 16; d; d >>= 1) {
    top = fmaxf(top, __shfl_xor_sync(kAll, top, d));
    ONEBIT_UNROLL
    for (int s = 0; s < kShares; s++) sum[s] += __shfl_xor_sync(kAll, sum[s], d);
  }
  const int e = max(int(__float_as_uint(top) >> 23) - 126, -90);  // top < 2^e
  const int shift = min(kPlanes - 1 - e, 120);
  const float up = __uint_as_float(uint32_t(127 + shift) << 23);
  const float down = __uint_as_float(uint32_t(127 - shift) << 23);
  constexpr int kMost = int((1u << (kPlanes - 1)) - 1);
  uint32_t mine[kOctets] = {};
  int inexact = 0;
  ONEBIT_UNROLL
  for (int i = 0; i < 4; i++) {
    const float scaled = value[i] * up;
    const int fixed = max(min(__float2int_rn(scaled), kMost), -kMost);
    inexact += __popc(__ballot_sync(kAll, float(fixed) != scaled));
    ONEBIT_UNROLL
    for (int plane = 0; plane < kPlanes; plane++) {
      const uint32_t word = __ballot_sync(kAll, fixed >> plane & 1);
      if (lane == (plane & 7) * 4 + i) mine[plane >> 3] = word;
    }
  }
  ONEBIT_UNROLL
  for (int h = 0; h < kOctets; h++) p.planes[(item * kOctets + h) * 32 + lane] = mine[h];
  const bool good = __all_sync(kAll, finite) && inexact <= kBlock / 2;
  ONEBIT_UNROLL
  for (int s = 0; s < kShares; s++) {
    if (lane != s) continue;
    const float rounded = float(sum[s]);
    reinterpret_cast<float4*>(p.groups)[item * kShares + s] = make_float4(
        good ? down : nan_value(), rounded, isfinite(rounded) ? sum[s] - rounded : 0, 0);
  }
}

// The values of x at the set bits of one word.
__device__ __forceinline__ Sum chosen_sum(const X* x, uint32_t word) {
  Sum sum = 0;
#pragma unroll 1
  for (int i = 0; i < kWordBits; i++) sum += word >> i & 1 ? Sum(to_float(x[i])) : Sum(0);
  return sum;
}

ONEBIT_KERNEL __launch_bounds__(kWarps * 32) b1(const __grid_constant__ ProductArgs p) {
  const int lane = threadIdx.x & 31, warp = threadIdx.x >> 5, g = lane >> 2, t = lane & 3;
  const uint32_t row0 = blockIdx.x * 16 * kRowTiles;
  const uint32_t words = p.k / kWordBits, groups = p.k / kGroupSize;
  const Level* scales = static_cast<const Level*>(p.scales);
  const Level* biases = static_cast<const Level*>(p.biases);
  const float4* info = reinterpret_cast<const float4*>(p.groups);
  const float lane_weight = float(1 << (2 * t));
  const int last_plane = t == 3 ? -512 : 512;  // two's complement: it counts negative
  uint32_t in_group[kShares];                  // all bits where word t is of this group
  ONEBIT_UNROLL
  for (int s = 0; s < kShares; s++) in_group[s] = t / kGroupWords == s ? ~0u : 0u;
  Sum out[kRowTiles][2][M] = {};
  // Four blocks at a time.
  for (uint32_t block = warp * 4; block < p.k / kBlock; block += kWarps * 4) {
    uint32_t word[kRowTiles][2][4];
    Four<Level> scale[kRowTiles][2][kShares];
    Four<Level> bias[kRowTiles][2];
    ONEBIT_UNROLL
    for (int r = 0; r < kRowTiles; r++) {
      ONEBIT_UNROLL
      for (int h = 0; h < 2; h++) {
        const int64_t n = min(row0 + r * 16 + h * 8 + g, p.n - 1);  // past the end: not stored
        ONEBIT_UNROLL
        for (int q = 0; q < 4; q++) {
          word[r][h][q] = __ldcs(p.packed + n * words + (block + q) * 4 + t);
        }
        ONEBIT_UNROLL
        for (int s = 0; s < kShares; s++) {
          scale[r][h][s].load(scales + n * groups + block * kShares + 4 * s);
        }
        // lane t takes the biases of block t of the four
        const Level* mine = (kHasBiases ? biases : scales) + n * groups + (block + t) * kShares;
        if constexpr (kShares == 4) {
          bias[r][h].load(mine);
        } else {
          bias[r][h].load(mine, kShares);
        }
      }
    }
    if (block == uint32_t(warp) * 4) wait_for_previous();  // the planes are ready
    uint32_t not_planes = 0;                               // one bit per q and m
    ONEBIT_UNROLL
    for (int q = 0; q < 4; q++) {
      ONEBIT_UNROLL
      for (int m = 0; m < M; m++) {
        const uint32_t item = (block + q) * M + m;
        uint32_t plane[kOctets];
        ONEBIT_UNROLL
        for (int h = 0; h < kOctets; h++) plane[h] = p.planes[(item * kOctets + h) * 32 + lane];
        const float step = p.groups[4 * kShares * item];
        not_planes |= uint32_t(step != step) << (q * M + m);
        const float unit = step == step ? step * lane_weight : 0.0f;
        ONEBIT_UNROLL
        for (int s = 0; s < kShares; s++) {
          ONEBIT_UNROLL
          for (int r = 0; r < kRowTiles; r++) {
            int count[kOctets][4];
            ONEBIT_UNROLL
            for (int h = 0; h < kOctets; h++) {
              bmma(count[h], word[r][0][q], word[r][1][q], plane[h] & in_group[s]);
            }
            ONEBIT_UNROLL
            for (int i = 0; i < 2; i++) {
              const int level = q * kShares + s;
              const Sum factor = Sum(scale[r][i][level / 4][level % 4]) * unit;
              ONEBIT_UNROLL
              for (int h = 0; h < kOctets; h += 2) {
                const int sum = count[h][2 * i] + 2 * count[h][2 * i + 1] +
                                256 * count[h + 1][2 * i] +
                                (h + 2 == kOctets ? last_plane : 512) * count[h + 1][2 * i + 1];
                out[r][i][m] += Sum(sum) * (h ? factor * 65536 : factor);
              }
            }
          }
        }
      }
    }
    if (not_planes != 0) {
      ONEBIT_UNROLL
      for (int m = 0; m < M; m++) {
#pragma unroll 1
        for (int q = 0; q < 4; q++) {
          if ((not_planes >> (q * M + m) & 1) == 0) continue;
          const uint32_t column = (block + q) * 4 + t;
          const X* x = static_cast<const X*>(p.x) + int64_t(m) * p.k + column * kWordBits;
          ONEBIT_UNROLL
          for (int r = 0; r < kRowTiles; r++) {
            ONEBIT_UNROLL
            for (int i = 0; i < 2; i++) {
              const int64_t n = min(row0 + r * 16 + i * 8 + g, p.n - 1);
              out[r][i][m] += Sum(to_float(scales[n * groups + column / kGroupWords])) *
                              chosen_sum(x, p.packed[n * words + column]);
            }
          }
        }
      }
    }
    ONEBIT_UNROLL
    for (int m = 0; m < M; m++) {
      ONEBIT_UNROLL
      for (int s = 0; s < kShares; s++) {
        const float4 whole = info[((block + t) * M + m) * kShares + s];
        const Sum sum = Sum(whole.y) + whole.z;
        ONEBIT_UNROLL
        for (int r = 0; r < kRowTiles; r++) {
          ONEBIT_UNROLL
          for (int i = 0; i < 2; i++) {
            out[r][i][m] += Sum(bias[r][i][s] * (kHasBiases ? 1.0f : -0.5f)) * sum;
          }
        }
      }
    }
  }
  __shared__ Sum part[kWarps][M][16 * kRowTiles];
  ONEBIT_UNROLL
  for (int r = 0; r < kRowTiles; r++) {
    ONEBIT_UNROLL
    for (int i = 0; i < 2; i++) {
      ONEBIT_UNROLL
      for (int m = 0; m < M; m++) {
        Sum v = out[r][i][m];
        v += __shfl_xor_sync(kAll, v, 1);
        v += __shfl_xor_sync(kAll, v, 2);
        if (t == 0) part[warp][m][r * 16 + i * 8 + g] = v;
      }
    }
  }
  __syncthreads();
  X* y = static_cast<X*>(p.y);
  for (int i = threadIdx.x; i < M * 16 * kRowTiles; i += kWarps * 32) {
    const int m = i / (16 * kRowTiles), n = i % (16 * kRowTiles);
    if (row0 + n >= p.n) continue;
    Sum v = 0;
    ONEBIT_UNROLL
    for (int w = 0; w < kWarps; w++) v += part[w][m][n];
    y[int64_t(m) * p.n + row0 + n] = from_float<X>(float(v));
  }
}

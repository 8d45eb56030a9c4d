// y[m, n] = x[m, :] . W[n, :] for few rows of x: bits decoded in registers into mma.m16n8k16, no
// shared memory, no pass before it.
//
// A block owns 16 * kRowTiles rows of W and 8 * kColumnTiles of x; its warps take turns at blocks
// of four groups and add up at the end. W's bits are A (16 rows), x's rows are B's 8 columns.
//
// The order of k inside an mma is ours to choose: lane t of a quad owns the t-th quarter of a group
// (8 G columns, with G words in a group), and step i pairs its columns (i, i + 4 G) and
// (i + 2 G, i + 6 G), so that a shift and one logic operation decode two weights: 2.0 or 0, or 2.0
// or -2.0, in float16 and bfloat16 the same bits (Form says which). A constant A of 2.0 gives the
// group sums of x that remain, in the layout in which they are needed; symmetric weights need none.
//
// Scales are applied to float sums: any dtype of theirs will do. float32 x is multiplied as its
// three bfloat16 parts.
//   ONEBIT_WARPS, ONEBIT_ROW_TILES, ONEBIT_COLUMN_TILES
//   ONEBIT_WHOLE   1: a row has a multiple of four groups
#include "common.cuh"

using X = ONEBIT_X;
using Level = ONEBIT_LEVELS;
constexpr int kWarps = ONEBIT_WARPS, kRowTiles = ONEBIT_ROW_TILES, kTiles = ONEBIT_COLUMN_TILES;
constexpr bool kWhole = ONEBIT_WHOLE;
constexpr int G = kGroupWords;
constexpr int kParts = kSame<X, Float> ? 3 : 1;
constexpr int kSums = kParts == 3 ? 2 : 1;
constexpr int kPairs = 4 * G;  // registers of 8 G values of 16 bits
constexpr uint32_t kTwos = 0x40004000u;

// A lane's quarter of a group: columns [0, 4 G) in the low half of a register, the rest in the
// high.
__device__ __forceinline__ uint32_t quarter(uint32_t word, int t) {
  if constexpr (G == 4) return word;  // word t of the group
  if constexpr (G == 2) return __byte_perm(word, 0, t & 1 ? 0x4342 : 0x4140);  // half of word t / 2
  return (__byte_perm(word, 0, 0x4440 | t) * 0x1001u) & 0x000f000fu;           // byte t of the word
}

// {2.0 if bit i, else -2.0 or 0; the same of bit i + 16}
__device__ __forceinline__ uint32_t decode(uint32_t bits, int i, bool is_signed) {
  const uint32_t top = bits << (15 - i) & 0x80008000u;
  if constexpr (kParts == 3 && kHasBiases) return is_signed ? top ^ 0xc000c000u : top >> 1;
  if constexpr (kHasBiases) return (i <= 14 ? bits << (14 - i) : bits >> (i - 14)) & kTwos;
  return top ^ 0xc000c000u;
}

// The 8 G columns of one row of x that a lane owns.
struct Columns {
  uint32_t raw[kParts == 3 ? 8 * G : kPairs];

  __device__ __forceinline__ void load(const X* from, bool inside) {
    ONEBIT_UNROLL
    for (int i = 0; i < int(sizeof(raw) / 16); i++) {
      const uint4 v =
          inside ? __ldg(reinterpret_cast<const uint4*>(from) + i) : make_uint4(0, 0, 0, 0);
      raw[4 * i] = v.x, raw[4 * i + 1] = v.y, raw[4 * i + 2] = v.z, raw[4 * i + 3] = v.w;
    }
  }
  // The next 16 bits of each value; of float32, the part that is cut off.
  __device__ __forceinline__ void take(uint32_t (&pairs)[kPairs]) {
    ONEBIT_UNROLL
    for (int i = 0; i < kPairs; i++) {
      if constexpr (kParts == 3) {
        pairs[i] = __byte_perm(raw[2 * i], raw[2 * i + 1], 0x7632);
        raw[2 * i] = __float_as_uint(rest_of(__uint_as_float(raw[2 * i])));
        raw[2 * i + 1] = __float_as_uint(rest_of(__uint_as_float(raw[2 * i + 1])));
      } else {
        pairs[i] = raw[i];
      }
    }
  }
};

// Four blocks of the wide form fit a multiprocessor with 128 registers; left alone, it takes 144.
#if ONEBIT_ROW_TILES == 2 && ONEBIT_COLUMN_TILES == 1
#define ONEBIT_BOUNDS __launch_bounds__(kWarps * 32, 4)
#else
#define ONEBIT_BOUNDS __launch_bounds__(kWarps * 32)
#endif

ONEBIT_KERNEL ONEBIT_BOUNDS hmma(const __grid_constant__ ProductArgs p) {
  wait_for_previous();
  const int lane = threadIdx.x & 31, warp = threadIdx.x >> 5, g = lane >> 2, t = lane & 3;
  const uint32_t m_tiles = (p.m + 8 * kTiles - 1) / (8 * kTiles), batch = blockIdx.x / m_tiles;
  const uint32_t row0 = blockIdx.y * 16 * kRowTiles, m0 = blockIdx.x % m_tiles * 8 * kTiles;
  const Matrices found = find_matrices(p, batch);
  const uint32_t words = p.k / kWordBits, groups = words / G;
  const X* x = static_cast<const X*>(p.x) + found.x * p.m * p.k;
  const uint32_t* packed = p.packed + found.w * p.n * words + (t * G >> 2);
  const Level* scales = static_cast<const Level*>(p.scales) + found.w * p.n * groups;
  const Level* biases = static_cast<const Level*>(p.biases) + found.w * p.n * groups;

  // The first group of a lane's rows; 32 bits each, where pointers took 48 registers.
  uint32_t line[kRowTiles][2];
  ONEBIT_UNROLL
  for (int r = 0; r < kRowTiles; r++) {
    ONEBIT_UNROLL
    for (int h = 0; h < 2; h++) {
      line[r][h] = min(row0 + r * 16 + h * 8 + g, p.n - 1) * groups;  // past the end: not stored
    }
  }
  float out[kRowTiles][kTiles][4] = {};
  for (uint32_t group0 = warp * 4; group0 < groups; group0 += kWarps * 4) {
    uint32_t word[kRowTiles][2][4];
    Four<Level> scale[kRowTiles][2], bias[kRowTiles][2];
    ONEBIT_UNROLL
    for (int r = 0; r < kRowTiles; r++) {
      ONEBIT_UNROLL
      for (int h = 0; h < 2; h++) {
        const uint32_t first = line[r][h] + group0;
        ONEBIT_UNROLL
        for (int q = 0; q < 4; q++) {
          const bool inside = kWhole || group0 + q < groups;
          word[r][h][q] = inside ? __ldg(packed + uint64_t(first + q) * G) : 0u;
        }
        if constexpr (kWhole) {
          scale[r][h].load(scales + first);
          if constexpr (kHasBiases) bias[r][h].load(biases + first);
        } else {
          scale[r][h].load(scales + first, groups - group0);
          if constexpr (kHasBiases) bias[r][h].load(biases + first, groups - group0);
        }
      }
    }
    ONEBIT_UNROLL
    for (int q = 0; q < 4; q++) {
      const bool inside = kWhole || group0 + q < groups;
      Columns columns[kTiles];
      ONEBIT_UNROLL
      for (int c = 0; c < kTiles; c++) {
        const uint32_t m = m0 + c * 8 + g;
        columns[c].load(x + int64_t(m) * p.k + (group0 + q) * kGroupSize + t * 8 * G,
                        inside && m < p.m);
      }
      // Sums of the first part and of the others: tensor cores cut off what they add, and the first
      // part alone fits their 24 bits (5e-7 instead of 1e-7 in one sum).
      Form form[kRowTiles][2];
      ONEBIT_UNROLL
      for (int r = 0; r < kRowTiles; r++) {
        ONEBIT_UNROLL
        for (int h = 0; h < 2; h++) {
          const float step = scale[r][h][q];
          form[r][h] = !kHasBiases   ? Form{true, 0.5f * step, 0.0f}
                       : kParts == 3 ? form_of(step, bias[r][h][q])
                                     : Form{false, step, bias[r][h][q]};
        }
      }
      float acc[kSums][kRowTiles][kTiles][4] = {}, sum[kSums][kTiles][4] = {};
      ONEBIT_UNROLL
      for (int part = 0; part < kParts; part++) {
        constexpr int kRest = kSums - 1;
        const int which = part == 0 ? 0 : kRest;
        uint32_t pairs[kTiles][kPairs];
        ONEBIT_UNROLL
        for (int c = 0; c < kTiles; c++) columns[c].take(pairs[c]);
        ONEBIT_UNROLL
        for (int i = 0; i < 2 * G; i++) {
          const uint32_t pick = i & 1 ? 0x7632 : 0x5410;
          uint32_t b0[kTiles], b1[kTiles];
          ONEBIT_UNROLL
          for (int c = 0; c < kTiles; c++) {
            b0[c] = __byte_perm(pairs[c][i / 2], pairs[c][i / 2 + 2 * G], pick);
            b1[c] = __byte_perm(pairs[c][i / 2 + G], pairs[c][i / 2 + 3 * G], pick);
            if constexpr (kHasBiases) {
              mma(sum[which][c], kTwos, kTwos, kTwos, kTwos, b0[c], b1[c]);
            }
          }
          ONEBIT_UNROLL
          for (int r = 0; r < kRowTiles; r++) {
            const uint32_t low = quarter(word[r][0][q], t), high = quarter(word[r][1][q], t);
            ONEBIT_UNROLL
            for (int c = 0; c < kTiles; c++) {
              mma(acc[which][r][c], decode(low, i, form[r][0].is_signed),
                  decode(high, i, form[r][1].is_signed),
                  decode(low, i + 2 * G, form[r][0].is_signed),
                  decode(high, i + 2 * G, form[r][1].is_signed), b0[c], b1[c]);
            }
          }
        }
      }
      ONEBIT_UNROLL
      for (int r = 0; r < kRowTiles; r++) {
        ONEBIT_UNROLL
        for (int h = 0; h < 2; h++) {
          const float of_bits = 0.5f * form[r][h].of_bits, of_x = 0.5f * form[r][h].of_x;
          ONEBIT_UNROLL
          for (int c = 0; c < kTiles; c++) {
            ONEBIT_UNROLL
            for (int e = 0; e < 2; e++) {
              // Of float32 one sum per group, and then the total: which rounds it once.
              float of_group = kParts == 3 ? 0.0f : out[r][c][2 * h + e];
              ONEBIT_UNROLL
              for (int w = kSums - 1; w >= 0; w--) {
                of_group += of_bits * acc[w][r][c][2 * h + e];
                if constexpr (kHasBiases) of_group += of_x * sum[w][c][e];
              }
              out[r][c][2 * h + e] = kParts == 3 ? out[r][c][2 * h + e] + of_group : of_group;
            }
          }
        }
      }
    }
  }
  __shared__ float part[kWarps][8 * kTiles][16 * kRowTiles + 1];
  ONEBIT_UNROLL
  for (int r = 0; r < kRowTiles; r++) {
    ONEBIT_UNROLL
    for (int c = 0; c < kTiles; c++) {
      ONEBIT_UNROLL
      for (int e = 0; e < 4; e++) {
        part[warp][c * 8 + 2 * t + (e & 1)][r * 16 + (e >> 1) * 8 + g] = out[r][c][e];
      }
    }
  }
  __syncthreads();
  X* y = static_cast<X*>(p.y) + int64_t(batch) * p.m * p.n;
  for (int i = threadIdx.x; i < 8 * kTiles * 16 * kRowTiles; i += kWarps * 32) {
    const int m = i / (16 * kRowTiles), n = i % (16 * kRowTiles);
    if (m0 + m >= p.m || row0 + n >= p.n) continue;
    float sum = 0;
    ONEBIT_UNROLL
    for (int w = 0; w < kWarps; w++) sum += part[w][m][n];
    y[int64_t(m0 + m) * p.n + row0 + n] = from_float<X>(found.valid ? sum : nan_value());
  }
}

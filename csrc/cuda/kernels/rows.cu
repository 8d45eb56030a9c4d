// quantize, and decode for dequantize and embedding: one pass over memory, 16 bytes a thread, the
// bits of the CPU kernels.
#include "common.cuh"

// --- quantize: scale = max - min, bias = min, bit = value - bias > scale / 2 ---
// A group lies in kLanes neighbouring lanes. A thread works on kQuantizeChunks groups' shares, all
// loaded before the first is used: one load in flight left half of the bandwidth unused.

using W = ONEBIT_X;
constexpr int kValues = Vector<W>::kCount;
constexpr int kLanesOfGroup = kGroupSize / kValues;

// 16 bytes as they lie in memory: as values of 16 bits they took twice the instructions.
struct Raw {
  uint32_t words[4];

  __device__ __forceinline__ void load(const W* from) {
    const uint4 v = *reinterpret_cast<const uint4*>(from);
    words[0] = v.x, words[1] = v.y, words[2] = v.z, words[3] = v.w;
  }
  __device__ __forceinline__ float operator[](int i) const {
    if constexpr (sizeof(W) == 4) return __uint_as_float(words[i]);
    const uint32_t word = words[i / 2];
    if constexpr (kSame<W, Half>) return to_float(Half{uint16_t(i & 1 ? word >> 16 : word)});
    return __uint_as_float(i & 1 ? word & 0xffff0000u : word << 16);
  }
};

// The least and the greatest value of a group; NaN loses, and of nothing else there is no least.
struct Range {
  float low, high;
};

// Of two pairs of 16-bit values.
__device__ __forceinline__ uint32_t least(uint32_t a, uint32_t b) {
  return kSame<W, Half> ? min_of_halves(a, b) : min_of_bfloats(a, b);
}

__device__ __forceinline__ Range range_of(const Raw& v) {
  if constexpr (sizeof(W) == 4) {
    Range range = {__uint_as_float(0x7f800000u), __uint_as_float(0xff800000u)};
    ONEBIT_UNROLL
    for (int i = 0; i < 4; i++) {
      range.low = fminf(range.low, v[i]);
      range.high = fmaxf(range.high, v[i]);
    }
    ONEBIT_UNROLL
    for (int d = 1; d < kLanesOfGroup; d *= 2) {
      range.low = fminf(range.low, __shfl_xor_sync(kAll, range.low, d));
      range.high = fmaxf(range.high, __shfl_xor_sync(kAll, range.high, d));
    }
    return range;
  } else {
    // Two values at a time, then {low, -high} in one register: half of the exchanges.
    uint32_t low = kSame<W, Half> ? 0x7c007c00u : 0x7f807f80u, minus_high = low;
    ONEBIT_UNROLL
    for (int i = 0; i < 4; i++) {
      low = least(low, v.words[i]);
      minus_high = least(minus_high, v.words[i] ^ 0x80008000u);
    }
    Raw both = {least(__byte_perm(low, minus_high, 0x5410), __byte_perm(low, minus_high, 0x7632))};
    ONEBIT_UNROLL
    for (int d = 1; d < kLanesOfGroup; d *= 2) {
      both.words[0] = least(both.words[0], __shfl_xor_sync(kAll, both.words[0], d));
    }
    return {both[0], -both[1]};
  }
}

ONEBIT_KERNEL __launch_bounds__(kBlockThreads, 8) quantize(const __grid_constant__ QuantizeArgs p) {
  const int lane = threadIdx.x & 31;
  const int64_t warp = int64_t(blockIdx.x) * (kBlockThreads / 32) + (threadIdx.x >> 5);
  const int64_t total = p.groups * kLanesOfGroup;  // vectors
  const W* w = static_cast<const W*>(p.w);
  Raw value[kQuantizeChunks];
  ONEBIT_UNROLL
  for (int c = 0; c < kQuantizeChunks; c++) {  // past the end: not stored
    value[c].load(w + min((warp * kQuantizeChunks + c) * 32 + lane, total - 1) * kValues);
  }
  ONEBIT_UNROLL
  for (int c = 0; c < kQuantizeChunks; c++) {
    if ((warp * kQuantizeChunks + c) * 32 >= total) return;  // the whole warp
    const int64_t at = (warp * kQuantizeChunks + c) * 32 + lane;
    auto [low, high] = range_of(value[c]);
    if (__any_sync(kAll, low == 0)) {  // the first zero of the group decides the sign
      int first = 2 * kGroupSize;      // twice its index, and its sign
      ONEBIT_UNROLL
      for (int i = kValues; i-- > 0;) {
        const int index = lane % kLanesOfGroup * kValues + i;
        if (value[c][i] == 0) first = 2 * index + int(__float_as_uint(value[c][i]) >> 31);
      }
      ONEBIT_UNROLL
      for (int d = 1; d < kLanesOfGroup; d *= 2)
        first = min(first, __shfl_xor_sync(kAll, first, d));
      if (low == 0) low = first & 1 ? -0.0f : 0.0f;
    }
    float scale = high - low;
    if (scale < kMinScale) scale = kMinScale;
    uint32_t word = 0;
    ONEBIT_UNROLL
    for (int i = kValues; i-- > 0;) {
      // value - low > scale / 2 as a sign, shifted in; the sign of a NaN that is computed is 0.
      const float rest = 0.5f * scale - (value[c][i] - low);
      word = __funnelshift_l(__float_as_uint(rest), word, 1);
    }
    constexpr int kLanesOfWord = kWordBits / kValues;
    word <<= lane % kLanesOfWord * kValues;
    ONEBIT_UNROLL
    for (int d = 1; d < kLanesOfWord; d *= 2) word |= __shfl_xor_sync(kAll, word, d);
    if (at < total && lane % kLanesOfWord == 0) p.packed[at / kLanesOfWord] = word;
    if (at < total && lane % kLanesOfGroup == 0) {
      static_cast<W*>(p.scales)[at / kLanesOfGroup] = from_float<W>(scale);
      static_cast<W*>(p.biases)[at / kLanesOfGroup] = from_float<W>(low);
    }
  }
}

// --- decode: a group has two values, rounded once; a bit chooses ---

using Level = ONEBIT_LEVELS;
using Out = ONEBIT_OUT;
constexpr int kOutValues = Vector<Out>::kCount;

ONEBIT_KERNEL __launch_bounds__(kBlockThreads) decode(const __grid_constant__ DecodeArgs p) {
  constexpr int kPerWord = kWordBits / kOutValues;
  const uint32_t output_row = blockIdx.x / p.blocks_per_row;
  const int64_t block = blockIdx.x % p.blocks_per_row;
  const int64_t row = p.indices ? p.indices[output_row] : 0;
  const bool valid = !p.indices || (row >= 0 && row < p.rows);
  uint32_t bits[kDecodeChunks];
  Out low[kDecodeChunks], high[kDecodeChunks];
  ONEBIT_UNROLL
  for (int c = 0; c < int(kDecodeChunks); c++) {  // all loads before the first store
    const int64_t at = (block * kDecodeChunks + c) * kBlockThreads + threadIdx.x;
    const int64_t word = at / kPerWord;
    low[c] = high[c] = from_float<Out>(nan_value());
    bits[c] = 0;
    if (!valid || word >= p.words) continue;
    const int64_t group = row * (p.words / kGroupWords) + word / kGroupWords;
    bits[c] = p.packed[row * p.words + word] >> (at % kPerWord * kOutValues);
    const float scale = to_float(static_cast<const Level*>(p.scales)[group]);
    // The bias rounds to the dtype of the levels; so do the sums, unless another is asked for.
    const float bias = kHasBiases ? to_float(static_cast<const Level*>(p.biases)[group])
                                  : to_float(from_float<Level>(scale * -0.5f));
    low[c] = from_float<Out>(scale * 0.0f + bias);  // infinity times 0 is NaN
    high[c] = from_float<Out>(scale + bias);
  }
  Out* to = static_cast<Out*>(p.out) + int64_t(output_row) * p.words * kWordBits;
  ONEBIT_UNROLL
  for (int c = 0; c < int(kDecodeChunks); c++) {
    const int64_t at = (block * kDecodeChunks + c) * kBlockThreads + threadIdx.x;
    if (at / kPerWord >= p.words) continue;
    Vector<Out> out;
    ONEBIT_UNROLL
    for (int i = 0; i < kOutValues; i++) out.values[i] = bits[c] >> i & 1 ? high[c] : low[c];
    // Past the cache, which weights and levels are to stay in (embedding: 14 % faster).
    __stcs(reinterpret_cast<uint4*>(to + at * kOutValues), raw_of(out));
  }
}

// --- float32 x as three bfloat16 parts, exact, and its group sums; a warp per group ---

ONEBIT_KERNEL __launch_bounds__(kBlockThreads) split(const __grid_constant__ SplitArgs p) {
  let_next_start();
  const int lane = threadIdx.x & 31;
  const uint32_t groups = p.k / kGroupSize;
  const int64_t item = int64_t(blockIdx.x) * (kBlockThreads / 32) + (threadIdx.x >> 5);
  if (item >= int64_t(p.sum_rows) * groups) return;
  const uint32_t row = uint32_t(item / groups), group = uint32_t(item % groups);
  const int64_t size = int64_t(p.m) * p.k;
  float sum[2] = {};
  ONEBIT_UNROLL
  for (int i = 0; i < kGroupWords; i++) {
    if (row >= p.m) continue;
    const int64_t at = int64_t(row) * p.k + group * kGroupSize + i * 32 + lane;
    float rest = p.x[at];
    sum[0] += rest - rest_of(rest);
    sum[1] += rest_of(rest);
    ONEBIT_UNROLL
    for (int part = 0; part < 3; part++) {
      p.parts[part * size + at] = top_part(rest);
      rest = rest_of(rest);
    }
  }
  ONEBIT_UNROLL
  for (int d = 16; d; d >>= 1) {
    sum[0] += __shfl_xor_sync(kAll, sum[0], d);
    sum[1] += __shfl_xor_sync(kAll, sum[1], d);
  }
  if (lane < 2)
    p.sums[(int64_t(lane) * groups + group) * p.sum_rows + row] = lane == 0 ? sum[0] : sum[1];
}

// --- partial sums of a product that was split over k, in a fixed order ---

ONEBIT_KERNEL __launch_bounds__(kBlockThreads) sum_partials(const __grid_constant__ SumArgs p) {
  wait_for_previous();
  const int64_t at = int64_t(blockIdx.x) * kBlockThreads + threadIdx.x;
  if (at >= p.count) return;
  float sum = 0;
  for (uint32_t s = 0; s < p.splits; s++) sum += p.partial[s * p.count + at];
  static_cast<Out*>(p.y)[at] = from_float<Out>(sum);
}

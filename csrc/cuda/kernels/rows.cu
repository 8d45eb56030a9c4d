// quantize, and decode for dequantize and embedding: one pass over memory, 16 bytes a thread, the
// bits of the CPU kernels.
#include "common.cuh"

// --- quantize: scale = max - min, bias = min, bit = value - bias > scale / 2 ---
// A group lies in kLanes neighbouring lanes. A thread works on kChunks groups' shares, all loaded
// before the first is used: one load in flight left half of the bandwidth unused.

using W = ONEBIT_X;
constexpr int kValues = Vector<W>::kCount;
constexpr int kLanesOfGroup = kGroupSize / kValues;
constexpr int kChunks = 4;

ONEBIT_KERNEL __launch_bounds__(kBlockThreads) quantize(const __grid_constant__ QuantizeArgs p) {
  const int lane = threadIdx.x & 31;
  const int64_t warp = int64_t(blockIdx.x) * (kBlockThreads / 32) + (threadIdx.x >> 5);
  const int64_t total = p.groups * kLanesOfGroup;  // vectors
  const W* w = static_cast<const W*>(p.w);
  Vector<W> loaded[kChunks];
  ONEBIT_UNROLL
  for (int c = 0; c < kChunks; c++) {
    const int64_t at = (warp * kChunks + c) * 32 + lane;
    loaded[c] = at < total ? load_vector(w + at * kValues) : Vector<W>{};
  }
  ONEBIT_UNROLL
  for (int c = 0; c < kChunks; c++) {
    if ((warp * kChunks + c) * 32 >= total) return;  // the whole warp
    const int64_t at = (warp * kChunks + c) * 32 + lane;
    float value[kValues], low = __uint_as_float(0x7f800000u), high = -low;
    ONEBIT_UNROLL
    for (int i = 0; i < kValues; i++) {
      value[i] = to_float(loaded[c].values[i]);
      low = fminf(low, value[i]);  // NaN loses
      high = fmaxf(high, value[i]);
    }
    ONEBIT_UNROLL
    for (int d = 1; d < kLanesOfGroup; d *= 2) {
      low = fminf(low, __shfl_xor_sync(kAll, low, d));
      high = fmaxf(high, __shfl_xor_sync(kAll, high, d));
    }
    if (__any_sync(kAll, low == 0)) {  // the first zero of the group decides the sign
      int first = 2 * kGroupSize;      // twice its index, and its sign
      ONEBIT_UNROLL
      for (int i = kValues; i-- > 0;) {
        const int index = lane % kLanesOfGroup * kValues + i;
        if (value[i] == 0) first = 2 * index + int(__float_as_uint(value[i]) >> 31);
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
    for (int i = 0; i < kValues; i++) word |= uint32_t(value[i] - low > 0.5f * scale) << i;
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
    store_vector(to + at * kOutValues, out);
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

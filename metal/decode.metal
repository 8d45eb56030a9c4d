// out[r, :] = dequantize(w)[indices[r], :], rounded as docs/format.md says; without indices all of
// w as one long row. A row whose index is out of range is NaN.
// A thread decodes one byte of packed: 8 values. Grid: x over the bytes of a row, y over the rows.
#include "common.h"

template <typename T>
[[kernel]] void decode(const device uint* packed [[buffer(0)]],   // [rows, words]
                       const device T* scales [[buffer(1)]],      // [rows, words >> group_shift]
                       const device T* biases [[buffer(2)]],      // as scales
                       const device long* indices [[buffer(3)]],  // [out rows]
                       device T* out [[buffer(4)]],               // [out rows, 32 * words]
                       constant DecodeParams& p [[buffer(5)]],
                       uint2 group [[threadgroup_position_in_grid]],
                       uint thread_index [[thread_index_in_threadgroup]]) {
  const uint byte = group.x * kDecodeThreads + thread_index;
  const uint word = byte / 4;
  if (word >= p.words) return;
  const long index = kIndexed ? indices[group.y] : 0;
  const bool valid = index >= 0 && index < long(p.rows);
  const uint row = valid ? uint(index) : 0;

  const uint bits = packed[row * p.words + word] >> (byte % 4 * 8);
  const uint level = row * (p.words >> p.group_shift) + (word >> p.group_shift);
  const float scale = float(scales[level]);
  // Absent biases round to T like present ones.
  const float bias = kHasBiases ? float(biases[level]) : float(T(-0.5f * scale));
  const T zero = valid ? T(scale * 0.0f + bias) : T(NAN);  // 0 * inf is NaN
  const T one = valid ? T(scale + bias) : T(NAN);

  device T* values = out + group.y * p.words * kLanes + byte * 8;
  for (uint i = 0; i < 8; i++) values[i] = bit_of(bits, i) ? one : zero;
}

ONEBIT_INSTANTIATE("decode_float", decode<float>)
ONEBIT_INSTANTIATE("decode_half", decode<half>)
ONEBIT_INSTANTIATE("decode_bfloat", decode<bfloat>)

// quantize and dequantize: one pass over memory, a group at a time, bit for bit the format's rule.
#pragma once

#include "float_types.h"
#include "kernels.h"
#include "target.h"

namespace onebit::cpu {
namespace {

// Output larger than this does not come back from the cache: it is written around it.
constexpr int64_t kStreamBytes = 4 << 20;

template <class V, class T, DType kType, int kGroup>
void quantize_groups(
    const T* w, uint32_t* packed, T* scales, T* biases, int64_t begin, int64_t end) {
  constexpr int kVectors = kGroup / V::kLanes;
  for (int64_t g = begin; g < end; ++g) {
    typename V::Vec v[kVectors];
    ONEBIT_UNROLL
    for (int i = 0; i < kVectors; ++i) {
      v[i] = V::template load_type<kType>(w + g * kGroup + i * V::kLanes);
    }
    // Lane by lane as the rule has it: NaN loses, and so does a zero that comes second.
    auto low = V::set(__builtin_inff()), high = V::set(-__builtin_inff());
    ONEBIT_UNROLL
    for (int i = 0; i < kVectors; ++i) {
      low = V::smaller(v[i], low);
      high = V::larger(v[i], high);
    }
    float bias = V::min_of(low), scale = V::max_of(high) - bias;
    if (bias == 0) {  // the first zero of the group decides the sign
      for (int i = kVectors; i-- > 0;) {
        if (const uint32_t zeros = V::equal_bits(v[i], V::zero())) {
          bias = to_float(w[g * kGroup + i * V::kLanes + __builtin_ctz(zeros)]);
        }
      }
    }
    if (scale < kMinScale) scale = kMinScale;
    const auto half = V::set(0.5f * scale), base = V::set(bias);
    ONEBIT_UNROLL
    for (int i = 0; i < kGroup / kWordBits; ++i) {
      uint32_t bits = 0;
      ONEBIT_UNROLL
      for (int j = 0; j < kWordBits / V::kLanes; ++j) {
        const auto above = V::sub(v[i * (kWordBits / V::kLanes) + j], base);
        bits |= V::greater_bits(above, half) << j * V::kLanes;
      }
      packed[g * (kGroup / kWordBits) + i] = bits;
    }
    from_float(scale, scales[g]);
    from_float(bias, biases[g]);
  }
}

template <class V>
void quantize(const void* w,
              DType dtype,
              int group_size,
              uint32_t* packed,
              void* scales,
              void* biases,
              int64_t begin,
              int64_t end) {
  const auto run = [&](auto type, auto tag) {
    using T = decltype(type);
    constexpr DType kType = decltype(tag)::value;
    const auto f = group_size == 128  ? quantize_groups<V, T, kType, 128>
                   : group_size == 64 ? quantize_groups<V, T, kType, 64>
                                      : quantize_groups<V, T, kType, 32>;
    f(static_cast<const T*>(w), packed, static_cast<T*>(scales), static_cast<T*>(biases), begin,
      end);
  };
  if (dtype == DType::kFloat) run(float{}, TypeTag<DType::kFloat>{});
  if (dtype == DType::kHalf) run(Half{}, TypeTag<DType::kHalf>{});
  if (dtype == DType::kBFloat16) run(BFloat16{}, TypeTag<DType::kBFloat16>{});
  if (dtype == DType::kDouble) {
    kScalarKernels.quantize(w, dtype, group_size, packed, scales, biases, begin, end);
  }
}

// A group has two values: they are rounded once, then a word of bits chooses among them.
template <class V, class T>
void dequantize_groups(const Weights& w, T* out, int64_t begin, int64_t end) {
  const auto* scales = static_cast<const T*>(w.scales);
  const auto* biases = static_cast<const T*>(w.biases);
  const int words = w.group_size / kWordBits;
  const bool stream = (end - begin) * w.group_size * int64_t(sizeof(T)) >= kStreamBytes &&
                      reinterpret_cast<uintptr_t>(out) % 64 == 0;
  for (int64_t g = begin; g < end; ++g) {
    const float scale = to_float(scales[g]);
    T bias, low, high;
    from_float(biases ? to_float(biases[g]) : scale * -0.5f, bias);
    from_float(scale * 0 + to_float(bias), low);
    from_float(scale + to_float(bias), high);
    const uint32_t* packed = w.packed + g * words;
    for (int i = 0; i < words; ++i, out += kWordBits) {
      V::expand(packed[i], low, high, out, stream);
    }
  }
  if (stream) V::fence();
}

template <class V>
void dequantize(const Weights& w, void* out, int64_t begin, int64_t end) {
  switch (w.dtype) {
    case DType::kFloat:
      return dequantize_groups<V>(w, static_cast<float*>(out), begin, end);
    case DType::kHalf:
      return dequantize_groups<V>(w, static_cast<Half*>(out), begin, end);
    case DType::kBFloat16:
      return dequantize_groups<V>(w, static_cast<BFloat16*>(out), begin, end);
    case DType::kDouble:
      return kScalarKernels.dequantize(w, out, begin, end);
  }
}

}  // namespace
}  // namespace onebit::cpu

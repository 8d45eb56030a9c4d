// quantize, dequantize and embedding for devices without kernels.
#include "../composite.h"

#include <ATen/TensorOperators.h>
#include <ATen/ops/full_like.h>
#include <ATen/ops/isnan.h>
#include <ATen/ops/where.h>
#include <ATen/ops/zeros.h>

#include <limits>

#include "rules.h"

namespace onebit {
namespace {

constexpr double kInfinity = std::numeric_limits<double>::infinity();

Quantized quantize_composite(const Quantize& o) {
  const auto& w = o.w;
  const auto shape = check_quantize<int64_t>(w, o.group_size);
  ONEBIT_WARN_SLOW("quantize", w);
  if (w.numel() == 0) {
    return {at::zeros(shape.packed, w.options().dtype(at::kInt)),
            at::zeros(shape.scales, w.options()), at::zeros(shape.scales, w.options())};
  }
  const auto groups = split_last(w.to(sum_type(w)), o.group_size);
  const auto nan = at::isnan(groups);
  const auto least = groups.masked_fill(nan, kInfinity).amin(-1, true);
  const auto high = groups.masked_fill(nan, -kInfinity).amax(-1, true);
  // Of equal least values the first gives the sign of a zero.
  const auto is_least = groups.eq(least);
  const auto first = groups.gather(-1, is_least.to(at::kInt).argmax(-1, true));
  const auto low = at::where(is_least.any(-1, true), first, least);
  const auto range = high - low;
  const auto scale = at::where(range.lt(kMinScale), at::full_like(range, kMinScale), range);
  const auto bits = split_last((groups - low).gt(scale.mul(0.5)).flatten(-2), kWordBits);
  const auto shifts = at::arange(kWordBits, bits.options().dtype(at::kLong));
  const auto words = bits.to(at::kLong).bitwise_left_shift(shifts).sum(-1);
  const auto wrapped = at::where(words.ge(int64_t(1) << 31), words - (int64_t(1) << 32), words);
  return {wrapped.to(at::kInt), scale.squeeze(-1).to(w.scalar_type()),
          low.squeeze(-1).to(w.scalar_type())};
}

// Sizes may be symbols: compilers trace through it.
Tensor decode_composite(const Coded& o) {
  const auto sizes = check_decode<c10::SymInt>(o);
  const auto type = o.scales.scalar_type();
  if (!o.indices) {
    ONEBIT_WARN_SLOW("dequantize", o.packed);
    return decode(o.packed, o.scales, o.biases, o.group_size, type);
  }
  ONEBIT_WARN_SLOW("embedding", o.packed);
  const auto words = o.packed.scalar_type() == at::kInt ? o.packed : o.packed.view(at::kInt);
  const auto rows = o.indices->reshape(-1);
  const auto pick = [&](const Tensor& t) { return t.index_select(0, rows); };
  const auto biases = o.biases ? OptionalTensor(pick(*o.biases)) : std::nullopt;
  return decode(pick(words), pick(o.scales), biases, o.group_size, type).reshape_symint(sizes);
}

}  // namespace

TORCH_LIBRARY_IMPL(onebit, CompositeExplicitAutograd, m) {
  define<Quantize, quantize_composite>(m);
  define<Dequantize, decode_composite>(m);
  define<Embedding, decode_composite>(m);
}

}  // namespace onebit

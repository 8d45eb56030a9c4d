// quantize, dequantize and embedding on MPS.
#include <ATen/ops/empty.h>

#include "../ops/codec/rules.h"
#include "encoder.h"
#include "tensors.h"

namespace onebit::mps {
namespace {

Quantized quantize_mps(const Quantize& o) {
  const auto& [w, group_size] = o;
  const auto shape = check_quantize<int64_t>(w, group_size);
  const DType type = dtype_on_mps("w", w);
  auto packed = at::empty(shape.packed, w.options().dtype(at::kInt));
  auto scales = at::empty(shape.scales, w.options()), biases = at::empty(shape.scales, w.options());
  if (w.numel() == 0) return {packed, scales, biases};
  check_count("w", w);
  const GroupParams params = {static_cast<uint32_t>(scales.numel()), 1};
  encode(Work{plan_groups(Kernel::kQuantize, params, type, {group_size}),
              {w.contiguous(), packed, scales, biases},
              &params,
              sizeof params});
  return {packed, scales, biases};
}

// Rows of packed, or all of it as one row.
Tensor decode_mps(const Coded& o) {
  const auto sizes = check_decode<int64_t>(o);
  const DType type = dtype_on_mps("scales", o.scales);
  auto out = at::empty(sizes, o.scales.options());
  if (out.numel() == 0) return out;
  check_count("packed", o.packed);
  check_count("the result", out);
  const bool indexed = o.indices;
  const int64_t words = indexed ? o.packed.size(1) : o.packed.numel();
  const DecodeParams params = {static_cast<uint32_t>(indexed ? o.packed.size(0) : 1),
                               static_cast<uint32_t>(words), group_shift(o.group_size)};
  const uint32_t rows = static_cast<uint32_t>(out.numel() / (words * kWordBits));
  encode(
      Work{plan_decode(params, rows, type, o.biases.has_value(), indexed),
           {words_of(o.packed), o.scales.contiguous(), o.biases ? o.biases->contiguous() : Tensor(),
            indexed ? o.indices->to(at::kLong).contiguous() : Tensor(), out},
           &params,
           sizeof params});
  return out;
}

}  // namespace

TORCH_LIBRARY_IMPL(onebit, MPS, m) {
  define<Quantize, quantize_mps>(m);
  define<Dequantize, decode_mps>(m);
  define<Embedding, decode_mps>(m);
}

}  // namespace onebit::mps

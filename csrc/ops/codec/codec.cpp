// Weights to bits and back: schemas, and shapes without data (Meta).
#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>

#include "rules.h"

TORCH_LIBRARY_FRAGMENT(onebit, m) {
  m.def("quantize(Tensor w, int group_size=128) -> (Tensor packed, Tensor scales, Tensor biases)");
  m.def("dequantize(Tensor packed, Tensor scales, Tensor? biases, int group_size=128) -> Tensor");
  m.def(
      "embedding(Tensor indices, Tensor packed, Tensor scales, Tensor? biases, "
      "int group_size=128) -> Tensor");
}

namespace onebit {
namespace {

using c10::SymInt;

Quantized quantize_meta(const Quantize& o) {
  const auto shape = check_quantize<SymInt>(o.w, o.group_size);
  const auto options = o.w.options();
  return {at::empty_symint(shape.packed, options.dtype(at::kInt)),
          at::empty_symint(shape.scales, options), at::empty_symint(shape.scales, options)};
}

Tensor decode_meta(const Coded& o) {
  return at::empty_symint(check_decode<SymInt>(o), o.scales.options());
}

}  // namespace

TORCH_LIBRARY_IMPL(onebit, Meta, m) {
  define<Quantize, quantize_meta>(m);
  define<Dequantize, decode_meta>(m);
  define<Embedding, decode_meta>(m);
}

}  // namespace onebit

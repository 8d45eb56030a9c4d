// Weights to bits and back: schemas, and shapes without data (Meta).
#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <torch/library.h>

#include <tuple>

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

std::tuple<Tensor, Tensor, Tensor> quantize_meta(const Tensor& w, int64_t group_size) {
  const auto shape = check_quantize<SymInt>(w, group_size);
  return {at::empty_symint(shape.packed, w.options().dtype(at::kInt)),
          at::empty_symint(shape.scales, w.options()), at::empty_symint(shape.scales, w.options())};
}

Tensor dequantize_meta(const Tensor& packed,
                       const Tensor& scales,
                       const OptionalTensor& biases,
                       int64_t group_size) {
  const auto sizes = check_dequantize<SymInt>(packed, scales, biases, group_size);
  return at::empty_symint(sizes, scales.options());
}

Tensor embedding_meta(const Tensor& indices,
                      const Tensor& packed,
                      const Tensor& scales,
                      const OptionalTensor& biases,
                      int64_t group_size) {
  const auto sizes = check_embedding<SymInt>(indices, packed, scales, biases, group_size);
  return at::empty_symint(sizes, scales.options());
}

}  // namespace

TORCH_LIBRARY_IMPL(onebit, Meta, m) {
  m.impl("quantize", &quantize_meta);
  m.impl("dequantize", &dequantize_meta);
  m.impl("embedding", &embedding_meta);
}

}  // namespace onebit

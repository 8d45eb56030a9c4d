// The schemas of torch.ops.onebit, and the Meta kernels: shapes and dtypes without data.
#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <torch/library.h>

#include <tuple>

#include "cpu/prepacked.h"
#include "shape.h"

TORCH_LIBRARY(onebit, m) {
  m.def("quantize(Tensor w, int group_size) -> (Tensor packed, Tensor scales, Tensor biases)");
  m.def("dequantize(Tensor packed, Tensor scales, Tensor? biases, int group_size) -> Tensor");
  m.def(
      "qmm(Tensor x, Tensor packed, Tensor scales, Tensor? biases, int group_size, "
      "bool transpose=True) -> Tensor");
  m.def(
      "gather_qmm(Tensor x, Tensor packed, Tensor scales, Tensor? biases, Tensor? lhs_indices, "
      "Tensor? rhs_indices, int group_size, bool transpose=True, bool sorted_indices=False) -> "
      "Tensor");
  // An interleaved copy of weights for a few rows of x on the CPU, and the product that uses it
  // there.
  m.def("prepack(Tensor packed, Tensor scales, Tensor? biases, int group_size) -> Tensor");
  m.def(
      "qmm_prepacked(Tensor x, Tensor packed, Tensor scales, Tensor? biases, Tensor prepacked, "
      "int group_size) -> Tensor");
  m.def(
      "linear(Tensor x, Tensor packed, Tensor scales, Tensor? biases, Tensor? bias, "
      "Tensor? prepacked, int group_size) -> Tensor");
  m.def(
      "embedding(Tensor indices, Tensor packed, Tensor scales, Tensor? biases, int group_size) -> "
      "Tensor");
  // The backward pass of qmm and gather_qmm for scales and biases; the one for x is the same
  // product with transpose flipped.
  m.def(
      "affine_grad(Tensor grad, Tensor x, Tensor packed, Tensor? lhs_indices, Tensor? rhs_indices, "
      "int group_size, bool transpose=True) -> (Tensor grad_scales, Tensor grad_biases)");
}

namespace onebit {
namespace {

using c10::SymInt;

Tensor empty(const Sizes<SymInt>& sizes, const Tensor& like, at::ScalarType dtype) {
  return at::empty_symint(sizes, like.options().dtype(dtype));
}

std::tuple<Tensor, Tensor, Tensor> quantize_meta(const Tensor& w, int64_t group_size) {
  const auto shape = check_quantize<SymInt>(w, group_size);
  return {empty(shape.packed, w, at::kInt), empty(shape.scales, w, w.scalar_type()),
          empty(shape.scales, w, w.scalar_type())};
}

Tensor dequantize_meta(const Tensor& packed,
                       const Tensor& scales,
                       const OptionalTensor& biases,
                       int64_t group_size) {
  const auto sizes = check_dequantize<SymInt>(packed, scales, biases, group_size);
  return empty(sizes, scales, scales.scalar_type());
}

Tensor qmm_meta(const Tensor& x,
                const Tensor& packed,
                const Tensor& scales,
                const OptionalTensor& biases,
                int64_t group_size,
                bool transpose) {
  const auto shape = check_qmm<SymInt>(x, packed, scales, biases, group_size, transpose);
  return empty(shape.y, x, x.scalar_type());
}

Tensor prepack_meta(const Tensor& packed,
                    const Tensor& scales,
                    const OptionalTensor& biases,
                    int64_t group_size) {
  using Layout = cpu::PrepackedLayout;
  check_prepack<SymInt>(packed, scales, biases, group_size);
  const auto block = Layout::block_size(int(group_size), scales.element_size(), biases.has_value());
  return at::empty_symint(
      {Layout::bytes(packed.sym_size(0), packed.sym_size(1) * kWordBits, int(group_size), block)},
      packed.options().dtype(at::kByte));
}

Tensor qmm_prepacked_meta(const Tensor& x,
                          const Tensor& packed,
                          const Tensor& scales,
                          const OptionalTensor& biases,
                          const Tensor& prepacked,
                          int64_t group_size) {
  const auto shape = check_qmm_prepacked<SymInt>(x, packed, scales, biases, prepacked, group_size);
  return empty(shape.y, x, x.scalar_type());
}

Tensor gather_qmm_meta(const Tensor& x,
                       const Tensor& packed,
                       const Tensor& scales,
                       const OptionalTensor& biases,
                       const OptionalTensor& lhs_indices,
                       const OptionalTensor& rhs_indices,
                       int64_t group_size,
                       bool transpose,
                       bool /*sorted_indices*/) {
  const auto shape = check_gather_qmm<SymInt>(x, packed, scales, biases, lhs_indices, rhs_indices,
                                              group_size, transpose);
  return empty(shape.y, x, x.scalar_type());
}

Tensor embedding_meta(const Tensor& indices,
                      const Tensor& packed,
                      const Tensor& scales,
                      const OptionalTensor& biases,
                      int64_t group_size) {
  const auto sizes = check_embedding<SymInt>(indices, packed, scales, biases, group_size);
  return empty(sizes, scales, scales.scalar_type());
}

std::tuple<Tensor, Tensor> affine_grad_meta(const Tensor& grad,
                                            const Tensor& x,
                                            const Tensor& packed,
                                            const OptionalTensor& lhs_indices,
                                            const OptionalTensor& rhs_indices,
                                            int64_t group_size,
                                            bool transpose) {
  check_affine_grad<SymInt>(grad, x, packed, lhs_indices, rhs_indices, group_size, transpose);
  const auto sizes = levels_shape<SymInt>(packed, group_size);
  return {empty(sizes, x, sum_type(x)), empty(sizes, x, sum_type(x))};
}

}  // namespace

TORCH_LIBRARY_IMPL(onebit, Meta, m) {
  m.impl("quantize", &quantize_meta);
  m.impl("dequantize", &dequantize_meta);
  m.impl("qmm", &qmm_meta);
  m.impl("prepack", &prepack_meta);
  m.impl("qmm_prepacked", &qmm_prepacked_meta);
  m.impl("gather_qmm", &gather_qmm_meta);
  m.impl("embedding", &embedding_meta);
  m.impl("affine_grad", &affine_grad_meta);
}

}  // namespace onebit

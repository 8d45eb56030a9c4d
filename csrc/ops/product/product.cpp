// Products with 1-bit weights: their schemas; shapes without data (Meta); autocast; and linear and
// linear_prepacked, which are composed of them.
#include <ATen/TensorOperators.h>
#include <ATen/autocast_mode.h>
#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <torch/library.h>

#include <tuple>

#include "prepacked.h"
#include "rules.h"

TORCH_LIBRARY_FRAGMENT(onebit, m) {
  m.def(
      "qmm(Tensor x, Tensor packed, Tensor scales, Tensor? biases, int group_size=128, "
      "bool transpose=True) -> Tensor");
  m.def(
      "gather_qmm(Tensor x, Tensor packed, Tensor scales, Tensor? biases, Tensor? lhs_indices, "
      "Tensor? rhs_indices, int group_size=128, bool transpose=True, bool sorted_indices=False) -> "
      "Tensor");
  // Weights in the order in which the kernels of a device read them, and back (biases are empty
  // where there were none); the product with them.
  m.def("prepack(Tensor packed, Tensor scales, Tensor? biases, int group_size=128) -> Tensor");
  m.def(
      "unprepack(Tensor prepacked, int rows, int columns, int group_size, ScalarType dtype, "
      "bool symmetric) -> (Tensor packed, Tensor scales, Tensor biases)");
  m.def(
      "qmm_prepacked(Tensor x, Tensor prepacked, int rows, int columns, int group_size, "
      "ScalarType dtype, bool symmetric) -> Tensor");
  m.def(
      "linear(Tensor x, Tensor packed, Tensor scales, Tensor? biases, Tensor? bias, "
      "int group_size=128) -> Tensor");
  m.def(
      "linear_prepacked(Tensor x, Tensor prepacked, Tensor? bias, int rows, int columns, "
      "int group_size, ScalarType dtype, bool symmetric) -> Tensor");
  // The backward pass of qmm and gather_qmm for scales and biases; the one for x is the same
  // product with transpose flipped.
  m.def(
      "affine_grad(Tensor grad, Tensor x, Tensor packed, Tensor? lhs_indices, Tensor? rhs_indices, "
      "int group_size=128, bool transpose=True) -> (Tensor grad_scales, Tensor grad_biases)");
}

namespace onebit {
namespace {

using c10::SymInt;

Tensor product_meta(const Operands& o) {
  const auto shape = check_product<SymInt>(o);
  return at::empty_symint(shape.y, o.x.options());
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
  const auto options = x.options().dtype(sum_type(x));
  return {at::empty_symint(sizes, options), at::empty_symint(sizes, options)};
}

Tensor prepacked_meta(const Tensor& x, const Prepacked& w) {
  return at::empty_symint(check_qmm_prepacked<SymInt>(x, w), x.options());
}

Canonical unprepack_meta(const Prepacked& w) {
  check_prepacked(w);
  const auto options = w.bytes.options();
  const int64_t groups = w.columns / w.group_size;
  return {at::empty({w.rows, w.columns / kWordBits}, options.dtype(at::kInt)),
          at::empty({w.rows, groups}, options.dtype(w.dtype)),
          at::empty({w.symmetric ? 0 : w.rows, groups}, options.dtype(w.dtype))};
}

// x takes the region's dtype, as in F.linear; scales and biases keep theirs, for a kernel reads any
// mix of dtypes and converting them would cost a pass per call.
template <class Product>
Tensor in_region(const Tensor& x, const Product& product) {
  check_dense("x", x);  // converting reads it
  const auto device = x.device().type();
  c10::impl::ExcludeDispatchKeyGuard no_autocast(
      at::autocast::get_autocast_dispatch_key_from_device_type(device));
  return product(at::autocast::cached_cast(at::autocast::get_autocast_dtype(device), x, device));
}

Tensor product_autocast(const Operands& o) {
  return in_region(o.x, [&](const Tensor& x) { return product(o.with_x(x)); });
}

Tensor prepacked_autocast(const Tensor& x, const Prepacked& w) {
  return in_region(x, [&](const Tensor& x) { return qmm_prepacked(x, w); });
}

Tensor plus_bias(const Tensor& y, const OptionalTensor& bias) {
  if (!bias) return y;
  check_values("bias", *bias);
  check_sizes<SymInt>("bias", *bias, {y.sym_size(-1)}, " (one per output)");
  return y + bias->to(y.scalar_type());
}

Tensor linear(const Tensor& x,
              const Tensor& packed,
              const Tensor& scales,
              const OptionalTensor& biases,
              const OptionalTensor& bias,
              int64_t group_size) {
  return plus_bias(product({Form::kQmm, x, packed, scales, biases, group_size}), bias);
}

Tensor linear_prepacked(const Tensor& x,
                        const Tensor& prepacked,
                        const OptionalTensor& bias,
                        int64_t rows,
                        int64_t columns,
                        int64_t group_size,
                        at::ScalarType dtype,
                        bool symmetric) {
  return plus_bias(qmm_prepacked(x, {prepacked, rows, columns, group_size, dtype, symmetric}),
                   bias);
}

}  // namespace

TORCH_LIBRARY_IMPL(onebit, Meta, m) {
  ProductForms<product_meta>::define(m);
  m.impl("qmm_prepacked", &QmmPrepacked<prepacked_meta>::op);
  m.impl("unprepack", &Unprepack<unprepack_meta>::op);
  m.impl("affine_grad", &affine_grad_meta);
}

TORCH_LIBRARY_IMPL(onebit, AutocastCPU, m) {
  ProductForms<product_autocast>::define(m);
  m.impl("qmm_prepacked", &QmmPrepacked<prepacked_autocast>::op);
}
TORCH_LIBRARY_IMPL(onebit, AutocastMPS, m) { ProductForms<product_autocast>::define(m); }
TORCH_LIBRARY_IMPL(onebit, AutocastCUDA, m) { ProductForms<product_autocast>::define(m); }
TORCH_LIBRARY_IMPL(onebit, AutocastXPU, m) { ProductForms<product_autocast>::define(m); }

TORCH_LIBRARY_IMPL(onebit, CompositeImplicitAutograd, m) {
  m.impl("linear", &linear);
  m.impl("linear_prepacked", &linear_prepacked);
}
// torch.vmap does not look there by itself: what they are made of has the rules.
TORCH_LIBRARY_IMPL(onebit, FuncTorchBatchedDecomposition, m) {
  m.impl("linear", &linear);
  m.impl("linear_prepacked", &linear_prepacked);
}

}  // namespace onebit

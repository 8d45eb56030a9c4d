// Products with 1-bit weights: their schemas; shapes without data (Meta); autocast; and linear,
// which is composed of them.
#include <ATen/TensorOperators.h>
#include <ATen/autocast_mode.h>
#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <torch/library.h>

#include <tuple>

#include "rules.h"

TORCH_LIBRARY_FRAGMENT(onebit, m) {
  m.def(
      "qmm(Tensor x, Tensor packed, Tensor scales, Tensor? biases, int group_size, "
      "bool transpose=True) -> Tensor");
  m.def(
      "gather_qmm(Tensor x, Tensor packed, Tensor scales, Tensor? biases, Tensor? lhs_indices, "
      "Tensor? rhs_indices, int group_size, bool transpose=True, bool sorted_indices=False) -> "
      "Tensor");
  // A copy of weights in a layout of the device's own, opaque to everything else, for a few rows of
  // x; and the product that uses it there.
  m.def("prepack(Tensor packed, Tensor scales, Tensor? biases, int group_size) -> Tensor");
  m.def(
      "qmm_prepacked(Tensor x, Tensor packed, Tensor scales, Tensor? biases, Tensor prepacked, "
      "int group_size) -> Tensor");
  m.def(
      "linear(Tensor x, Tensor packed, Tensor scales, Tensor? biases, Tensor? bias, "
      "Tensor? prepacked, int group_size) -> Tensor");
  // The backward pass of qmm and gather_qmm for scales and biases; the one for x is the same
  // product with transpose flipped.
  m.def(
      "affine_grad(Tensor grad, Tensor x, Tensor packed, Tensor? lhs_indices, Tensor? rhs_indices, "
      "int group_size, bool transpose=True) -> (Tensor grad_scales, Tensor grad_biases)");
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

// x takes the region's dtype, as in F.linear; scales and biases keep theirs, for a kernel reads any
// mix of dtypes and converting them would cost a pass per call.
Tensor product_autocast(const Operands& o) {
  check_dense("x", o.x);  // converting reads it
  const auto device = o.x.device().type();
  c10::impl::ExcludeDispatchKeyGuard no_autocast(
      at::autocast::get_autocast_dispatch_key_from_device_type(device));
  return product(
      o.with_x(at::autocast::cached_cast(at::autocast::get_autocast_dtype(device), o.x, device)));
}

Tensor linear(const Tensor& x,
              const Tensor& packed,
              const Tensor& scales,
              const OptionalTensor& biases,
              const OptionalTensor& bias,
              const OptionalTensor& prepacked,
              int64_t group_size) {
  Operands o{Form::kQmm, x, packed, scales, biases, group_size};
  if (prepacked) {
    o.form = Form::kPrepacked;
    o.prepacked = &*prepacked;
  }
  const auto y = product(o);
  if (!bias) return y;
  check_values("bias", *bias);
  check_sizes<SymInt>("bias", *bias, {y.sym_size(-1)}, " (one per output)");
  return y + bias->to(y.scalar_type());
}

}  // namespace

TORCH_LIBRARY_IMPL(onebit, Meta, m) {
  ProductForms<product_meta>::define(m, /*prepacked=*/true);
  m.impl("affine_grad", &affine_grad_meta);
}

TORCH_LIBRARY_IMPL(onebit, AutocastCPU, m) { ProductForms<product_autocast>::define(m, true); }
TORCH_LIBRARY_IMPL(onebit, AutocastMPS, m) { ProductForms<product_autocast>::define(m, true); }
TORCH_LIBRARY_IMPL(onebit, AutocastCUDA, m) { ProductForms<product_autocast>::define(m, true); }
TORCH_LIBRARY_IMPL(onebit, AutocastXPU, m) { ProductForms<product_autocast>::define(m, true); }

TORCH_LIBRARY_IMPL(onebit, CompositeImplicitAutograd, m) { m.impl("linear", &linear); }
// torch.vmap does not look there by itself: what linear is made of has the rules.
TORCH_LIBRARY_IMPL(onebit, FuncTorchBatchedDecomposition, m) { m.impl("linear", &linear); }

}  // namespace onebit

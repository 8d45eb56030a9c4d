// The gradients of scales and biases on MPS.
#include <ATen/ops/empty.h>
#include <ATen/ops/zeros.h>
#include <torch/library.h>

#include <tuple>

#include "../ops/product/rules.h"
#include "encoder.h"
#include "tensors.h"

namespace onebit::mps {
namespace {

std::tuple<Tensor, Tensor> affine_grad_mps(const Tensor& grad,
                                           const Tensor& x,
                                           const Tensor& packed,
                                           const OptionalTensor& lhs_indices,
                                           const OptionalTensor& rhs_indices,
                                           int64_t group_size,
                                           bool transpose) {
  const auto shape =
      check_affine_grad<int64_t>(grad, x, packed, lhs_indices, rhs_indices, group_size, transpose);
  const DType type = dtype_on_mps("x", x);
  const auto sizes = levels_shape<int64_t>(packed, group_size);
  const auto options = x.options().dtype(at::kFloat);
  if (grad.numel() == 0 || shape.k == 0)
    return {at::zeros(sizes, options), at::zeros(sizes, options)};
  check_count("x", x);
  check_count("grad", grad);
  check_count("packed", packed);

  auto grad_scales = at::empty(sizes, options), grad_biases = at::empty(sizes, options);
  const BatchIndices index(shape, x, packed, lhs_indices, rhs_indices, BatchIndices::Formula::kYes);
  const AffineGradParams params = {static_cast<uint32_t>(shape.m),
                                   static_cast<uint32_t>(transpose ? shape.n : shape.k),
                                   static_cast<uint32_t>(transpose ? shape.k : shape.n),
                                   group_shift(group_size),
                                   index.batches,
                                   index.x_matrices,
                                   index.w_matrices,
                                   transpose ? 0u : 1u,
                                   index.x_repeat,
                                   index.w_repeat};
  encode(Work{
      plan_affine_grad(params, type, index.indexed()),
      {aligned(grad), aligned(x), words_of(packed), grad_scales, grad_biases, index.x, index.w},
      &params,
      sizeof params});
  return {grad_scales, grad_biases};
}

}  // namespace

TORCH_LIBRARY_IMPL(onebit, MPS, m) { m.impl("affine_grad", &affine_grad_mps); }

}  // namespace onebit::mps

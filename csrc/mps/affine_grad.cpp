// The gradients of scales and biases on MPS.
#include <ATen/ops/empty.h>
#include <ATen/ops/zeros.h>

#include "../ops/product/rules.h"
#include "encoder.h"
#include "tensors.h"

namespace onebit::mps {
namespace {

LevelGrads affine_grad_mps(const AffineGrad& o) {
  const auto shape = check_affine_grad<int64_t>(o);
  const Tensor &grad = o.grad, &x = o.x, &packed = o.packed;
  const DType type = dtype_on_mps("x", x);
  const auto sizes = levels_shape<int64_t>(packed, o.group_size);
  const auto options = x.options().dtype(at::kFloat);
  if (grad.numel() == 0 || shape.k == 0)
    return {at::zeros(sizes, options), at::zeros(sizes, options)};
  check_count("x", x);
  check_count("grad", grad);
  check_count("packed", packed);

  auto grad_scales = at::empty(sizes, options), grad_biases = at::empty(sizes, options);
  const BatchIndices index(shape, o.pairs(), BatchIndices::Formula::kYes);
  const AffineGradParams params = {static_cast<uint32_t>(shape.m),
                                   static_cast<uint32_t>(o.transpose ? shape.n : shape.k),
                                   static_cast<uint32_t>(o.transpose ? shape.k : shape.n),
                                   group_shift(o.group_size),
                                   index.batches,
                                   index.x_matrices,
                                   index.w_matrices,
                                   o.transpose ? 0u : 1u,
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

TORCH_LIBRARY_IMPL(onebit, MPS, m) { define<AffineGrad, affine_grad_mps>(m); }

}  // namespace onebit::mps

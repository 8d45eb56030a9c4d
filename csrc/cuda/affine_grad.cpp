// The gradients of scales and biases on CUDA.
#include <ATen/ops/empty.h>
#include <ATen/ops/zeros.h>
#include <c10/core/DeviceGuard.h>

#include "../ops/product/rules.h"
#include "tensors.h"

namespace onebit::cuda {
namespace {

LevelGrads affine_grad_cuda(const AffineGrad& o, Below<LevelGrads> composite) {
  const auto shape = check_affine_grad<int64_t>(o);
  if (!has_kernels(o.x)) return composite();
  const Tensor &grad = o.grad, &x = o.x, &packed = o.packed;
  const c10::DeviceGuard guard(x.device());
  const auto sizes = levels_shape<int64_t>(packed, o.group_size);
  const auto options = x.options().dtype(at::kFloat);
  if (grad.numel() == 0 || shape.k == 0 || packed.numel() == 0) {
    return {at::zeros(sizes, options), at::zeros(sizes, options)};
  }
  auto grad_scales = at::empty(sizes, options), grad_biases = at::empty(sizes, options);
  const BatchIndices index(shape, o.pairs());
  const auto by_output = aligned(grad), by_input = aligned(x), bits = words_of(packed);
  const AffineGradArgs args = {by_output.const_data_ptr(),
                               by_input.const_data_ptr(),
                               words(bits),
                               grad_scales.mutable_data_ptr<float>(),
                               grad_biases.mutable_data_ptr<float>(),
                               index_data(index.x),
                               index_data(index.w),
                               index.x_matrices,
                               index.batches,
                               uint32_t(shape.m),
                               uint32_t(o.transpose ? shape.n : shape.k),
                               uint32_t(o.transpose ? shape.k : shape.n),
                               o.transpose ? 0u : 1u};
  launch(plan_affine_grad(args, index.w_matrices, dtype_of(x), group_words(o.group_size)), args);
  return {grad_scales, grad_biases};
}

}  // namespace
TORCH_LIBRARY_IMPL(onebit, CUDA, m) { define_above_composite<AffineGrad, affine_grad_cuda>(m); }

}  // namespace onebit::cuda

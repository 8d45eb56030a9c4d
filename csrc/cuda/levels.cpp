// The operators of ../levels.cpp on CUDA: a warp per group, or per row of bits.
#include <ATen/ops/empty.h>
#include <c10/core/DeviceGuard.h>
#include <torch/library.h>

#include <tuple>

#include "../ops/levels/rules.h"
#include "tensors.h"

namespace onebit::cuda {
namespace {

// One launch over the groups of w, which is not empty. args names everything but w.
void launch_groups(Kernel kernel, const Tensor& w, const GroupOptions& options, GroupArgs args) {
  const auto values = w.contiguous();
  args.w = values.const_data_ptr();
  args.groups = w.numel() / (options.group_words * kWordBits);
  launch(plan_groups(kernel, args.groups, dtype_of(w), options), args);
}

std::tuple<Tensor, Tensor, Tensor> quantize_levels_cuda(const Tensor& w,
                                                        c10::string_view rule,
                                                        int64_t group_size,
                                                        const OptionalTensor& importance) {
  const auto shape = check_quantize_levels<int64_t>(w, rule, group_size, importance);
  if (!has_kernels(w)) {
    return composite(&quantize_levels_cuda, "onebit::quantize_levels", w, rule, group_size,
                     importance);
  }
  const c10::DeviceGuard guard(w.device());
  auto packed = at::empty(shape.packed, w.options().dtype(at::kInt));
  auto scales = at::empty(shape.scales, w.options()), biases = at::empty(shape.scales, w.options());
  if (w.numel() == 0) return {packed, scales, biases};
  GroupOptions options = {group_words(group_size), rule_of(rule)};
  options.has_importance = importance.has_value();
  const auto weights = importance ? importance->to(at::kFloat).contiguous() : Tensor();
  GroupArgs args = {};
  args.packed = mutable_words(packed);
  args.first = scales.mutable_data_ptr();
  args.second = biases.mutable_data_ptr();
  args.importance = importance ? weights.const_data_ptr<float>() : nullptr;
  args.period = importance ? weights.numel() / group_size : 1;
  launch_groups(Kernel::kQuantizeLevels, w, options, args);
  return {packed, scales, biases};
}

Tensor fake_quantize_cuda(const Tensor& w,
                          c10::string_view rule,
                          int64_t group_size,
                          OptionalType dtype) {
  check_quantize_levels<int64_t>(w, rule, group_size, std::nullopt);
  check_output_type(dtype);
  const auto type = dtype.value_or(w.scalar_type());
  if (!has_kernels(w) || type == at::kDouble) {
    return composite(&fake_quantize_cuda, "onebit::fake_quantize", w, rule, group_size, dtype);
  }
  const c10::DeviceGuard guard(w.device());
  auto out = at::empty(w.sizes(), w.options().dtype(type));
  if (w.numel() == 0) return out;
  GroupArgs args = {};
  args.out = out.mutable_data_ptr();
  launch_groups(Kernel::kFakeQuantize, w, {group_words(group_size), rule_of(rule), dtype_of(type)},
                args);
  return out;
}

Tensor fake_quantize_backward_cuda(const Tensor& grad,
                                   const Tensor& w,
                                   c10::string_view rule,
                                   int64_t group_size) {
  check_quantize_levels<int64_t>(w, rule, group_size, std::nullopt);
  check_gradient<int64_t>(grad, w);
  if (!has_kernels(w) || !has_kernels(grad)) {
    return composite(&fake_quantize_backward_cuda, "onebit::fake_quantize_backward", grad, w, rule,
                     group_size);
  }
  const c10::DeviceGuard guard(w.device());
  auto grad_w = at::empty(w.sizes(), w.options());
  if (w.numel() == 0) return grad_w;
  const auto grads = grad.contiguous();
  GroupArgs args = {};
  args.grad = grads.const_data_ptr();
  args.out = grad_w.mutable_data_ptr();
  launch_groups(Kernel::kFakeQuantizeBackward, w,
                {group_words(group_size), rule_of(rule), dtype_of(grad)}, args);
  return grad_w;
}

Tensor fake_quantize_affine_cuda(const Tensor& w,
                                 const Tensor& scales,
                                 const Tensor& biases,
                                 int64_t group_size,
                                 OptionalType dtype) {
  check_affine<int64_t>(w, scales, biases, group_size);
  check_output_type(dtype);
  const auto type = dtype.value_or(w.scalar_type());
  if (!has_kernels(w) || !has_kernels(scales) || type == at::kDouble) {
    return composite(&fake_quantize_affine_cuda, "onebit::fake_quantize_affine", w, scales, biases,
                     group_size, dtype);
  }
  const c10::DeviceGuard guard(w.device());
  auto out = at::empty(w.sizes(), w.options().dtype(type));
  if (w.numel() == 0) return out;
  const auto steps = scales.contiguous(), base = biases.contiguous();
  GroupArgs args = {};
  args.scales = steps.const_data_ptr();
  args.biases = base.const_data_ptr();
  args.out = out.mutable_data_ptr();
  launch_groups(Kernel::kFakeQuantizeAffine, w,
                {group_words(group_size), Rule::kMinMax, dtype_of(type), dtype_of(scales)}, args);
  return out;
}

std::tuple<Tensor, Tensor> fake_quantize_affine_backward_cuda(const Tensor& grad,
                                                              const Tensor& w,
                                                              const Tensor& scales,
                                                              const Tensor& biases,
                                                              int64_t group_size) {
  check_affine<int64_t>(w, scales, biases, group_size);
  check_gradient<int64_t>(grad, w);
  if (!has_kernels(w) || !has_kernels(grad) || !has_kernels(scales)) {
    return composite(&fake_quantize_affine_backward_cuda, "onebit::fake_quantize_affine_backward",
                     grad, w, scales, biases, group_size);
  }
  const c10::DeviceGuard guard(w.device());
  auto grad_scales = at::empty(scales.sizes(), scales.options());
  auto grad_biases = at::empty(scales.sizes(), scales.options());
  if (w.numel() == 0) return {grad_scales, grad_biases};
  const auto grads = grad.contiguous(), steps = scales.contiguous(), base = biases.contiguous();
  GroupArgs args = {};
  args.grad = grads.const_data_ptr();
  args.scales = steps.const_data_ptr();
  args.biases = base.const_data_ptr();
  args.first = grad_scales.mutable_data_ptr();
  args.second = grad_biases.mutable_data_ptr();
  launch_groups(Kernel::kFakeQuantizeAffineBackward, w,
                {group_words(group_size), Rule::kMinMax, dtype_of(grad), dtype_of(scales)}, args);
  return {grad_scales, grad_biases};
}

Tensor flip_bits_cuda(Tensor& bits,
                      const Tensor& error,
                      const Tensor& scales,
                      const Tensor& moments,
                      int64_t begin,
                      int64_t end,
                      int64_t group_size) {
  const auto sizes = check_flip_bits<int64_t>(bits, error, scales, moments, begin, end, group_size);
  if (!has_kernels(error)) {
    return composite(&flip_bits_cuda, "onebit::flip_bits_", bits, error, scales, moments, begin,
                     end, group_size);
  }
  const c10::DeviceGuard guard(bits.device());
  auto changes = at::empty(sizes, error.options());
  if (changes.numel() == 0) return changes;
  const auto local = error.narrow(1, begin, end - begin).clone(at::MemoryFormat::Contiguous);
  const auto steps = scales.contiguous(), square = moments.contiguous();
  const FlipArgs args = {bits.mutable_data_ptr<bool>(),
                         local.mutable_data_ptr<float>(),
                         steps.const_data_ptr<float>(),
                         square.const_data_ptr<float>(),
                         changes.mutable_data_ptr<float>(),
                         uint32_t(bits.size(0)),
                         uint32_t(bits.size(1)),
                         uint32_t(begin),
                         uint32_t(end - begin)};
  launch(plan_flip_bits(args, group_words(group_size)), args);
  return changes;
}

}  // namespace
TORCH_LIBRARY_IMPL(onebit, CUDA, m) {
  m.impl("quantize_levels", &quantize_levels_cuda);
  m.impl("fake_quantize", &fake_quantize_cuda);
  m.impl("fake_quantize_backward", &fake_quantize_backward_cuda);
  m.impl("fake_quantize_affine", &fake_quantize_affine_cuda);
  m.impl("fake_quantize_affine_backward", &fake_quantize_affine_backward_cuda);
  m.impl("flip_bits_", &flip_bits_cuda);
}

}  // namespace onebit::cuda

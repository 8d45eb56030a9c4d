// The operators of ../ops/levels on CUDA: a warp per group, or per row of bits.
#include <ATen/ops/empty.h>
#include <c10/core/DeviceGuard.h>
#include <torch/library.h>

#include "../ops/levels/rules.h"
#include "tensors.h"

namespace onebit::cuda {
namespace {

bool has_level_kernels(const LevelOperands& o) {
  return has_kernels(o.w) && (!o.given() || has_kernels(*o.scales)) &&
         (!o.grad || has_kernels(*o.grad)) && o.result_type() != at::kDouble;
}

// One launch over the groups of w. out: what the kernel writes.
void launch_groups(Kernel kernel, const LevelOperands& o, GroupArgs out) {
  if (o.w.numel() == 0) return;
  const c10::DeviceGuard guard(o.w.device());
  GroupOptions options = {group_words(o.group_size)};
  GroupArgs args = out;
  const auto contiguous = [](const Tensor* t) { return t ? t->contiguous() : Tensor(); };
  const auto w = o.w.contiguous(), grad = contiguous(o.grad), scales = contiguous(o.scales),
             biases = contiguous(o.biases);
  const auto importance = o.importance ? o.importance->to(at::kFloat).contiguous() : Tensor();
  args.w = w.const_data_ptr();
  args.groups = w.numel() / o.group_size;
  args.period = 1;
  options.other = dtype_of(o.grad ? o.grad->scalar_type() : o.result_type());
  if (o.grad) args.grad = grad.const_data_ptr();
  if (o.given()) {
    options.levels = dtype_of(scales);
    args.scales = scales.const_data_ptr();
    args.biases = biases.const_data_ptr();
  } else {
    options.rule = rule_of(o.rule);
  }
  if (o.importance) {
    options.has_importance = true;
    args.importance = importance.const_data_ptr<float>();
    args.period = importance.numel() / o.group_size;
  }
  launch(plan_groups(kernel, args.groups, dtype_of(w), options), args);
}

QuantizedLevels quantize_levels_cuda(const LevelOperands& o, Below<QuantizedLevels> composite) {
  const auto shape = check_choice<int64_t>(o);
  if (!has_level_kernels(o)) return composite();
  auto packed = at::empty(shape.packed, o.w.options().dtype(at::kInt));
  auto scales = at::empty(shape.scales, o.w.options());
  auto biases = at::empty(shape.scales, o.w.options());
  GroupArgs out = {};
  out.packed = mutable_words(packed);
  out.first = scales.mutable_data_ptr();
  out.second = biases.mutable_data_ptr();
  launch_groups(Kernel::kQuantizeLevels, o, out);
  return {packed, scales, biases};
}

Tensor fake_quantize_cuda(const LevelOperands& o, Below<Tensor> composite) {
  check_choice<int64_t>(o);
  if (!has_level_kernels(o)) return composite();
  auto result = at::empty(o.w.sizes(), o.w.options().dtype(o.result_type()));
  GroupArgs out = {};
  out.out = result.mutable_data_ptr();
  launch_groups(o.given() ? Kernel::kFakeQuantizeAffine : Kernel::kFakeQuantize, o, out);
  return result;
}

Tensor grad_w_cuda(const LevelOperands& o, Below<Tensor> composite) {
  check_choice<int64_t>(o);
  if (!has_level_kernels(o)) return composite();
  auto grad_w = at::empty(o.w.sizes(), o.w.options());
  GroupArgs out = {};
  out.out = grad_w.mutable_data_ptr();
  launch_groups(Kernel::kFakeQuantizeBackward, o, out);
  return grad_w;
}

GradLevels grad_levels_cuda(const LevelOperands& o, Below<GradLevels> composite) {
  check_choice<int64_t>(o);
  if (!has_level_kernels(o)) return composite();
  auto grad_scales = at::empty(o.scales->sizes(), o.scales->options());
  auto grad_biases = at::empty(o.scales->sizes(), o.scales->options());
  GroupArgs out = {};
  out.first = grad_scales.mutable_data_ptr();
  out.second = grad_biases.mutable_data_ptr();
  launch_groups(Kernel::kFakeQuantizeAffineBackward, o, out);
  return {grad_scales, grad_biases};
}

Tensor flip_bits_cuda(const FlipBits& o, Below<Tensor> composite) {
  const auto sizes = check_flip_bits<int64_t>(o);
  if (!has_kernels(o.error)) return composite();
  const c10::DeviceGuard guard(o.bits.device());
  auto changes = at::empty(sizes, o.error.options());
  if (changes.numel() == 0) return changes;
  const int64_t width = o.end - o.begin;
  const auto local = o.error.narrow(1, o.begin, width).clone(at::MemoryFormat::Contiguous);
  const auto steps = o.scales.contiguous(), square = o.moments.contiguous();
  const FlipArgs args = {o.bits.mutable_data_ptr<bool>(),
                         local.mutable_data_ptr<float>(),
                         steps.const_data_ptr<float>(),
                         square.const_data_ptr<float>(),
                         changes.mutable_data_ptr<float>(),
                         uint32_t(o.bits.size(0)),
                         uint32_t(o.bits.size(1)),
                         uint32_t(o.begin),
                         uint32_t(width)};
  launch(plan_flip_bits(args, group_words(o.group_size)), args);
  return changes;
}

}  // namespace

TORCH_LIBRARY_IMPL(onebit, CUDA, m) {
  define_above_composite<QuantizeLevels, quantize_levels_cuda>(m);
  define_above_composite<FakeQuantize, fake_quantize_cuda>(m);
  define_above_composite<FakeQuantizeAffine, fake_quantize_cuda>(m);
  define_above_composite<FakeQuantizeBackward, grad_w_cuda>(m);
  define_above_composite<FakeQuantizeAffineBackward, grad_levels_cuda>(m);
  define_above_composite<FlipBits, flip_bits_cuda>(m);
}

}  // namespace onebit::cuda

// The operators of ../ops/levels on MPS: a simdgroup per group, or per row of bits.
#include <ATen/ops/empty.h>
#include <torch/library.h>

#include "../ops/levels/rules.h"
#include "encoder.h"
#include "tensors.h"

namespace onebit::mps {
namespace {

// One launch over the groups of w, which is not empty.
void encode_groups(Kernel kernel,
                   const LevelOperands& o,
                   const GroupOptions& options,
                   c10::SmallVector<Tensor, 8> buffers,
                   int64_t period = 1) {
  check_count("w", o.w);
  const GroupParams params = {static_cast<uint32_t>(o.w.numel() / o.group_size),
                              static_cast<uint32_t>(period)};
  encode(Work{plan_groups(kernel, params, dtype_on_mps("w", o.w), options), std::move(buffers),
              &params, sizeof params});
}

// other: the dtype of fake-quantized weights and of their gradient.
GroupOptions options_of(const LevelOperands& o, DType other = DType::kFloat) {
  GroupOptions options = {o.group_size};
  if (o.given()) {
    options.levels = dtype_on_mps("scales", *o.scales);
  } else {
    options.rule = rule_of(o.rule);
  }
  options.other = other;
  options.has_importance = o.importance != nullptr;
  return options;
}

QuantizedLevels quantize_levels_mps(const LevelOperands& o) {
  const auto shape = check_choice<int64_t>(o);
  auto packed = at::empty(shape.packed, o.w.options().dtype(at::kInt));
  auto scales = at::empty(shape.scales, o.w.options());
  auto biases = at::empty(shape.scales, o.w.options());
  if (o.w.numel() == 0) return {packed, scales, biases};
  const auto weights = o.importance ? o.importance->to(at::kFloat).contiguous() : Tensor();
  encode_groups(Kernel::kQuantizeLevels, o, options_of(o),
                {o.w.contiguous(), packed, scales, biases, weights},
                o.importance ? weights.numel() / o.group_size : 1);
  return {packed, scales, biases};
}

Tensor fake_quantize_mps(const LevelOperands& o) {
  check_choice<int64_t>(o);
  const auto options = options_of(o, dtype_on_mps("dtype", o.result_type()));
  auto out = at::empty(o.w.sizes(), o.w.options().dtype(o.result_type()));
  if (o.w.numel() == 0) return out;
  if (o.given()) {
    encode_groups(Kernel::kFakeQuantizeAffine, o, options,
                  {o.w.contiguous(), o.scales->contiguous(), o.biases->contiguous(), out});
  } else {
    encode_groups(Kernel::kFakeQuantize, o, options, {o.w.contiguous(), out});
  }
  return out;
}

Tensor grad_w_mps(const LevelOperands& o) {
  check_choice<int64_t>(o);
  const auto options = options_of(o, dtype_on_mps("grad", *o.grad));
  auto grad_w = at::empty(o.w.sizes(), o.w.options());
  if (o.w.numel() == 0) return grad_w;
  encode_groups(Kernel::kFakeQuantizeBackward, o, options,
                {o.grad->contiguous(), o.w.contiguous(), grad_w});
  return grad_w;
}

GradLevels grad_levels_mps(const LevelOperands& o) {
  check_choice<int64_t>(o);
  const auto options = options_of(o, dtype_on_mps("grad", *o.grad));
  auto grad_scales = at::empty(o.scales->sizes(), o.scales->options());
  auto grad_biases = at::empty(o.scales->sizes(), o.scales->options());
  if (o.w.numel() == 0) return {grad_scales, grad_biases};
  encode_groups(Kernel::kFakeQuantizeAffineBackward, o, options,
                {o.grad->contiguous(), o.w.contiguous(), o.scales->contiguous(),
                 o.biases->contiguous(), grad_scales, grad_biases});
  return {grad_scales, grad_biases};
}

Tensor flip_bits_mps(const FlipBits& o) {
  const auto sizes = check_flip_bits<int64_t>(o);
  dtype_on_mps("error", o.error);
  auto changes = at::empty(sizes, o.error.options());
  if (changes.numel() == 0) return changes;
  check_count("bits", o.bits);
  check_count("moments", o.moments);
  const int64_t width = o.end - o.begin;
  const FlipParams params = {static_cast<uint32_t>(o.bits.size(0)),
                             static_cast<uint32_t>(o.bits.size(1)), static_cast<uint32_t>(o.begin),
                             static_cast<uint32_t>(width)};
  const auto local = o.error.narrow(1, o.begin, width).clone(at::MemoryFormat::Contiguous);
  encode(Work{plan_flip_bits(params, o.group_size),
              {o.bits, local, o.scales.contiguous(), o.moments.contiguous(), changes},
              &params,
              sizeof params});
  return changes;
}

}  // namespace

TORCH_LIBRARY_IMPL(onebit, MPS, m) {
  define<QuantizeLevels, quantize_levels_mps>(m);
  define<FakeQuantize, fake_quantize_mps>(m);
  define<FakeQuantizeAffine, fake_quantize_mps>(m);
  define<FakeQuantizeBackward, grad_w_mps>(m);
  define<FakeQuantizeAffineBackward, grad_levels_mps>(m);
  define<FlipBits, flip_bits_mps>(m);
}

}  // namespace onebit::mps

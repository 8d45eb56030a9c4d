// The operators of ../ops/levels on MPS: a simdgroup per group, or per row of bits.
#include <ATen/ops/empty.h>
#include <torch/library.h>

#include <tuple>

#include "../ops/levels/rules.h"
#include "encoder.h"
#include "tensors.h"

namespace onebit::mps {
namespace {

// One launch over the groups of w; w is not empty.
void encode_groups(Kernel kernel,
                   const Tensor& w,
                   const GroupOptions& options,
                   c10::SmallVector<Tensor, 8> buffers,
                   int64_t period = 1) {
  const GroupParams params = {static_cast<uint32_t>(w.numel() / options.group_size),
                              static_cast<uint32_t>(period)};
  encode(Work{plan_groups(kernel, params, dtype_on_mps("w", w), options), std::move(buffers),
              &params, sizeof params});
}

std::tuple<Tensor, Tensor, Tensor> quantize_levels_mps(const Tensor& w,
                                                       c10::string_view rule,
                                                       int64_t group_size,
                                                       const OptionalTensor& importance) {
  const auto shape = check_quantize_levels<int64_t>(w, rule, group_size, importance);
  auto packed = at::empty(shape.packed, w.options().dtype(at::kInt));
  auto scales = at::empty(shape.scales, w.options()), biases = at::empty(shape.scales, w.options());
  if (w.numel() == 0) return {packed, scales, biases};
  check_count("w", w);
  GroupOptions options = {group_size, rule_of(rule)};
  options.has_importance = importance.has_value();
  const auto weights = importance ? importance->to(at::kFloat).contiguous() : Tensor();
  encode_groups(Kernel::kQuantizeLevels, w, options,
                {w.contiguous(), packed, scales, biases, weights},
                importance ? weights.numel() / group_size : 1);
  return {packed, scales, biases};
}

Tensor fake_quantize_mps(const Tensor& w,
                         c10::string_view rule,
                         int64_t group_size,
                         OptionalType dtype) {
  check_quantize_levels<int64_t>(w, rule, group_size, std::nullopt);
  check_output_type(dtype);
  const auto type = dtype.value_or(w.scalar_type());
  const GroupOptions options = {group_size, rule_of(rule), dtype_on_mps("dtype", type)};
  auto out = at::empty(w.sizes(), w.options().dtype(type));
  if (w.numel() == 0) return out;
  check_count("w", w);
  encode_groups(Kernel::kFakeQuantize, w, options, {w.contiguous(), out});
  return out;
}

Tensor fake_quantize_backward_mps(const Tensor& grad,
                                  const Tensor& w,
                                  c10::string_view rule,
                                  int64_t group_size) {
  check_quantize_levels<int64_t>(w, rule, group_size, std::nullopt);
  check_gradient<int64_t>(grad, w);
  const GroupOptions options = {group_size, rule_of(rule), dtype_on_mps("grad", grad)};
  auto grad_w = at::empty(w.sizes(), w.options());
  if (w.numel() == 0) return grad_w;
  check_count("w", w);
  encode_groups(Kernel::kFakeQuantizeBackward, w, options,
                {grad.contiguous(), w.contiguous(), grad_w});
  return grad_w;
}

Tensor fake_quantize_affine_mps(const Tensor& w,
                                const Tensor& scales,
                                const Tensor& biases,
                                int64_t group_size,
                                OptionalType dtype) {
  check_affine<int64_t>(w, scales, biases, group_size);
  check_output_type(dtype);
  const auto type = dtype.value_or(w.scalar_type());
  const GroupOptions options = {group_size, Rule::kMinMax, dtype_on_mps("dtype", type),
                                dtype_on_mps("scales", scales)};
  auto out = at::empty(w.sizes(), w.options().dtype(type));
  if (w.numel() == 0) return out;
  check_count("w", w);
  encode_groups(Kernel::kFakeQuantizeAffine, w, options,
                {w.contiguous(), scales.contiguous(), biases.contiguous(), out});
  return out;
}

std::tuple<Tensor, Tensor> fake_quantize_affine_backward_mps(const Tensor& grad,
                                                             const Tensor& w,
                                                             const Tensor& scales,
                                                             const Tensor& biases,
                                                             int64_t group_size) {
  check_affine<int64_t>(w, scales, biases, group_size);
  check_gradient<int64_t>(grad, w);
  const GroupOptions options = {group_size, Rule::kMinMax, dtype_on_mps("grad", grad),
                                dtype_on_mps("scales", scales)};
  auto grad_scales = at::empty(scales.sizes(), scales.options());
  auto grad_biases = at::empty(scales.sizes(), scales.options());
  if (w.numel() == 0) return {grad_scales, grad_biases};
  check_count("w", w);
  encode_groups(Kernel::kFakeQuantizeAffineBackward, w, options,
                {grad.contiguous(), w.contiguous(), scales.contiguous(), biases.contiguous(),
                 grad_scales, grad_biases});
  return {grad_scales, grad_biases};
}

Tensor flip_bits_mps(Tensor& bits,
                     const Tensor& error,
                     const Tensor& scales,
                     const Tensor& moments,
                     int64_t begin,
                     int64_t end,
                     int64_t group_size) {
  const auto sizes = check_flip_bits<int64_t>(bits, error, scales, moments, begin, end, group_size);
  dtype_on_mps("error", error);
  auto changes = at::empty(sizes, error.options());
  if (changes.numel() == 0) return changes;
  check_count("bits", bits);
  check_count("moments", moments);
  const FlipParams params = {static_cast<uint32_t>(bits.size(0)),
                             static_cast<uint32_t>(bits.size(1)), static_cast<uint32_t>(begin),
                             static_cast<uint32_t>(end - begin)};
  const auto local = error.narrow(1, begin, end - begin).clone(at::MemoryFormat::Contiguous);
  encode(Work{plan_flip_bits(params, group_size),
              {bits, local, scales.contiguous(), moments.contiguous(), changes},
              &params,
              sizeof params});
  return changes;
}

}  // namespace

TORCH_LIBRARY_IMPL(onebit, MPS, m) {
  m.impl("quantize_levels", &quantize_levels_mps);
  m.impl("fake_quantize", &fake_quantize_mps);
  m.impl("fake_quantize_backward", &fake_quantize_backward_mps);
  m.impl("fake_quantize_affine", &fake_quantize_affine_mps);
  m.impl("fake_quantize_affine_backward", &fake_quantize_affine_backward_mps);
  m.impl("flip_bits_", &flip_bits_mps);
}

}  // namespace onebit::mps

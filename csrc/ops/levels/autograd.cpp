// Gradients of fake_quantize and fake_quantize_affine, once differentiable: straight through for
// the bit, exact for the levels. The slopes of a step function are a convention of reverse mode,
// so forward mode is refused rather than answered with zeros, and so is a second derivative.
#include "../autograd.h"

#include <torch/csrc/autograd/functions/basic_ops.h>

#include <string>
#include <tuple>

#include "../dispatch.h"
#include "rules.h"

namespace onebit {
namespace {

using FakeQuantize = Tensor(const Tensor&, c10::string_view, int64_t, OptionalType);
using FakeQuantizeBackward = Tensor(const Tensor&, const Tensor&, c10::string_view, int64_t);
using FakeQuantizeAffine =
    Tensor(const Tensor&, const Tensor&, const Tensor&, int64_t, OptionalType);
using FakeQuantizeAffineBackward =
    std::tuple<Tensor, Tensor>(const Tensor&, const Tensor&, const Tensor&, const Tensor&, int64_t);

using FlipBits =
    Tensor(Tensor&, const Tensor&, const Tensor&, const Tensor&, int64_t, int64_t, int64_t);

template <class... Inputs>
void refuse_forward_mode(const char* op, const Inputs&... inputs) {
  TORCH_CHECK_NOT_IMPLEMENTED(
      !(has_tangent(inputs) || ...), "onebit::", op,
      " must be differentiated in reverse mode, got a forward-mode tangent");
}

// Makes whoever differentiates t again fail by name.
template <class... Inputs>
void once_differentiable(const char* op, Tensor& t, const Inputs&... inputs) {
  if (!autograd::compute_requires_grad(inputs...)) return;
  autograd::set_history(
      t, make_node<autograd::NotImplemented>(op, autograd::collect_next_edges(inputs...)));
}

const Backward kFakeQuantize = {
    "OneBitFakeQuantizeBackward",
    [](const variable_list& grads, const Saved& saved, const Needed&) {
      static const auto op = find_op<FakeQuantizeBackward>("onebit::fake_quantize_backward");
      return variable_list{op.call(grads[0], saved.tensors[0], saved.text, saved.numbers[0])};
    }};

Tensor fake_quantize_autograd(c10::DispatchKeySet keys,
                              const Tensor& w,
                              c10::string_view rule,
                              int64_t group_size,
                              OptionalType dtype) {
  refuse_forward_mode("fake_quantize", w);
  static const auto op = find_op<FakeQuantize>("onebit::fake_quantize");
  auto w_hat = below_autograd(op, keys, w, rule, group_size, dtype);
  if (autograd::compute_requires_grad(w)) {
    record(kFakeQuantize, {{w}, {}, {group_size}, std::string(rule)}, {&w_hat}, w);
  }
  return w_hat;
}

// Inputs: w, scales, biases.
const Backward kFakeQuantizeAffine = {
    "OneBitFakeQuantizeAffineBackward",
    [](const variable_list& grads, const Saved& saved, const Needed& needed) {
      static const auto op =
          find_op<FakeQuantizeAffineBackward>("onebit::fake_quantize_affine_backward");
      const Tensor &grad = grads[0], &w = saved.tensors[0];
      variable_list out(3);
      if (needed[0]) out[0] = grad.to(w.scalar_type());
      if (needed[1] || needed[2]) {
        std::tie(out[1], out[2]) =
            op.call(grad, w, saved.tensors[1], saved.tensors[2], saved.numbers[0]);
      }
      return out;
    }};

Tensor fake_quantize_affine_autograd(c10::DispatchKeySet keys,
                                     const Tensor& w,
                                     const Tensor& scales,
                                     const Tensor& biases,
                                     int64_t group_size,
                                     OptionalType dtype) {
  refuse_forward_mode("fake_quantize_affine", w, scales, biases);
  static const auto op = find_op<FakeQuantizeAffine>("onebit::fake_quantize_affine");
  auto w_hat = below_autograd(op, keys, w, scales, biases, group_size, dtype);
  if (autograd::compute_requires_grad(w, scales, biases)) {
    const Saved saved{{w, scales, biases}, {}, {group_size}, {}};
    record(kFakeQuantizeAffine, saved, {&w_hat}, w, scales, biases);
  }
  return w_hat;
}

Tensor fake_quantize_backward_autograd(c10::DispatchKeySet keys,
                                       const Tensor& grad,
                                       const Tensor& w,
                                       c10::string_view rule,
                                       int64_t group_size) {
  refuse_forward_mode("fake_quantize_backward", grad, w);
  static const auto op = find_op<FakeQuantizeBackward>("onebit::fake_quantize_backward");
  auto result = below_autograd(op, keys, grad, w, rule, group_size);
  once_differentiable("onebit::fake_quantize_backward", result, grad, w);
  return result;
}

std::tuple<Tensor, Tensor> fake_quantize_affine_backward_autograd(c10::DispatchKeySet keys,
                                                                  const Tensor& grad,
                                                                  const Tensor& w,
                                                                  const Tensor& scales,
                                                                  const Tensor& biases,
                                                                  int64_t group_size) {
  refuse_forward_mode("fake_quantize_affine_backward", grad, w, scales, biases);
  static const auto op =
      find_op<FakeQuantizeAffineBackward>("onebit::fake_quantize_affine_backward");
  auto [of_scales, of_biases] = below_autograd(op, keys, grad, w, scales, biases, group_size);
  once_differentiable("onebit::fake_quantize_affine_backward", of_scales, grad, w, scales, biases);
  once_differentiable("onebit::fake_quantize_affine_backward", of_biases, grad, w, scales, biases);
  return {of_scales, of_biases};
}

// Autograd looks at versions to tell whether what it saved is still what it was.
Tensor flip_bits_counted(c10::DispatchKeySet keys,
                         Tensor& bits,
                         const Tensor& error,
                         const Tensor& scales,
                         const Tensor& moments,
                         int64_t begin,
                         int64_t end,
                         int64_t group_size) {
  static const auto op = find_op<FlipBits>("onebit::flip_bits_");
  const auto changes = [&] {
    at::AutoDispatchBelowADInplaceOrView guard;
    return op.redispatch(keys & c10::after_ADInplaceOrView_keyset, bits, error, scales, moments,
                         begin, end, group_size);
  }();
  bits.unsafeGetTensorImpl()->bump_version();
  return changes;
}

}  // namespace

TORCH_LIBRARY_IMPL(onebit, ADInplaceOrView, m) { m.impl("flip_bits_", &flip_bits_counted); }

TORCH_LIBRARY_IMPL(onebit, Autograd, m) {
  m.impl("fake_quantize", &fake_quantize_autograd);
  m.impl("fake_quantize_affine", &fake_quantize_affine_autograd);
  m.impl("fake_quantize_backward", &fake_quantize_backward_autograd);
  m.impl("fake_quantize_affine_backward", &fake_quantize_affine_backward_autograd);
}

}  // namespace onebit

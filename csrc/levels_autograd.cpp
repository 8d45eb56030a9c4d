// Gradients of fake_quantize and fake_quantize_affine, once differentiable: straight through for
// the bit, exact for the levels. The slopes of a step function are a convention of reverse mode,
// so forward mode is refused rather than answered with zeros, and so is a second derivative.
#include <ATen/core/Tensor.h>
#include <torch/csrc/autograd/functions/basic_ops.h>

#include <string>
#include <tuple>

#include "autograd.h"
#include "levels_shape.h"
#include "ops.h"

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

struct FakeQuantizeNode : autograd::TraceableFunction {
  SavedVariable w;
  std::string rule;
  int64_t group_size = 0;

  std::string name() const override { return "OneBitFakeQuantizeBackward"; }

  variable_list apply(variable_list&& grads) override {
    std::lock_guard<std::mutex> lock(mutex_);
    static const auto op = ops::find<FakeQuantizeBackward>("onebit::fake_quantize_backward");
    if (!grads[0].defined()) return {Tensor()};
    return {op.call(grads[0], w.unpack(), rule, group_size)};
  }

  void release_variables() override {
    std::lock_guard<std::mutex> lock(mutex_);
    w.reset_data();
  }
};

Tensor fake_quantize_autograd(c10::DispatchKeySet keys,
                              const Tensor& w,
                              c10::string_view rule,
                              int64_t group_size,
                              OptionalType dtype) {
  refuse_forward_mode("fake_quantize", w);
  static const auto op = ops::find<FakeQuantize>("onebit::fake_quantize");
  auto w_hat = below_autograd(op, keys, w, rule, group_size, dtype);
  if (autograd::compute_requires_grad(w)) {
    auto node = make_node<FakeQuantizeNode>();
    node->set_next_edges(autograd::collect_next_edges(w));
    node->w = SavedVariable(w, false);
    node->rule = std::string(rule);
    node->group_size = group_size;
    autograd::set_history(w_hat, node);
  }
  return w_hat;
}

struct FakeQuantizeAffineNode : autograd::TraceableFunction {
  SavedVariable w, scales, biases;
  int64_t group_size = 0;

  std::string name() const override { return "OneBitFakeQuantizeAffineBackward"; }

  variable_list apply(variable_list&& grads) override {
    std::lock_guard<std::mutex> lock(mutex_);
    static const auto op =
        ops::find<FakeQuantizeAffineBackward>("onebit::fake_quantize_affine_backward");
    variable_list out(3);
    const Tensor& grad = grads[0];
    if (!grad.defined()) return out;
    const auto w_ = w.unpack();
    if (task_should_compute_output(0)) out[0] = grad.to(w_.scalar_type());
    if (task_should_compute_output(1) || task_should_compute_output(2)) {
      std::tie(out[1], out[2]) = op.call(grad, w_, scales.unpack(), biases.unpack(), group_size);
    }
    return out;
  }

  void release_variables() override {
    std::lock_guard<std::mutex> lock(mutex_);
    w.reset_data();
    scales.reset_data();
    biases.reset_data();
  }
};

Tensor fake_quantize_affine_autograd(c10::DispatchKeySet keys,
                                     const Tensor& w,
                                     const Tensor& scales,
                                     const Tensor& biases,
                                     int64_t group_size,
                                     OptionalType dtype) {
  refuse_forward_mode("fake_quantize_affine", w, scales, biases);
  static const auto op = ops::find<FakeQuantizeAffine>("onebit::fake_quantize_affine");
  auto w_hat = below_autograd(op, keys, w, scales, biases, group_size, dtype);
  if (autograd::compute_requires_grad(w, scales, biases)) {
    auto node = make_node<FakeQuantizeAffineNode>();
    node->set_next_edges(autograd::collect_next_edges(w, scales, biases));
    node->w = SavedVariable(w, false);
    node->scales = SavedVariable(scales, false);
    node->biases = SavedVariable(biases, false);
    node->group_size = group_size;
    autograd::set_history(w_hat, node);
  }
  return w_hat;
}

Tensor fake_quantize_backward_autograd(c10::DispatchKeySet keys,
                                       const Tensor& grad,
                                       const Tensor& w,
                                       c10::string_view rule,
                                       int64_t group_size) {
  refuse_forward_mode("fake_quantize_backward", grad, w);
  static const auto op = ops::find<FakeQuantizeBackward>("onebit::fake_quantize_backward");
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
      ops::find<FakeQuantizeAffineBackward>("onebit::fake_quantize_affine_backward");
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
  static const auto op = ops::find<FlipBits>("onebit::flip_bits_");
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

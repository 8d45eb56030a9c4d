// Gradients of fake_quantize and fake_quantize_affine, once differentiable: straight through for
// the bit, exact for the levels. The slopes of a step function are a convention of reverse mode,
// so forward mode is refused rather than answered with zeros, and so is a second derivative.
#include "../autograd.h"

#include <torch/csrc/autograd/functions/basic_ops.h>

#include <string>

#include "rules.h"

namespace onebit {
namespace {

// w, and the tensors that the gradient is asked for with it; undefined where the levels are chosen.
struct Inputs {
  Tensor w, scales, biases, grad;

  explicit Inputs(const LevelOperands& o)
      : w(o.w),
        scales(o.given() ? *o.scales : Tensor()),
        biases(o.given() ? *o.biases : Tensor()),
        grad(o.grad ? *o.grad : Tensor()) {}

  void refuse_forward_mode(const char* op) const {
    for (const Tensor* t : {&w, &scales, &biases, &grad}) {
      TORCH_CHECK_NOT_IMPLEMENTED(
          !t->defined() || !has_tangent(*t), op,
          " must be differentiated in reverse mode, got a forward-mode tangent");
    }
  }

  // Makes whoever differentiates t again fail by name.
  void once_differentiable(const char* op, Tensor& t) const {
    if (!autograd::compute_requires_grad(grad, w, scales, biases)) return;
    autograd::set_history(t, make_node<autograd::NotImplemented>(
                                 op, autograd::collect_next_edges(grad, w, scales, biases)));
  }
};

const Backward kFakeQuantize = {"OneBitFakeQuantizeBackward",
                                [](const variable_list& grads, const Saved& saved, const Needed&) {
                                  return variable_list{call(FakeQuantizeBackward{
                                      grads[0], saved.tensors[0], saved.text, saved.numbers[0]})};
                                }};

// Inputs: w, scales, biases.
const Backward kFakeQuantizeAffine = {
    "OneBitFakeQuantizeAffineBackward",
    [](const variable_list& grads, const Saved& saved, const Needed& needed) {
      const Tensor &grad = grads[0], &w = saved.tensors[0];
      variable_list out(3);
      if (needed[0]) out[0] = grad.to(w.scalar_type());
      if (needed[1] || needed[2]) {
        std::tie(out[1], out[2]) = call(FakeQuantizeAffineBackward{
            grad, w, saved.tensors[1], saved.tensors[2], saved.numbers[0]});
      }
      return out;
    }};

template <class Op>
Tensor fake_quantize_autograd(const LevelOperands& o, Below<Tensor> below) {
  const Inputs in(o);
  in.refuse_forward_mode(Op::kName);
  auto w_hat = below();
  if (!autograd::compute_requires_grad(in.w, in.scales, in.biases)) return w_hat;
  if (o.given()) {
    const Saved saved{{in.w, in.scales, in.biases}, {}, {o.group_size}, {}};
    record(kFakeQuantizeAffine, saved, {&w_hat}, in.w, in.scales, in.biases);
  } else {
    record(kFakeQuantize, {{in.w}, {}, {o.group_size}, std::string(o.rule)}, {&w_hat}, in.w);
  }
  return w_hat;
}

Tensor grad_w_autograd(const LevelOperands& o, Below<Tensor> below) {
  const Inputs in(o);
  in.refuse_forward_mode(FakeQuantizeBackward::kName);
  auto result = below();
  in.once_differentiable(FakeQuantizeBackward::kName, result);
  return result;
}

GradLevels grad_levels_autograd(const LevelOperands& o, Below<GradLevels> below) {
  const Inputs in(o);
  in.refuse_forward_mode(FakeQuantizeAffineBackward::kName);
  auto [of_scales, of_biases] = below();
  in.once_differentiable(FakeQuantizeAffineBackward::kName, of_scales);
  in.once_differentiable(FakeQuantizeAffineBackward::kName, of_biases);
  return {of_scales, of_biases};
}

}  // namespace

TORCH_LIBRARY_IMPL(onebit, ADInplaceOrView, m) {
  define_inplace<FlipBits>(m);
  define_inplace<Descend>(m);
}

TORCH_LIBRARY_IMPL(onebit, Autograd, m) {
  define_autograd<FakeQuantize, fake_quantize_autograd<FakeQuantize>>(m);
  define_autograd<FakeQuantizeAffine, fake_quantize_autograd<FakeQuantizeAffine>>(m);
  define_autograd<FakeQuantizeBackward, grad_w_autograd>(m);
  define_autograd<FakeQuantizeAffineBackward, grad_levels_autograd>(m);
}

}  // namespace onebit

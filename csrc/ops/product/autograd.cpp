// Gradients of products, formulae in docs/format.md. Every backward is made of differentiable
// operators of this library, so gradients of gradients are exact too. Forward mode is simpler: an
// operator is linear in each floating input, so its tangent is a sum of the same operator.
#include "../autograd.h"

#include <ATen/ExpandUtils.h>
#include <ATen/ops/index_add.h>

#include "prepacked.h"
#include "rules.h"

namespace onebit {
namespace {

// The matrix of a product, qmm or gather_qmm, as its backward needs it.
struct Matrix {
  Tensor packed;
  OptionalTensor lhs_indices, rhs_indices;
  int64_t group_size;
  bool transpose;

  explicit Matrix(const Pairs& o)
      : packed(o.packed),
        lhs_indices(o.lhs_indices),
        rhs_indices(o.rhs_indices),
        group_size(o.group_size),
        transpose(o.transpose) {}

  Matrix(const Saved& saved, size_t first)
      : packed(saved.tensors[first]),
        lhs_indices(or_none(saved.tensors[first + 1])),
        rhs_indices(or_none(saved.tensors[first + 2])),
        group_size(saved.numbers[0]),
        transpose(saved.numbers[1] != 0) {}

  bool gathers() const { return lhs_indices || rhs_indices; }

  void save(Saved& saved) const {
    saved.tensors.insert(saved.tensors.end(),
                         {packed, or_undefined(lhs_indices), or_undefined(rhs_indices)});
    saved.numbers = {group_size, transpose};
  }

  Tensor times(const Tensor& x, const Tensor& scales, const OptionalTensor& biases) const {
    return gathers() ? call(GatherQmm{x, packed, scales, biases, lhs_indices, rhs_indices,
                                      group_size, transpose})
                     : call(Qmm{x, packed, scales, biases, group_size, transpose});
  }

  // The gradient of x [sizes] is the product with the other transpose, summed where x was broadcast
  // or gathered more than once.
  Tensor grad_x(const Tensor& grad,
                c10::SymIntArrayRef sizes,
                const Tensor& scales,
                const OptionalTensor& biases) const {
    if (!gathers()) {
      const bool vector = sizes.size() == 1 && packed.dim() > 2;
      const auto rows = vector ? grad.unsqueeze(-2) : grad;
      auto result = call(Qmm{rows, packed, scales, biases, group_size, !transpose});
      if (vector) result = result.squeeze(-2);
      return result.sym_sizes() == sizes ? result : at::sum_to(result, sizes);
    }
    const auto each =
        call(GatherQmm{grad, packed, scales, biases, kAbsent, rhs_indices, group_size, !transpose});
    if (!lhs_indices) return at::sum_to(each, sizes);
    // A matrix of x that was gathered often sums as many terms: in float32 whatever its dtype.
    const auto batch = grad.sym_sizes().slice(0, grad.dim() - 2);
    const auto flat = [matrix = sizes.slice(sizes.size() - 2)](c10::SymIntArrayRef lead) {
      return std::vector<c10::SymInt>{c10::multiply_integers(lead), matrix[0], matrix[1]};
    };
    const auto options = each.options().dtype(sum_type(each));
    return each.new_zeros_symint(flat(sizes.slice(0, sizes.size() - 2)), options)
        .index_add(0, lhs_indices->expand_symint(batch).flatten(),
                   each.to(options.dtype()).reshape_symint(flat(batch)))
        .to(each.scalar_type())
        .reshape_symint(sizes);
  }

  LevelGrads grad_levels(const Tensor& grad, const Tensor& x) const {
    return call(AffineGrad{grad, x, packed, lhs_indices, rhs_indices, group_size, transpose});
  }
};

// Inputs: x, scales, biases. x is saved only for the gradients of scales and biases: a layer that
// trains neither holds no activations.
const Backward kProduct = {
    "OneBitQmmBackward", [](const variable_list& grads, const Saved& saved, const Needed& needed) {
      const Tensor &grad = grads[0], &x = saved.tensors[0], &scales = saved.tensors[1];
      const auto biases = or_none(saved.tensors[2]);
      const Matrix w(saved, 3);
      variable_list out(3);
      if (needed[0]) out[0] = w.grad_x(grad, saved.sizes, scales, biases);
      if (needed[1] || needed[2]) {
        const auto [grad_scales, grad_biases] = w.grad_levels(grad, x);
        const auto of_scales = grad_of_scales(grad_scales, grad_biases, biases.has_value());
        out[1] = of_scales.to(scales.scalar_type());
        if (biases) out[2] = grad_biases.to(scales.scalar_type());
      }
      return out;
    }};

// affine_grad is linear in grad and in x: with (a, b) the gradient of its results,
// <a, grad_scales> + <b, grad_biases> = <grad, product of x with weights a * bit + b>.
// Inputs: grad, x.
const Backward kAffineGrad = {
    "OneBitAffineGradBackward",
    [](const variable_list& grads, const Saved& saved, const Needed& needed) {
      const auto a = grads[0].defined() ? grads[0] : at::zeros_like(grads[1]);
      const auto b = grads[1].defined() ? grads[1] : at::zeros_like(grads[0]);
      const Tensor &grad = saved.tensors[0], &x = saved.tensors[1];
      const Matrix w(saved, 2);
      variable_list out(2);
      if (needed[0]) out[0] = w.times(x, a, b);
      if (needed[1]) out[1] = w.grad_x(grad, x.sym_sizes(), a, b);
      return out;
    }};

Tensor product_autograd(const Operands& o, Below<Tensor> below) {
  const bool records = autograd::compute_requires_grad(o.x, o.scales, or_undefined(o.biases));
  const bool of_levels = has_tangent(o.scales) || has_tangent(o.biases);
  auto y = below();
  if (!records && !of_levels && !has_tangent(o.x)) return y;

  const Matrix w(o);
  if (records) {
    const auto biases = or_undefined(o.biases);
    const bool trains = o.scales.requires_grad() || (o.biases && o.biases->requires_grad());
    Saved saved{{trains ? o.x : Tensor(), o.scales, biases}, o.x.sym_sizes().vec(), {}, {}};
    w.save(saved);
    record(kProduct, saved, {&y}, o.x, o.scales, biases);
  }
  Tensor sum;
  if (has_tangent(o.x)) sum = w.times(tangent(o.x), primal(o.scales), primal(o.biases));
  if (of_levels) {
    const LevelTangents levels(o.scales, o.biases);
    sum = plus(sum, w.times(primal(o.x), levels.scales, levels.biases));
  }
  if (sum.defined()) set_tangent(y, sum);
  return y;
}

// Prepacked weights are bytes: only x has a gradient, through the weights unpacked. Inputs: x.
const Backward kPrepacked = {
    "OneBitQmmPrepackedBackward",
    [](const variable_list& grads, const Saved& saved, const Needed&) {
      const auto& n = saved.numbers;
      const Unprepack w{saved.tensors[0],       n[0], n[1], n[2], at::ScalarType(n[3]),
                        /*symmetric=*/n[4] != 0};
      const auto [packed, scales, all_biases] = call(w);
      const auto biases = w.symmetric ? std::nullopt : OptionalTensor(all_biases);
      return variable_list{call(Qmm{grads[0], packed, scales, biases, w.group_size, false})};
    }};

Tensor prepacked_autograd(const QmmPrepacked& o, Below<Tensor> below) {
  auto y = below();
  if (autograd::compute_requires_grad(o.x)) {
    const Saved saved{
        {o.bytes}, {}, {o.rows, o.columns, o.group_size, int64_t(o.dtype), o.symmetric}, {}};
    record(kPrepacked, saved, {&y}, o.x);
  }
  if (has_tangent(o.x)) set_tangent(y, call(with_x(o, tangent(o.x))));
  return y;
}

QmmPrepackedEach::Result each_autograd(const QmmPrepackedEach& o,
                                       Below<QmmPrepackedEach::Result> below) {
  const bool differentiated = autograd::compute_requires_grad(o.x) || has_tangent(o.x);
  return differentiated ? one_by_one(o) : below();
}

LevelGrads affine_grad_autograd(const AffineGrad& o, Below<LevelGrads> below) {
  auto [of_scales, of_biases] = below();
  const Matrix w(o.pairs());
  if (autograd::compute_requires_grad(o.grad, o.x)) {
    Saved saved{{o.grad, o.x}, {}, {}, {}};
    w.save(saved);
    record(kAffineGrad, saved, {&of_scales, &of_biases}, o.grad, o.x);
  }
  if (has_tangent(o.grad) || has_tangent(o.x)) {
    Tensor scales, biases;
    const auto add = [&](const Tensor& grad, const Tensor& x) {
      const auto [to_scales, to_biases] = w.grad_levels(grad, x);
      scales = plus(scales, to_scales);
      biases = plus(biases, to_biases);
    };
    if (has_tangent(o.grad)) add(tangent(o.grad), primal(o.x));
    if (has_tangent(o.x)) add(primal(o.grad), tangent(o.x));
    set_tangent(of_scales, scales);
    set_tangent(of_biases, biases);
  }
  return {of_scales, of_biases};
}

}  // namespace

TORCH_LIBRARY_IMPL(onebit, Autograd, m) {
  define_autograd<Qmm, product_autograd>(m);
  define_autograd<GatherQmm, product_autograd>(m);
  define_autograd<QmmPrepacked, prepacked_autograd>(m);
  define_autograd<QmmPrepackedEach, each_autograd>(m);
  define_autograd<AffineGrad, affine_grad_autograd>(m);
}

}  // namespace onebit

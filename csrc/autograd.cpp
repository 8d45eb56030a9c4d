// Gradients of the operators, formulae in docs/format.md. Written as the nodes PyTorch generates
// for its own operators, not with torch::autograd::Function: half the call overhead when nothing
// requires grad, and torch.func can go through them. Every backward is made of differentiable
// operators of this library, so gradients of gradients are exact too. Forward mode is simpler: an
// operator is linear in each floating input, so its tangent is a sum of the same operator.
#include <ATen/ExpandUtils.h>
#include <ATen/TensorOperators.h>
#include <ATen/core/Tensor.h>
#include <ATen/ops/index_add.h>
#include <ATen/ops/index_select.h>
#include <ATen/ops/ones.h>
#include <ATen/ops/zeros.h>
#include <ATen/ops/zeros_like.h>

#include <tuple>

#include "autograd.h"
#include "ops.h"

namespace onebit {
namespace {

Tensor or_undefined(const OptionalTensor& t) { return t.value_or(Tensor()); }
OptionalTensor or_none(const Tensor& t) { return t.defined() ? OptionalTensor(t) : std::nullopt; }

// A product, qmm or gather_qmm, as its backward needs it: which weights, which indices.
struct Product {
  Tensor packed;
  OptionalTensor lhs_indices, rhs_indices;
  int64_t group_size;
  bool transpose;

  bool gathers() const { return lhs_indices || rhs_indices; }

  Tensor forward(const Tensor& x, const Tensor& scales, const OptionalTensor& biases) const {
    if (!gathers()) return ops::qmm().call(x, packed, scales, biases, group_size, transpose);
    return ops::gather_qmm().call(x, packed, scales, biases, lhs_indices, rhs_indices, group_size,
                                  transpose, false);
  }

  // The gradient of x [sizes] is the product with the other transpose, summed where x was broadcast
  // or gathered more than once.
  Tensor grad_x(const Tensor& grad,
                c10::SymIntArrayRef sizes,
                const Tensor& scales,
                const OptionalTensor& biases) const {
    if (!gathers()) {
      const bool vector = sizes.size() == 1 && packed.dim() > 2;
      auto result = ops::qmm().call(vector ? grad.unsqueeze(-2) : grad, packed, scales, biases,
                                    group_size, !transpose);
      if (vector) result = result.squeeze(-2);
      return result.sym_sizes() == sizes ? result : at::sum_to(result, sizes);
    }
    const auto each = ops::gather_qmm().call(grad, packed, scales, biases, std::nullopt,
                                             rhs_indices, group_size, !transpose, false);
    if (!lhs_indices) return at::sum_to(each, sizes);
    // A matrix of x that was gathered often sums as many terms: in float32 whatever its dtype.
    const auto batch = grad.sym_sizes().slice(0, grad.dim() - 2);
    const auto flat = [matrix = sizes.slice(sizes.size() - 2)](c10::SymIntArrayRef lead) {
      return std::vector<c10::SymInt>{c10::multiply_integers(lead), matrix[0], matrix[1]};
    };
    const auto options = each.options().dtype(sum_type(each));
    return at::zeros_symint(flat(sizes.slice(0, sizes.size() - 2)), options)
        .index_add(0, lhs_indices->expand_symint(batch).flatten(),
                   each.to(options.dtype()).reshape_symint(flat(batch)))
        .to(each.scalar_type())
        .reshape_symint(sizes);
  }

  std::tuple<Tensor, Tensor> grad_levels(const Tensor& grad, const Tensor& x) const {
    return ops::affine_grad().call(grad, x, packed, lhs_indices, rhs_indices, group_size,
                                   transpose);
  }
};

struct SavedProduct {
  SavedVariable packed, lhs_indices, rhs_indices;
  int64_t group_size = 0;
  bool transpose = true;

  void save(const Product& p) {
    packed = SavedVariable(p.packed, false);
    lhs_indices = SavedVariable(or_undefined(p.lhs_indices), false);
    rhs_indices = SavedVariable(or_undefined(p.rhs_indices), false);
    group_size = p.group_size;
    transpose = p.transpose;
  }
  Product unpack() const {
    return {packed.unpack(), or_none(lhs_indices.unpack()), or_none(rhs_indices.unpack()),
            group_size, transpose};
  }
  void release() {
    packed.reset_data();
    lhs_indices.reset_data();
    rhs_indices.reset_data();
  }
};

// With biases absent they are -scales / 2, so their gradient goes to scales.
Tensor grad_of_scales(const Tensor& grad_scales, const Tensor& grad_biases, bool has_biases) {
  return has_biases ? grad_scales : grad_scales - grad_biases.mul(0.5);
}

// Inputs: x, scales, biases. x is kept only for the gradients of scales and biases: a layer that
// trains neither holds no activations.
struct QmmBackward : autograd::TraceableFunction {
  SavedVariable x, scales, biases;
  SavedProduct product;
  std::vector<c10::SymInt> x_sizes;
  bool has_biases = false;

  std::string name() const override { return "OneBitQmmBackward"; }

  variable_list apply(variable_list&& grads) override {
    std::lock_guard<std::mutex> lock(mutex_);
    variable_list out(3);
    const Tensor& grad = grads[0];
    if (!grad.defined()) return out;
    const auto p = product.unpack();
    const auto scales_ = scales.unpack();
    if (task_should_compute_output(0)) {
      out[0] = p.grad_x(grad, x_sizes, scales_, or_none(biases.unpack()));
    }
    if (task_should_compute_output(1) || task_should_compute_output(2)) {
      const auto [grad_scales, grad_biases] = p.grad_levels(grad, x.unpack());
      out[1] = grad_of_scales(grad_scales, grad_biases, has_biases).to(scales_.scalar_type());
      if (has_biases) out[2] = grad_biases.to(scales_.scalar_type());
    }
    return out;
  }

  void release_variables() override {
    std::lock_guard<std::mutex> lock(mutex_);
    x.reset_data();
    scales.reset_data();
    biases.reset_data();
    product.release();
  }
};

// affine_grad is linear in grad and in x: with (a, b) the gradient of its results,
// <a, grad_scales> + <b, grad_biases> = <grad, product of x with weights a * bit + b>.
// Inputs: grad, x.
struct AffineGradBackward : autograd::TraceableFunction {
  SavedVariable grad, x;
  SavedProduct product;

  std::string name() const override { return "OneBitAffineGradBackward"; }

  variable_list apply(variable_list&& grads) override {
    std::lock_guard<std::mutex> lock(mutex_);
    variable_list out(2);
    if (!grads[0].defined() && !grads[1].defined()) return out;
    const auto a = grads[0].defined() ? grads[0] : at::zeros_like(grads[1]);
    const auto b = grads[1].defined() ? grads[1] : at::zeros_like(grads[0]);
    const auto p = product.unpack();
    const auto x_ = x.unpack();
    if (task_should_compute_output(0)) out[0] = p.forward(x_, a, b);
    if (task_should_compute_output(1)) out[1] = p.grad_x(grad.unpack(), x_.sym_sizes(), a, b);
    return out;
  }

  void release_variables() override {
    std::lock_guard<std::mutex> lock(mutex_);
    grad.reset_data();
    x.reset_data();
    product.release();
  }
};

// dequantize is w_hat = scales * bit + biases: sums of grad over the groups, with and without bit.
// With indices it is embedding: the same of gathered rows. Inputs: scales, biases.
struct DequantizeBackward : autograd::TraceableFunction {
  SavedVariable packed, indices;
  int64_t group_size = 0;
  bool has_biases = false;

  std::string name() const override { return "OneBitDequantizeBackward"; }

  variable_list apply(variable_list&& grads) override {
    std::lock_guard<std::mutex> lock(mutex_);
    variable_list out(2);
    const Tensor& grad = grads[0];
    if (!grad.defined()) return out;
    auto words = packed.unpack();
    if (words.scalar_type() != at::kInt) words = words.view(at::kInt);
    const auto all = levels_shape<c10::SymInt>(words, group_size);
    const auto rows = indices.unpack().defined() ? indices.unpack().reshape(-1) : Tensor();
    if (rows.defined()) words = words.index_select(0, rows);

    const auto sizes = levels_shape<c10::SymInt>(words, group_size);
    const auto options = grad.options().dtype(sum_type(grad));
    const auto bits = ops::dequantize().call(words, at::ones_symint(sizes, options),
                                             at::zeros_symint(sizes, options), group_size);
    std::vector<c10::SymInt> groups(sizes.begin(), sizes.end());
    groups.emplace_back(group_size);
    const auto grad_groups = grad.to(options.dtype()).reshape_symint(groups);
    const auto finish = [&](const Tensor& sum) {
      const auto result =
          rows.defined() ? at::zeros_symint(all, options).index_add(0, rows, sum) : sum;
      return result.to(grad.scalar_type());
    };
    const auto grad_scales = (grad_groups * bits.reshape_symint(groups)).sum(-1);
    const auto grad_biases = grad_groups.sum(-1);
    out[0] = finish(grad_of_scales(grad_scales, grad_biases, has_biases));
    if (has_biases) out[1] = finish(grad_biases);
    return out;
  }

  void release_variables() override {
    std::lock_guard<std::mutex> lock(mutex_);
    packed.reset_data();
    indices.reset_data();
  }
};

Tensor primal(const Tensor& t) { return t._fw_primal(kForwardLevel); }
OptionalTensor primal(const OptionalTensor& t) {
  return t ? OptionalTensor(primal(*t)) : std::nullopt;
}
Tensor tangent(const Tensor& t) { return t._fw_grad(kForwardLevel); }
void set_tangent(const Tensor& t, const Tensor& value) {
  t._set_fw_grad(value, kForwardLevel, /*is_inplace_op=*/false);
}
Tensor plus(const Tensor& sum, const Tensor& term) { return sum.defined() ? sum + term : term; }

// Tangents of scales and biases, either of which may have none.
struct LevelTangents {
  Tensor scales;
  OptionalTensor biases;

  LevelTangents(const Tensor& s, const OptionalTensor& b) {
    const auto or_zeros = [](const Tensor& t) {
      return has_tangent(t) ? tangent(t) : at::zeros_like(primal(t));
    };
    scales = or_zeros(s);
    if (b) biases = or_zeros(*b);
  }
};

void forward_product(const Tensor& y,
                     const Tensor& x,
                     const Tensor& scales,
                     const OptionalTensor& biases,
                     const Product& product) {
  Tensor sum;
  if (has_tangent(x)) sum = product.forward(tangent(x), primal(scales), primal(biases));
  if (has_tangent(scales) || has_tangent(biases)) {
    const LevelTangents levels(scales, biases);
    sum = plus(sum, product.forward(primal(x), levels.scales, levels.biases));
  }
  if (sum.defined()) set_tangent(y, sum);
}

// Records a product y that was computed from x, scales and biases.
void record_product(Tensor& y,
                    const Tensor& x,
                    const Tensor& scales,
                    const OptionalTensor& biases,
                    const Product& product) {
  auto node = make_node<QmmBackward>();
  node->set_next_edges(autograd::collect_next_edges(x, scales, or_undefined(biases)));
  if (scales.requires_grad() || (biases && biases->requires_grad())) {
    node->x = SavedVariable(x, false);
  }
  node->x_sizes = x.sym_sizes().vec();
  node->scales = SavedVariable(scales, false);
  node->biases = SavedVariable(or_undefined(biases), false);
  node->has_biases = biases.has_value();
  node->product.save(product);
  autograd::set_history(y, node);
}

// A product y that was computed below autograd, with what either mode needs of it.
template <class Describe>
Tensor differentiable(Tensor y,
                      const Tensor& x,
                      const Tensor& scales,
                      const OptionalTensor& biases,
                      const Describe& product) {
  if (autograd::compute_requires_grad(x, scales, or_undefined(biases))) {
    record_product(y, x, scales, biases, product());
  }
  if (has_tangent(x) || has_tangent(scales) || has_tangent(biases)) {
    forward_product(y, x, scales, biases, product());
  }
  return y;
}

Tensor qmm_autograd(c10::DispatchKeySet keys,
                    const Tensor& x,
                    const Tensor& packed,
                    const Tensor& scales,
                    const OptionalTensor& biases,
                    int64_t group_size,
                    bool transpose) {
  const auto y = below_autograd(ops::qmm(), keys, x, packed, scales, biases, group_size, transpose);
  return differentiable(y, x, scales, biases, [&] {
    return Product{packed, std::nullopt, std::nullopt, group_size, transpose};
  });
}

Tensor gather_qmm_autograd(c10::DispatchKeySet keys,
                           const Tensor& x,
                           const Tensor& packed,
                           const Tensor& scales,
                           const OptionalTensor& biases,
                           const OptionalTensor& lhs_indices,
                           const OptionalTensor& rhs_indices,
                           int64_t group_size,
                           bool transpose,
                           bool sorted_indices) {
  const auto y = below_autograd(ops::gather_qmm(), keys, x, packed, scales, biases, lhs_indices,
                                rhs_indices, group_size, transpose, sorted_indices);
  return differentiable(y, x, scales, biases, [&] {
    return Product{packed, lhs_indices, rhs_indices, group_size, transpose};
  });
}

std::tuple<Tensor, Tensor> affine_grad_autograd(c10::DispatchKeySet keys,
                                                const Tensor& grad,
                                                const Tensor& x,
                                                const Tensor& packed,
                                                const OptionalTensor& lhs_indices,
                                                const OptionalTensor& rhs_indices,
                                                int64_t group_size,
                                                bool transpose) {
  auto result = below_autograd(ops::affine_grad(), keys, grad, x, packed, lhs_indices, rhs_indices,
                               group_size, transpose);
  if (autograd::compute_requires_grad(grad, x)) {
    auto node = make_node<AffineGradBackward>();
    node->set_next_edges(autograd::collect_next_edges(grad, x));
    node->grad = SavedVariable(grad, false);
    node->x = SavedVariable(x, false);
    node->product.save({packed, lhs_indices, rhs_indices, group_size, transpose});
    autograd::set_history(std::get<0>(result), node);
    autograd::set_history(std::get<1>(result), node);
  }
  if (has_tangent(grad) || has_tangent(x)) {
    const Product product{packed, lhs_indices, rhs_indices, group_size, transpose};
    Tensor scales, biases;
    const auto add = [&](const Tensor& grad_, const Tensor& x_) {
      const auto [of_scales, of_biases] = product.grad_levels(grad_, x_);
      scales = plus(scales, of_scales);
      biases = plus(biases, of_biases);
    };
    if (has_tangent(grad)) add(tangent(grad), primal(x));
    if (has_tangent(x)) add(primal(grad), tangent(x));
    set_tangent(std::get<0>(result), scales);
    set_tangent(std::get<1>(result), biases);
  }
  return result;
}

// Records weights w that were decoded from scales and biases, all rows or those that indices name.
void record_dequantize(Tensor& w,
                       const Tensor& packed,
                       const Tensor& scales,
                       const OptionalTensor& biases,
                       const Tensor& indices,
                       int64_t group_size) {
  auto node = make_node<DequantizeBackward>();
  node->set_next_edges(autograd::collect_next_edges(scales, or_undefined(biases)));
  node->packed = SavedVariable(packed, false);
  node->indices = SavedVariable(indices, false);
  node->group_size = group_size;
  node->has_biases = biases.has_value();
  autograd::set_history(w, node);
}

Tensor dequantize_autograd(c10::DispatchKeySet keys,
                           const Tensor& packed,
                           const Tensor& scales,
                           const OptionalTensor& biases,
                           int64_t group_size) {
  auto w = below_autograd(ops::dequantize(), keys, packed, scales, biases, group_size);
  if (autograd::compute_requires_grad(scales, or_undefined(biases))) {
    record_dequantize(w, packed, scales, biases, Tensor(), group_size);
  }
  if (has_tangent(scales) || has_tangent(biases)) {
    const LevelTangents levels(scales, biases);
    set_tangent(w, ops::dequantize().call(packed, levels.scales, levels.biases, group_size));
  }
  return w;
}

Tensor embedding_autograd(c10::DispatchKeySet keys,
                          const Tensor& indices,
                          const Tensor& packed,
                          const Tensor& scales,
                          const OptionalTensor& biases,
                          int64_t group_size) {
  auto w = below_autograd(ops::embedding(), keys, indices, packed, scales, biases, group_size);
  if (autograd::compute_requires_grad(scales, or_undefined(biases))) {
    record_dequantize(w, packed, scales, biases, indices, group_size);
  }
  if (has_tangent(scales) || has_tangent(biases)) {
    const LevelTangents levels(scales, biases);
    set_tangent(w,
                ops::embedding().call(indices, packed, levels.scales, levels.biases, group_size));
  }
  return w;
}

// Training uses the weights themselves: what is prepacked serves inference.
Tensor qmm_prepacked_autograd(c10::DispatchKeySet keys,
                              const Tensor& x,
                              const Tensor& packed,
                              const Tensor& scales,
                              const OptionalTensor& biases,
                              const Tensor& prepacked,
                              int64_t group_size) {
  if (autograd::compute_requires_grad(x, scales, or_undefined(biases)) || has_tangent(x) ||
      has_tangent(scales) || has_tangent(biases)) {
    return ops::qmm().call(x, packed, scales, biases, group_size, true);
  }
  return below_autograd(ops::qmm_prepacked(), keys, x, packed, scales, biases, prepacked,
                        group_size);
}

// The bits are a step function of w and the levels its extremes: quantize has no useful gradient.
std::tuple<Tensor, Tensor, Tensor> quantize_autograd(c10::DispatchKeySet keys,
                                                     const Tensor& w,
                                                     int64_t group_size) {
  return below_autograd(ops::quantize(), keys, w, group_size);
}

}  // namespace

TORCH_LIBRARY_IMPL(onebit, Autograd, m) {
  m.impl("quantize", &quantize_autograd);
  m.impl("dequantize", &dequantize_autograd);
  m.impl("qmm", &qmm_autograd);
  m.impl("qmm_prepacked", &qmm_prepacked_autograd);
  m.impl("gather_qmm", &gather_qmm_autograd);
  m.impl("embedding", &embedding_autograd);
  m.impl("affine_grad", &affine_grad_autograd);
}

}  // namespace onebit

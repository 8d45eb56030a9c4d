// Products for devices without kernels.
#include "../composite.h"

#include <ATen/ExpandUtils.h>
#include <ATen/TensorOperators.h>
#include <ATen/ops/matmul.h>
#include <ATen/ops/zeros_like.h>
#include <torch/library.h>

#include <tuple>

#include "prepacked.h"
#include "rules.h"

namespace onebit {
namespace {

// The matrices of t [..., a, b] that indices name, or all of them: [..., a, b].
Tensor pick_matrices(const Tensor& t, const OptionalTensor& indices) {
  if (!indices) return t;
  auto sizes = indices->sym_sizes().vec();
  sizes.insert(sizes.end(), {t.sym_size(-2), t.sym_size(-1)});
  return as_matrices(t).index_select(0, indices->reshape(-1)).reshape_symint(sizes);
}

// Sizes may be symbols: compilers trace through it.
Tensor product_composite(const Operands& o) {
  const auto shape = check_product<c10::SymInt>(o);
  if (o.form == Form::kGather) {
    ONEBIT_WARN_SLOW("gather_qmm", o.x);
  } else {
    ONEBIT_WARN_SLOW("qmm", o.x);
  }
  const auto type = sum_type(o.x);
  const auto words = o.packed.scalar_type() == at::kInt ? o.packed : o.packed.view(at::kInt);
  const auto pick = [&](const Tensor& t) { return pick_matrices(t, o.rhs_indices); };
  const auto biases = o.biases ? OptionalTensor(pick(*o.biases)) : std::nullopt;
  const auto w = decode(pick(words), pick(o.scales), biases, o.group_size, type);
  const auto x = pick_matrices(o.x, o.lhs_indices).to(type);
  return at::matmul(x, o.transpose ? w.transpose(-1, -2) : w)
      .to(o.x.scalar_type())
      .reshape_symint(shape.y);
}

std::tuple<Tensor, Tensor> affine_grad_composite(const Tensor& grad,
                                                 const Tensor& x,
                                                 const Tensor& packed,
                                                 const OptionalTensor& lhs_indices,
                                                 const OptionalTensor& rhs_indices,
                                                 int64_t group_size,
                                                 bool transpose) {
  const auto shape =
      check_affine_grad<int64_t>(grad, x, packed, lhs_indices, rhs_indices, group_size, transpose);
  ONEBIT_WARN_SLOW("affine_grad", x);
  const auto type = sum_type(x);
  const bool folds = shape.batch.empty() && !lhs_indices && !rhs_indices && packed.dim() == 2;
  const auto as_matrix = [&](const Tensor& t) {
    return t.dim() == 1 ? t.unsqueeze(0) : folds ? t.flatten(0, -2) : t;
  };
  const auto inputs = as_matrix(pick_matrices(x, lhs_indices)).to(type);
  const auto grads = (folds || x.dim() > 1 ? as_matrix(grad) : grad.unsqueeze(-2)).to(type);
  const auto by_row = transpose ? grads : inputs, by_column = transpose ? inputs : grads;
  // Per output matrix, the sums over groups of its dense gradient; then per matrix of packed.
  const auto dense = at::matmul(by_row.transpose(-1, -2), by_column);
  const auto bits = bits_of(packed, type);
  const auto sum_groups = [&](const Tensor& t) { return split_last(t, group_size).sum(-1); };
  if (!rhs_indices) {
    const auto all = at::sum_to(dense, bits.sizes());
    return {sum_groups(all * bits), sum_groups(all)};
  }
  const auto matrices = as_matrices(bits);
  auto batch = shape.batch;
  batch.insert(batch.end(), {bits.size(-2), bits.size(-1)});
  const auto each = as_matrices(dense.expand(batch));
  const auto index = rhs_indices->expand(at::IntArrayRef(shape.batch)).flatten().to(at::kLong);
  const auto all = at::zeros_like(matrices).index_add(0, index, each).reshape(bits.sizes());
  return {sum_groups(all * bits), sum_groups(all)};
}

// Prepacked weights are of the device that made them: there is no plain form of them.
void refuse_device(const char* name, const Tensor& t) {
  TORCH_CHECK_NOT_IMPLEMENTED(false, name, " must be on a device that prepacks weights (the cpu), ",
                              "got ", t.device().type());
}

Tensor prepack_elsewhere(const Tensor& packed,
                         const Tensor& scales,
                         const OptionalTensor& biases,
                         int64_t group_size) {
  check_prepack<int64_t>(packed, scales, biases, group_size);
  refuse_device("packed", packed);
  return {};
}

Canonical unprepack_elsewhere(const Prepacked& w) {
  check_prepacked(w);
  refuse_device("prepacked", w.bytes);
  return {};
}

Tensor qmm_prepacked_elsewhere(const Tensor& x, const Prepacked& w) {
  check_qmm_prepacked<int64_t>(x, w);
  refuse_device("prepacked", w.bytes);
  return {};
}

}  // namespace

TORCH_LIBRARY_IMPL(onebit, CompositeExplicitAutograd, m) {
  ProductForms<product_composite>::define(m);
  m.impl("prepack", &prepack_elsewhere);
  m.impl("unprepack", &Unprepack<unprepack_elsewhere>::op);
  m.impl("qmm_prepacked", &QmmPrepacked<qmm_prepacked_elsewhere>::op);
  m.impl("affine_grad", &affine_grad_composite);
}

}  // namespace onebit

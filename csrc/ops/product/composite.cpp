// Products for devices without kernels.
#include "../composite.h"

#include <ATen/ExpandUtils.h>
#include <ATen/TensorOperators.h>
#include <ATen/ops/matmul.h>
#include <ATen/ops/zeros_like.h>

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
  if (o.gathered) {
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

LevelGrads affine_grad_composite(const AffineGrad& o) {
  const auto shape = check_affine_grad<c10::SymInt>(o);
  const Tensor &grad = o.grad, &x = o.x, &packed = o.packed;
  const auto &lhs_indices = o.lhs_indices, &rhs_indices = o.rhs_indices;
  ONEBIT_WARN_SLOW("affine_grad", x);
  const auto type = sum_type(x);
  const bool folds = shape.batch.empty() && !lhs_indices && !rhs_indices && packed.dim() == 2;
  const auto as_matrix = [&](const Tensor& t) {
    return t.dim() == 1 ? t.unsqueeze(0) : folds ? t.flatten(0, -2) : t;
  };
  const auto inputs = as_matrix(pick_matrices(x, lhs_indices)).to(type);
  const auto grads = (folds || x.dim() > 1 ? as_matrix(grad) : grad.unsqueeze(-2)).to(type);
  const auto by_row = o.transpose ? grads : inputs, by_column = o.transpose ? inputs : grads;
  // Per output matrix, the sums over groups of its dense gradient; then per matrix of packed.
  const auto dense = at::matmul(by_row.transpose(-1, -2), by_column);
  const auto bits = bits_of(packed, type);
  const auto sum_groups = [&](const Tensor& t) { return split_last(t, o.group_size).sum(-1); };
  if (!rhs_indices) {
    const auto all = at::sum_to(dense, bits.sym_sizes());
    return {sum_groups(all * bits), sum_groups(all)};
  }
  const auto matrices = as_matrices(bits);
  auto batch = shape.batch;
  batch.insert(batch.end(), {bits.sym_size(-2), bits.sym_size(-1)});
  const auto each = as_matrices(dense.expand_symint(batch));
  const auto index = rhs_indices->expand_symint(shape.batch).flatten().to(at::kLong);
  const auto all =
      at::zeros_like(matrices).index_add(0, index, each).reshape_symint(bits.sym_sizes());
  return {sum_groups(all * bits), sum_groups(all)};
}

// Prepacked weights are of the device that made them: there is no plain form of them.
[[noreturn]] void refuse_device(const char* name, const Tensor& t) {
  TORCH_CHECK_NOT_IMPLEMENTED(false, name, " must be on a device that prepacks weights (the cpu), ",
                              "got ", t.device().type());
}

Tensor prepack_elsewhere(const Prepack& o) {
  check_prepack<int64_t>(o);
  refuse_device("packed", o.packed);
}

Canonical unprepack_elsewhere(const Unprepack& w) {
  check_prepacked(w);
  refuse_device("prepacked", w.bytes);
}

Tensor qmm_prepacked_elsewhere(const QmmPrepacked& o) {
  check_qmm_prepacked<int64_t>(o);
  refuse_device("prepacked", o.bytes);
}

}  // namespace

TORCH_LIBRARY_IMPL(onebit, CompositeExplicitAutograd, m) {
  define<Qmm, product_composite>(m);
  define<GatherQmm, product_composite>(m);
  define<Prepack, prepack_elsewhere>(m);
  define<Unprepack, unprepack_elsewhere>(m);
  define<QmmPrepacked, qmm_prepacked_elsewhere>(m);
  define<QmmPrepackedEach, one_by_one>(m);
  define<AffineGrad, affine_grad_composite>(m);
}

}  // namespace onebit

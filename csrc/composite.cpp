// The operators out of plain PyTorch operators, for devices that have no kernels here (CUDA, XPU,
// ...): right, slow, and announced. A backend with kernels never comes here.
#include <ATen/ExpandUtils.h>
#include <ATen/TensorOperators.h>
#include <ATen/core/Tensor.h>
#include <ATen/ops/arange.h>
#include <ATen/ops/full_like.h>
#include <ATen/ops/isnan.h>
#include <ATen/ops/matmul.h>
#include <ATen/ops/where.h>
#include <ATen/ops/zeros.h>
#include <ATen/ops/zeros_like.h>
#include <torch/library.h>

#include <limits>
#include <tuple>

#include "shape.h"

namespace onebit {
namespace {

#define ONEBIT_WARN_SLOW(op, tensor)                                                     \
  TORCH_WARN_ONCE("torch_onebit has no kernel of " op " for ", (tensor).device().type(), \
                  " devices: it runs as plain PyTorch operators, correctly "             \
                  "and slowly")

// [..., k] to [..., k / size, size]; a size of -1 would be ambiguous where t is empty.
Tensor split_last(const Tensor& t, int64_t size) {
  return t.unflatten(-1, {t.size(-1) / size, size});
}
// [..., a, b] to [matrices, a, b].
Tensor as_matrices(const Tensor& t) { return t.dim() == 2 ? t.unsqueeze(0) : t.flatten(0, -3); }

constexpr double kInfinity = std::numeric_limits<double>::infinity();

// Bits [..., words * 32] as numbers of the given dtype.
Tensor bits_of(const Tensor& packed, at::ScalarType dtype) {
  const auto words = packed.scalar_type() == at::kInt ? packed : packed.view(at::kInt);
  const auto shifts = at::arange(kWordBits, words.options());
  return words.unsqueeze(-1).bitwise_right_shift(shifts).bitwise_and(1).flatten(-2).to(dtype);
}

Tensor spread(const Tensor& levels, int64_t group_size) {
  return levels.repeat_interleave(group_size, -1);
}

// scale * bit + bias, rounded as dtype rounds.
Tensor decode(const Tensor& packed,
              const Tensor& scales,
              const OptionalTensor& biases,
              int64_t group_size,
              at::ScalarType dtype) {
  const auto s = scales.to(dtype);
  const auto b = biases ? biases->to(dtype) : s.mul(-0.5);
  return bits_of(packed, dtype).mul(spread(s, group_size)).add(spread(b, group_size));
}

std::tuple<Tensor, Tensor, Tensor> quantize_composite(const Tensor& w, int64_t group_size) {
  const auto shape = check_quantize<int64_t>(w, group_size);
  ONEBIT_WARN_SLOW("quantize", w);
  if (w.numel() == 0) {
    return {at::zeros(shape.packed, w.options().dtype(at::kInt)),
            at::zeros(shape.scales, w.options()), at::zeros(shape.scales, w.options())};
  }
  const auto groups = split_last(w.to(sum_type(w)), group_size);
  const auto nan = at::isnan(groups);
  const auto least = groups.masked_fill(nan, kInfinity).amin(-1, true);
  const auto high = groups.masked_fill(nan, -kInfinity).amax(-1, true);
  // Of equal least values the first gives the sign of a zero.
  const auto is_least = groups.eq(least);
  const auto first = groups.gather(-1, is_least.to(at::kInt).argmax(-1, true));
  const auto low = at::where(is_least.any(-1, true), first, least);
  const auto range = high - low;
  const auto scale = at::where(range.lt(kMinScale), at::full_like(range, kMinScale), range);
  const auto bits = split_last((groups - low).gt(scale.mul(0.5)).flatten(-2), kWordBits);
  const auto shifts = at::arange(kWordBits, bits.options().dtype(at::kLong));
  const auto words = bits.to(at::kLong).bitwise_left_shift(shifts).sum(-1);
  const auto wrapped = at::where(words.ge(int64_t(1) << 31), words - (int64_t(1) << 32), words);
  return {wrapped.to(at::kInt), scale.squeeze(-1).to(w.scalar_type()),
          low.squeeze(-1).to(w.scalar_type())};
}

Tensor dequantize_composite(const Tensor& packed,
                            const Tensor& scales,
                            const OptionalTensor& biases,
                            int64_t group_size) {
  check_dequantize<int64_t>(packed, scales, biases, group_size);
  ONEBIT_WARN_SLOW("dequantize", packed);
  return decode(packed, scales, biases, group_size, scales.scalar_type());
}

Tensor embedding_composite(const Tensor& indices,
                           const Tensor& packed,
                           const Tensor& scales,
                           const OptionalTensor& biases,
                           int64_t group_size) {
  const auto sizes = check_embedding<int64_t>(indices, packed, scales, biases, group_size);
  ONEBIT_WARN_SLOW("embedding", packed);
  const auto words = packed.scalar_type() == at::kInt ? packed : packed.view(at::kInt);
  const auto rows = indices.reshape(-1);
  const auto pick = [&](const Tensor& t) { return t.index_select(0, rows); };
  return decode(pick(words), pick(scales), biases ? OptionalTensor(pick(*biases)) : std::nullopt,
                group_size, scales.scalar_type())
      .reshape(sizes);
}

Tensor product(const Tensor& x, const Tensor& w, bool transpose) {
  const auto y = at::matmul(x.to(sum_type(x)), transpose ? w.transpose(-1, -2) : w);
  return y.to(x.scalar_type());
}

Tensor qmm_composite(const Tensor& x,
                     const Tensor& packed,
                     const Tensor& scales,
                     const OptionalTensor& biases,
                     int64_t group_size,
                     bool transpose) {
  check_qmm<int64_t>(x, packed, scales, biases, group_size, transpose);
  ONEBIT_WARN_SLOW("qmm", x);
  return product(x, decode(packed, scales, biases, group_size, sum_type(x)), transpose);
}

// The matrices of t [..., a, b] that indices name, or all of them: [..., a, b].
Tensor pick_matrices(const Tensor& t, const OptionalTensor& indices) {
  if (!indices) return t;
  auto sizes = indices->sizes().vec();
  sizes.insert(sizes.end(), {t.size(-2), t.size(-1)});
  return as_matrices(t).index_select(0, indices->reshape(-1)).reshape(sizes);
}

Tensor gather_qmm_composite(const Tensor& x,
                            const Tensor& packed,
                            const Tensor& scales,
                            const OptionalTensor& biases,
                            const OptionalTensor& lhs_indices,
                            const OptionalTensor& rhs_indices,
                            int64_t group_size,
                            bool transpose,
                            bool /*sorted_indices*/) {
  const auto shape = check_gather_qmm<int64_t>(x, packed, scales, biases, lhs_indices, rhs_indices,
                                               group_size, transpose);
  ONEBIT_WARN_SLOW("gather_qmm", x);
  const auto words = packed.scalar_type() == at::kInt ? packed : packed.view(at::kInt);
  const auto w = decode(pick_matrices(words, rhs_indices), pick_matrices(scales, rhs_indices),
                        biases ? OptionalTensor(pick_matrices(*biases, rhs_indices)) : std::nullopt,
                        group_size, sum_type(x));
  return product(pick_matrices(x, lhs_indices), w, transpose).reshape(shape.y);
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

}  // namespace

TORCH_LIBRARY_IMPL(onebit, CompositeExplicitAutograd, m) {
  m.impl("quantize", &quantize_composite);
  m.impl("dequantize", &dequantize_composite);
  m.impl("embedding", &embedding_composite);
  m.impl("qmm", &qmm_composite);
  m.impl("gather_qmm", &gather_qmm_composite);
  m.impl("affine_grad", &affine_grad_composite);
}

}  // namespace onebit

// qmm and gather_qmm on MPS: contiguous, plan, encode.
#include <ATen/ops/empty.h>
#include <torch/library.h>

#include "encoder.h"
#include "tensors.h"

namespace onebit::mps {
namespace {

struct Weights {
  const Tensor& packed;
  const Tensor& scales;
  const OptionalTensor& biases;
  int64_t group_size;
  bool transpose;
};

Tensor product(const QmmShape<int64_t>& shape,
               const Tensor& x,
               const Weights& weights,
               const BatchIndices& index,
               bool sorted) {
  const ValueType type = value_type("x", x), levels = value_type("scales", weights.scales);
  auto y = at::empty(shape.y, x.options());
  if (y.numel() == 0) return y;
  if (shape.k == 0) return y.zero_();
  check_count("x", x);
  check_count("packed", weights.packed);
  check_count("the result", y);

  const Product p = {static_cast<uint32_t>(shape.m),
                     static_cast<uint32_t>(shape.n),
                     static_cast<uint32_t>(shape.k),
                     weights.group_size,
                     weights.transpose,
                     index.batches,
                     index.x_matrices,
                     index.w_matrices,
                     index.indexed(),
                     sorted,
                     type,
                     levels,
                     weights.biases.has_value()};
  const ProductPlan plan = plan_product(p, current_gpu());
  const auto biases = weights.biases ? weights.biases->contiguous() : Tensor();
  const auto inputs = [&](const Tensor& out) {
    return c10::SmallVector<Tensor, 8>{
        aligned(x), words_of(weights.packed), weights.scales.contiguous(), biases, out, index.x,
        index.w};
  };
  if (plan.splits == 1) {
    encode(Work{plan.product, inputs(y), &plan.params, sizeof plan.params});
    return y;
  }
  const auto partial = at::empty({int64_t(plan.splits), y.numel()}, x.options().dtype(at::kFloat));
  encode({Work{plan.product, inputs(partial), &plan.params, sizeof plan.params},
          Work{plan.sum, {partial, y}, &plan.sum_params, sizeof plan.sum_params}});
  return y;
}

Tensor qmm_mps(const Tensor& x,
               const Tensor& packed,
               const Tensor& scales,
               const OptionalTensor& biases,
               int64_t group_size,
               bool transpose) {
  const auto shape = check_qmm<int64_t>(x, packed, scales, biases, group_size, transpose);
  return product(shape, x, {packed, scales, biases, group_size, transpose},
                 BatchIndices(shape, x, packed, {}, {}), false);
}

Tensor gather_qmm_mps(const Tensor& x,
                      const Tensor& packed,
                      const Tensor& scales,
                      const OptionalTensor& biases,
                      const OptionalTensor& lhs_indices,
                      const OptionalTensor& rhs_indices,
                      int64_t group_size,
                      bool transpose,
                      bool sorted_indices) {
  const auto shape = check_gather_qmm<int64_t>(x, packed, scales, biases, lhs_indices, rhs_indices,
                                               group_size, transpose);
  return product(shape, x, {packed, scales, biases, group_size, transpose},
                 BatchIndices(shape, x, packed, lhs_indices, rhs_indices), sorted_indices);
}

}  // namespace

TORCH_LIBRARY_IMPL(onebit, MPS, m) {
  m.impl("qmm", &qmm_mps);
  m.impl("gather_qmm", &gather_qmm_mps);
}

}  // namespace onebit::mps

// Which matrices of x and of packed meet in a batch of products: for backends whose kernels read
// them from memory.
#pragma once

#include <ATen/ops/arange.h>

#include "rules.h"

namespace onebit {

inline Tensor words_of(const Tensor& packed) {
  return (packed.scalar_type() == at::kInt ? packed : packed.view(at::kInt)).contiguous();
}

// The given indices, or 0, 1, 2, ... in the shape of the matrices; broadcast over the batch.
inline Tensor batch_index(const OptionalTensor& indices,
                          at::IntArrayRef matrices,
                          at::IntArrayRef batch,
                          const Tensor& like) {
  const auto options = like.options().dtype(at::kLong);
  const auto index = indices
                         ? indices->to(at::kLong)
                         : at::arange(c10::multiply_integers(matrices), options).reshape(matrices);
  return index.expand(batch).contiguous();
}

// Which matrices of x and of packed meet in each output matrix. Undefined when there is one of
// each.
struct BatchIndices {
  Tensor x, w;
  uint32_t batches = 1, x_matrices = 1, w_matrices = 1;

  BatchIndices(const QmmShape<int64_t>& shape,
               const Tensor& x_values,
               const Tensor& packed,
               const OptionalTensor& lhs_indices,
               const OptionalTensor& rhs_indices) {
    if (packed.dim() == 2 && !lhs_indices && !rhs_indices && shape.batch.empty()) return;
    const auto of_x = x_values.sizes().slice(0, std::max<int64_t>(x_values.dim() - 2, 0));
    const auto of_w = packed.sizes().slice(0, packed.dim() - 2);
    x = batch_index(lhs_indices, of_x, shape.batch, x_values);
    w = batch_index(rhs_indices, of_w, shape.batch, x_values);
    batches = static_cast<uint32_t>(x.numel());
    x_matrices = static_cast<uint32_t>(c10::multiply_integers(of_x));
    w_matrices = static_cast<uint32_t>(c10::multiply_integers(of_w));
  }
  bool indexed() const { return x.defined(); }
};

}  // namespace onebit

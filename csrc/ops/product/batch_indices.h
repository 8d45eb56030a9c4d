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

// Without indices the matrix of batch b is most often (b / repeat) % count; what repeat is then.
// 0 when it is no such formula.
inline uint32_t repeat_of(at::IntArrayRef matrices, at::IntArrayRef batch) {
  const int64_t count = c10::multiply_integers(matrices);
  int64_t repeat = 1, inner = 1;
  bool started = false;
  for (size_t i = 0; i < batch.size(); i++) {
    const int64_t size = batch[batch.size() - 1 - i];
    const int64_t own = i < matrices.size() ? matrices[matrices.size() - 1 - i] : 1;
    if (own == size) {
      started = started || size > 1;
      inner *= size;
    } else if (!started) {
      repeat *= size;
    } else if (inner != count) {
      return 0;  // repeats between two of its own dimensions
    }
  }
  return static_cast<uint32_t>(repeat);
}

// Which matrices of x and of packed meet in each output matrix. Undefined when there is one of
// each.
struct BatchIndices {
  Tensor x, w;
  uint32_t batches = 1, x_matrices = 1, w_matrices = 1;
  uint32_t x_repeat = 0, w_repeat = 0;  // where not 0, a formula takes the place of the tensor

  // For kernels that know the formula; the others need a tensor of both.
  enum class Formula { kNo, kYes };

  BatchIndices(const QmmShape<int64_t>& shape, const Pairs& o, Formula formula = Formula::kNo) {
    if (o.packed.dim() == 2 && !o.lhs_indices && !o.rhs_indices && shape.batch.empty()) return;
    const auto of_x = o.x.sizes().slice(0, std::max<int64_t>(o.x.dim() - 2, 0));
    const auto of_w = o.packed.sizes().slice(0, o.packed.dim() - 2);
    if (formula == Formula::kYes) {
      if (!o.lhs_indices) x_repeat = repeat_of(of_x, shape.batch);
      if (!o.rhs_indices) w_repeat = repeat_of(of_w, shape.batch);
    }
    if (x_repeat == 0) x = batch_index(o.lhs_indices, of_x, shape.batch, o.x);
    if (w_repeat == 0) w = batch_index(o.rhs_indices, of_w, shape.batch, o.x);
    indexed_ = true;
    batches = static_cast<uint32_t>(c10::multiply_integers(shape.batch));
    x_matrices = static_cast<uint32_t>(c10::multiply_integers(of_x));
    w_matrices = static_cast<uint32_t>(c10::multiply_integers(of_w));
  }
  bool indexed() const { return indexed_; }

 private:
  bool indexed_ = false;
};

}  // namespace onebit

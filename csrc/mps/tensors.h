// From tensors to what kernels take: checked types and sizes, contiguous, aligned.
#pragma once

#include <ATen/ops/arange.h>

#include "../ops/product/rules.h"
#include "launch_plan.h"

namespace onebit::mps {

inline ValueType value_type(const char* name, at::ScalarType type) {
  TORCH_CHECK_VALUE(type != at::kDouble, name, " must be float32, float16 or bfloat16 on mps, got ",
                    type);
  return type == at::kHalf       ? ValueType::kHalf
         : type == at::kBFloat16 ? ValueType::kBFloat
                                 : ValueType::kFloat;
}
inline ValueType value_type(const char* name, const Tensor& t) {
  return value_type(name, t.scalar_type());
}

// The kernels count elements in 32 bits.
inline void check_count(const char* name, const Tensor& t) {
  constexpr int64_t kLimit = int64_t(1) << 31;
  TORCH_CHECK_VALUE(t.numel() < kLimit, name, " must have fewer than ", kLimit,
                    " elements on mps, got ", t.numel());
}

// Contiguous, and aligned for loads of four elements: a slice such as big[1:] is contiguous and is
// not.
inline Tensor aligned(const Tensor& t) {
  const auto dense = t.contiguous();
  return dense.storage_offset() % 4 == 0 ? dense : dense.clone();
}

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

}  // namespace onebit::mps

// From tensors to what kernels take: checked types and sizes, contiguous, aligned.
#pragma once

#include "../ops/product/batch_indices.h"
#include "../ops/product/rules.h"
#include "launch_plan.h"

namespace onebit::mps {

inline DType dtype_on_mps(const char* name, at::ScalarType type) {
  TORCH_CHECK_VALUE(type != at::kDouble, name, " must be float32, float16 or bfloat16 on mps, got ",
                    type);
  return dtype_of(type);
}
inline DType dtype_on_mps(const char* name, const Tensor& t) {
  return dtype_on_mps(name, t.scalar_type());
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

}  // namespace onebit::mps

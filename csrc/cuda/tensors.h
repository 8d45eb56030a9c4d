// From tensors to what kernels take: contiguous, aligned for 16-byte loads.
#pragma once

#include "../ops/product/batch_indices.h"
#include "launcher.h"

namespace onebit::cuda {

inline uint8_t group_words(int64_t group_size) { return uint8_t(group_size / kWordBits); }

// Contiguous and aligned: a slice such as big[1:] is contiguous and need not be.
inline Tensor aligned(const Tensor& t) {
  const auto dense = t.contiguous();
  return reinterpret_cast<uintptr_t>(dense.const_data_ptr()) % 16 == 0 ? dense : dense.clone();
}
inline OptionalTensor aligned(const OptionalTensor& t) {
  return t ? OptionalTensor(aligned(*t)) : std::nullopt;
}

inline const uint32_t* words(const Tensor& t) {
  return static_cast<const uint32_t*>(t.const_data_ptr());
}
inline uint32_t* mutable_words(const Tensor& t) {
  return static_cast<uint32_t*>(t.mutable_data_ptr());
}
inline const void* data(const OptionalTensor& t) { return t ? t->const_data_ptr() : nullptr; }
inline const int64_t* index_data(const Tensor& t) {
  return t.defined() ? t.const_data_ptr<int64_t>() : nullptr;
}

// float64, and devices without bfloat16 products, have no kernels here.
inline bool has_kernels(const Tensor& t) {
  return t.scalar_type() != at::kDouble && gpu_of(t).architecture >= kOldestArchitecture;
}

}  // namespace onebit::cuda

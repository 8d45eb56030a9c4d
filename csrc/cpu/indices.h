// Index tensors as checked numbers.
#pragma once

#include <ATen/core/Tensor.h>

#include <vector>

#include "../ops/rules.h"

namespace onebit::cpu {

// The values of an int32 or int64 tensor of any strides, in row-major order, each in [0, bound).
inline std::vector<int64_t> read_indices(const char* name, const Tensor& indices, int64_t bound) {
  const auto wide = indices.to(at::kLong).contiguous();
  const auto* data = static_cast<const int64_t*>(wide.const_data_ptr());
  std::vector<int64_t> values(data, data + wide.numel());
  for (const int64_t value : values) {
    TORCH_CHECK_INDEX(value >= 0 && value < bound, name, " must be in [0, ", bound, "), got ",
                      value);
  }
  return values;
}

}  // namespace onebit::cpu

// Decoding, which products of many rows use too.
#pragma once

#include "tensors.h"

namespace onebit::cuda {

// packed as values [..., k] of the given dtype, rounded once.
Tensor decode(const Tensor& packed,
              const Tensor& scales,
              const OptionalTensor& biases,
              int64_t group_size,
              at::ScalarType dtype);

}  // namespace onebit::cuda

// Decoding, which products of many rows use too.
#pragma once

#include "../ops/codec/rules.h"
#include "tensors.h"

namespace onebit::cuda {

// packed as values [..., k] of the given dtype, rounded once.
Tensor decode(const Coded&, at::ScalarType dtype);

}  // namespace onebit::cuda

// One planned product, encoded: what qmm.cpp computes and tensor_tiles.cpp tries out.
#pragma once

#include <ATen/core/Tensor.h>

#include "encoder.h"

namespace onebit::mps {

// As QmmParams says, ready for kernels. biases and indices may be undefined.
struct ProductTensors {
  at::Tensor x, packed, scales, biases{}, x_index{}, w_index{};
};

void encode_product(const ProductPlan& plan, const ProductTensors& tensors, const at::Tensor& y);

}  // namespace onebit::mps

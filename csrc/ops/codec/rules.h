// What quantize, dequantize and embedding accept.
#pragma once

#include "../rules.h"

namespace onebit {

// quantize
// ------------------------------------------------------------------------------------------

template <class Int>
struct QuantizeShape {
  Sizes<Int> packed;  // [..., k / 32]
  Sizes<Int> scales;  // [..., k / group_size]
};

template <class Int>
QuantizeShape<Int> check_quantize(const Tensor& w, int64_t group_size) {
  check_group_size(group_size);
  check_values("w", w);
  TORCH_CHECK_VALUE(w.dim() >= 1, "w must have at least 1 dimension, got ", w.dim());
  const auto sizes = sizes_of<Int>(w);
  TORCH_CHECK_VALUE(equal(sizes.back() % group_size, Int(0)),
                    "w must have a last dimension that is a multiple of group_size ", group_size,
                    ", got ", sizes.back());
  QuantizeShape<Int> shape{sizes, sizes};
  shape.packed.back() = sizes.back() / kWordBits;
  shape.scales.back() = sizes.back() / group_size;
  return shape;
}

// dequantize
// ----------------------------------------------------------------------------------------

template <class Int>
Sizes<Int> check_dequantize(const Tensor& packed,
                            const Tensor& scales,
                            const OptionalTensor& biases,
                            int64_t group_size) {
  const Int columns = check_packed<Int>(packed, group_size, 1);
  check_levels<Int>(scales, biases, packed, group_size);
  auto sizes = sizes_of<Int>(packed);
  sizes.back() = columns;
  return sizes;
}

// embedding
// -----------------------------------------------------------------------------------------

template <class Int>
Sizes<Int> check_embedding(const Tensor& indices,
                           const Tensor& packed,
                           const Tensor& scales,
                           const OptionalTensor& biases,
                           int64_t group_size) {
  const Int columns = check_packed<Int>(packed, group_size, 2);
  TORCH_CHECK_VALUE(packed.dim() == 2, "packed must have 2 dimensions, got ", packed.dim());
  check_levels<Int>(scales, biases, packed, group_size);
  check_indices("indices", indices);
  check_same_device("indices", indices, packed);
  auto sizes = sizes_of<Int>(indices);
  sizes.push_back(columns);
  return sizes;
}

}  // namespace onebit

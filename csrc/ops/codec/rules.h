// What quantize, dequantize and embedding accept.
#pragma once

#include "operands.h"

namespace onebit {

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

// Returns the shape of what is decoded.
template <class Int>
Sizes<Int> check_decode(const Coded& o) {
  const Int columns = check_packed<Int>(o.packed, o.group_size, o.indices ? 2 : 1);
  TORCH_CHECK_VALUE(!o.indices || o.packed.dim() == 2, "packed must have 2 dimensions, got ",
                    o.packed.dim());
  check_levels<Int>(o.scales, o.biases, o.packed, o.group_size);
  auto sizes = sizes_of<Int>(o.packed);
  if (o.indices) {
    check_indices("indices", *o.indices);
    check_same_device("indices", *o.indices, o.packed);
    sizes = sizes_of<Int>(*o.indices);
    sizes.emplace_back();
  }
  sizes.back() = columns;
  return sizes;
}

}  // namespace onebit

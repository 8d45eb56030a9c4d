// What the operator of moments.cpp accepts.
#pragma once

#include "operands.h"

namespace onebit {

template <class Int>
void check_add_products(const AddProducts& o) {
  const auto& [sum, a, b, upper] = o;
  check_dense("sum", sum);
  TORCH_CHECK_VALUE(sum.scalar_type() == at::kFloat, "sum must be float32, got ",
                    sum.scalar_type());
  TORCH_CHECK_VALUE(sum.dim() == 2, "sum must have 2 dimensions, got ", sum.dim());
  TORCH_CHECK_VALUE(sum.is_contiguous(), "sum must be contiguous, got strides ", sum.strides());
  const auto sizes = sizes_of<Int>(sum);
  for (const auto& [name, t] : {std::pair("a", a), std::pair("b", b)}) {
    check_values(name, t);
    TORCH_CHECK_VALUE(t.scalar_type() == at::kBFloat16, name, " must be bfloat16, got ",
                      t.scalar_type());
    check_same_device(name, t, sum);
    TORCH_CHECK_VALUE(t.dim() == 2, name, " must have 2 dimensions, got ", t.dim());
  }
  const Int rows = sizes_of<Int>(a)[0];
  check_sizes<Int>("a", a, {rows, sizes[0]}, " (one column per row of sum)");
  check_sizes<Int>("b", b, {rows, sizes[1]}, " (rows of a, columns of sum)");
  TORCH_CHECK_VALUE(!upper || equal(sizes[0], sizes[1]),
                    "sum must be square for its upper half, got ", sum.sizes());
}

}  // namespace onebit

// What products and their gradient accept.
#pragma once

#include "operands.h"

namespace onebit {

// y[b] = x[...] . w[...]^T per output matrix b. `m` counts the rows of one such matrix.
template <class Int>
struct QmmShape {
  Sizes<Int> y;  // what the operator returns
  Sizes<Int>
      batch;  // output matrices; empty when packed is one matrix and all of x is folded into m
  Int m, n, k;
};

// Broadcast: m, batch and y out of x and packed.
template <class Int>
void broadcast_matrices(const Pairs& o, QmmShape<Int>& shape) {
  const auto x_sizes = sizes_of<Int>(o.x);
  if (o.packed.dim() == 2) {
    shape.m = Int(1);
    for (const Int& size : leading(x_sizes, 1)) shape.m = shape.m * size;
    shape.y = x_sizes;
    shape.y.back() = shape.n;
    return;
  }
  const auto packed_sizes = sizes_of<Int>(o.packed);
  const bool vector = x_sizes.size() == 1;
  shape.m = vector ? Int(1) : x_sizes[x_sizes.size() - 2];
  shape.batch =
      broadcast<Int>("packed", leading(x_sizes, vector ? 1 : 2), leading(packed_sizes, 2));
  shape.y = shape.batch;
  if (!vector) shape.y.push_back(shape.m);
  shape.y.push_back(shape.n);
}

// Gathered: the same.
template <class Int>
void gather_matrices(const Pairs& o, QmmShape<Int>& shape) {
  TORCH_CHECK_VALUE(o.x.dim() >= 2, "x must have at least 2 dimensions, got ", o.x.dim());
  const auto batch = [&](const char* name, const OptionalTensor& indices, const Tensor& source) {
    if (!indices) {
      const auto sizes = sizes_of<Int>(source);
      const auto matrices = leading(sizes, 2);
      return Sizes<Int>(matrices.begin(), matrices.end());
    }
    check_indices(name, *indices);
    check_same_device(name, *indices, o.x);
    return sizes_of<Int>(*indices);
  };
  const auto lhs = batch("lhs_indices", o.lhs_indices, o.x);
  const auto rhs = batch("rhs_indices", o.rhs_indices, o.packed);
  shape.m = sizes_of<Int>(o.x)[o.x.dim() - 2];
  shape.batch = broadcast<Int>("rhs_indices", lhs, rhs);
  shape.y = shape.batch;
  shape.y.push_back(shape.m);
  shape.y.push_back(shape.n);
}

template <class Int>
QmmShape<Int> check_pairs(const Pairs& o) {
  check_values("x", o.x);
  TORCH_CHECK_VALUE(o.x.dim() >= 1, "x must have at least 1 dimension, got ", o.x.dim());
  const Int columns = check_packed<Int>(o.packed, o.group_size, 2);
  check_same_device("packed", o.packed, o.x);
  const Int rows = sizes_of<Int>(o.packed)[o.packed.dim() - 2];
  QmmShape<Int> shape;
  shape.n = o.transpose ? rows : columns;
  shape.k = o.transpose ? columns : rows;
  const Int last = sizes_of<Int>(o.x).back();
  TORCH_CHECK_VALUE(equal(last, shape.k), "x must have a last dimension of ", shape.k,
                    " (the inner dimension of packed with transpose=",
                    o.transpose ? "True" : "False", "), got ", last);
  o.gathered ? gather_matrices<Int>(o, shape) : broadcast_matrices<Int>(o, shape);
  return shape;
}

template <class Int>
QmmShape<Int> check_product(const Operands& o) {
  auto shape = check_pairs<Int>(o);
  check_levels<Int>(o.scales, o.biases, o.packed, o.group_size);
  return shape;
}

// Returns the shape of the product.
template <class Int>
QmmShape<Int> check_affine_grad(const AffineGrad& o) {
  auto shape = check_pairs<Int>(o.pairs());
  check_values("grad", o.grad);
  check_same_device("grad", o.grad, o.x);
  TORCH_CHECK_VALUE(o.grad.scalar_type() == o.x.scalar_type(), "grad must have the dtype of x (",
                    o.x.scalar_type(), "), got ", o.grad.scalar_type());
  check_sizes<Int>("grad", o.grad, shape.y, " (the shape of the product)");
  return shape;
}

}  // namespace onebit

// What products and their gradient accept.
#pragma once

#include "../rules.h"
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

// The part that qmm and gather_qmm share: k and n out of x and packed.
template <class Int>
QmmShape<Int> product_shape(const Tensor& x,
                            const Tensor& packed,
                            int64_t group_size,
                            bool transpose) {
  check_values("x", x);
  TORCH_CHECK_VALUE(x.dim() >= 1, "x must have at least 1 dimension, got ", x.dim());
  const Int columns = check_packed<Int>(packed, group_size, 2);
  check_same_device("packed", packed, x);
  const Int rows = sizes_of<Int>(packed)[packed.dim() - 2];
  QmmShape<Int> shape;
  shape.n = transpose ? rows : columns;
  shape.k = transpose ? columns : rows;
  const Int last = sizes_of<Int>(x).back();
  TORCH_CHECK_VALUE(equal(last, shape.k), "x must have a last dimension of ", shape.k,
                    " (the inner dimension of packed with transpose=", transpose ? "True" : "False",
                    "), got ", last);
  return shape;
}

template <class Int>
QmmShape<Int> qmm_shape(const Tensor& x, const Tensor& packed, int64_t group_size, bool transpose) {
  auto shape = product_shape<Int>(x, packed, group_size, transpose);
  const auto x_sizes = sizes_of<Int>(x);
  if (packed.dim() == 2) {
    shape.m = Int(1);
    for (const Int& size : leading(x_sizes, 1)) shape.m = shape.m * size;
    shape.y = x_sizes;
    shape.y.back() = shape.n;
    return shape;
  }
  const auto packed_sizes = sizes_of<Int>(packed);
  const bool vector = x_sizes.size() == 1;
  shape.m = vector ? Int(1) : x_sizes[x_sizes.size() - 2];
  shape.batch =
      broadcast<Int>("packed", leading(x_sizes, vector ? 1 : 2), leading(packed_sizes, 2));
  shape.y = shape.batch;
  if (!vector) shape.y.push_back(shape.m);
  shape.y.push_back(shape.n);
  return shape;
}

// An index that is not given counts the matrices in order.
template <class Int>
QmmShape<Int> gather_qmm_shape(const Tensor& x,
                               const Tensor& packed,
                               const OptionalTensor& lhs_indices,
                               const OptionalTensor& rhs_indices,
                               int64_t group_size,
                               bool transpose) {
  auto shape = product_shape<Int>(x, packed, group_size, transpose);
  TORCH_CHECK_VALUE(x.dim() >= 2, "x must have at least 2 dimensions, got ", x.dim());
  const auto batch = [&](const char* name, const OptionalTensor& indices, const Tensor& source) {
    if (!indices) {
      const auto sizes = sizes_of<Int>(source);
      const auto matrices = leading(sizes, 2);
      return Sizes<Int>(matrices.begin(), matrices.end());
    }
    check_indices(name, *indices);
    check_same_device(name, *indices, x);
    return sizes_of<Int>(*indices);
  };
  const auto lhs = batch("lhs_indices", lhs_indices, x);
  const auto rhs = batch("rhs_indices", rhs_indices, packed);
  shape.m = sizes_of<Int>(x)[x.dim() - 2];
  shape.batch = broadcast<Int>("rhs_indices", lhs, rhs);
  shape.y = shape.batch;
  shape.y.push_back(shape.m);
  shape.y.push_back(shape.n);
  return shape;
}

template <class Int>
QmmShape<Int> check_qmm(const Tensor& x,
                        const Tensor& packed,
                        const Tensor& scales,
                        const OptionalTensor& biases,
                        int64_t group_size,
                        bool transpose) {
  auto shape = qmm_shape<Int>(x, packed, group_size, transpose);
  check_levels<Int>(scales, biases, packed, group_size);
  return shape;
}

template <class Int>
QmmShape<Int> check_gather_qmm(const Tensor& x,
                               const Tensor& packed,
                               const Tensor& scales,
                               const OptionalTensor& biases,
                               const OptionalTensor& lhs_indices,
                               const OptionalTensor& rhs_indices,
                               int64_t group_size,
                               bool transpose) {
  auto shape = gather_qmm_shape<Int>(x, packed, lhs_indices, rhs_indices, group_size, transpose);
  check_levels<Int>(scales, biases, packed, group_size);
  return shape;
}

template <class Int>
QmmShape<Int> check_product(const Operands& o) {
  if (o.form == Form::kGather) {
    return check_gather_qmm<Int>(o.x, o.packed, o.scales, o.biases, o.lhs_indices, o.rhs_indices,
                                 o.group_size, o.transpose);
  }
  return check_qmm<Int>(o.x, o.packed, o.scales, o.biases, o.group_size, o.transpose);
}

// affine_grad
// ---------------------------------------------------------------------------------------

// The gradients of scales and biases of a product, from x and the gradient of its result: of
// gather_qmm when there is an index, of qmm when there is none. Returns the shape of the product.
template <class Int>
QmmShape<Int> check_affine_grad(const Tensor& grad,
                                const Tensor& x,
                                const Tensor& packed,
                                const OptionalTensor& lhs_indices,
                                const OptionalTensor& rhs_indices,
                                int64_t group_size,
                                bool transpose) {
  auto shape =
      lhs_indices || rhs_indices
          ? gather_qmm_shape<Int>(x, packed, lhs_indices, rhs_indices, group_size, transpose)
          : qmm_shape<Int>(x, packed, group_size, transpose);
  check_values("grad", grad);
  check_same_device("grad", grad, x);
  TORCH_CHECK_VALUE(grad.scalar_type() == x.scalar_type(), "grad must have the dtype of x (",
                    x.scalar_type(), "), got ", grad.scalar_type());
  check_sizes<Int>("grad", grad, shape.y, " (the shape of the product)");
  return shape;
}

}  // namespace onebit

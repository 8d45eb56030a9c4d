// Weights in the order in which the kernels of a device read them: a vector of bytes, opaque to all
// but that device, with what it stands for.
#pragma once

#include <tuple>

#include "../dispatch.h"
#include "../rules.h"

namespace onebit {

struct Prepacked {
  const Tensor& bytes;
  int64_t rows, columns;
  int64_t group_size;
  at::ScalarType dtype;  // of scales and biases
  bool symmetric;        // no biases
};

using Canonical = std::tuple<Tensor, Tensor, Tensor>;  // packed, scales, biases

// The operators in terms of `f`, a function of Prepacked; Keys is c10::DispatchKeySet where it
// wants to know them.
template <auto f, class... Keys>
struct QmmPrepacked {
  static Tensor op(Keys... keys,
                   const Tensor& x,
                   const Tensor& prepacked,
                   int64_t rows,
                   int64_t columns,
                   int64_t group_size,
                   at::ScalarType dtype,
                   bool symmetric) {
    return f(keys..., x, Prepacked{prepacked, rows, columns, group_size, dtype, symmetric});
  }
};

template <auto f>
struct Unprepack {
  static Canonical op(const Tensor& prepacked,
                      int64_t rows,
                      int64_t columns,
                      int64_t group_size,
                      at::ScalarType dtype,
                      bool symmetric) {
    return f(Prepacked{prepacked, rows, columns, group_size, dtype, symmetric});
  }
};

// The operators, through the dispatcher
// -----------------------------------------------------------------------

inline Tensor qmm_prepacked(const Tensor& x, const Prepacked& w);
inline Canonical unprepack(const Prepacked& w);

// run(operator, arguments...)
template <class Run>
Tensor with_qmm_prepacked(const Tensor& x, const Prepacked& w, const Run& run) {
  using Signature = decltype(QmmPrepacked<qmm_prepacked>::op);
  static const auto op = find_op<Signature>("onebit::qmm_prepacked");
  return run(op, x, w.bytes, w.rows, w.columns, w.group_size, w.dtype, w.symmetric);
}

inline Tensor qmm_prepacked(const Tensor& x, const Prepacked& w) {
  return with_qmm_prepacked(
      x, w, [](const auto& op, const auto&... arguments) { return op.call(arguments...); });
}

inline Canonical unprepack(const Prepacked& w) {
  static const auto op = find_op<decltype(Unprepack<unprepack>::op)>("onebit::unprepack");
  return op.call(w.bytes, w.rows, w.columns, w.group_size, w.dtype, w.symmetric);
}

// Their rules
// -----------------------------------------------------------------------------------------------

template <class Int>
void check_prepack(const Tensor& packed,
                   const Tensor& scales,
                   const OptionalTensor& biases,
                   int64_t group_size) {
  check_packed<Int>(packed, group_size, 2);
  TORCH_CHECK_VALUE(packed.dim() == 2, "packed must have 2 dimensions, got ", packed.dim());
  check_levels<Int>(scales, biases, packed, group_size);
  TORCH_CHECK_VALUE(scales.scalar_type() != at::kDouble,
                    "scales must be float32, float16 or bfloat16 to be prepacked, got ",
                    scales.scalar_type());
}

// What can be said of bytes without reading them: the device knows which it made.
inline void check_prepacked(const Prepacked& w) {
  check_dense("prepacked", w.bytes);
  TORCH_CHECK_VALUE(
      w.bytes.scalar_type() == at::kByte && w.bytes.dim() == 1 && w.bytes.is_contiguous(),
      "prepacked must be a contiguous uint8 vector that prepack made, got ", w.bytes.dim(),
      " dimension(s) of ", w.bytes.scalar_type());
  TORCH_CHECK_VALUE(w.rows >= 0, "rows must be at least 0, got ", w.rows);
  check_group_size(w.group_size);
  TORCH_CHECK_VALUE(w.columns >= 0 && w.columns % w.group_size == 0,
                    "columns must be whole groups of ", w.group_size, ", got ", w.columns);
  TORCH_CHECK_VALUE(is_value_type(w.dtype) && w.dtype != at::kDouble,
                    "dtype must be float32, float16 or bfloat16, got ", w.dtype);
}

// Returns the shape of the product.
template <class Int>
Sizes<Int> check_qmm_prepacked(const Tensor& x, const Prepacked& w) {
  check_values("x", x);
  TORCH_CHECK_VALUE(x.dim() >= 1, "x must have at least 1 dimension, got ", x.dim());
  check_prepacked(w);
  check_same_device("prepacked", w.bytes, x);
  auto sizes = sizes_of<Int>(x);
  TORCH_CHECK_VALUE(equal(sizes.back(), Int(w.columns)), "x must have a last dimension of ",
                    w.columns, " (the columns of prepacked), got ", sizes.back());
  sizes.back() = Int(w.rows);
  return sizes;
}

}  // namespace onebit

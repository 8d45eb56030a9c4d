// Weights in the order in which the kernels of a device read them: a vector of bytes, opaque to all
// but that device, with what it stands for.
#pragma once

#include "../dispatch.h"

namespace onebit {

using Canonical = std::tuple<Tensor, Tensor, Tensor>;  // packed, scales, biases

struct Prepack {
  static constexpr const char* kName = "onebit::prepack";
  using Result = Tensor;
  const Tensor& packed;
  const Tensor& scales;
  const OptionalTensor& biases;
  int64_t group_size;
  auto fields() const { return std::tie(packed, scales, biases, group_size); }
};

struct Unprepack {
  static constexpr const char* kName = "onebit::unprepack";
  using Result = Canonical;
  const Tensor& bytes;
  int64_t rows, columns;
  int64_t group_size;
  at::ScalarType dtype;  // of scales and biases
  bool symmetric;        // no biases
  auto fields() const { return std::tie(bytes, rows, columns, group_size, dtype, symmetric); }
};

struct QmmPrepacked {
  static constexpr const char* kName = "onebit::qmm_prepacked";
  using Result = Tensor;
  const Tensor& x;
  const Tensor& bytes;  // these as of Unprepack
  int64_t rows, columns;
  int64_t group_size;
  at::ScalarType dtype;
  bool symmetric;
  auto fields() const { return std::tie(x, bytes, rows, columns, group_size, dtype, symmetric); }
  Unprepack weights() const { return {bytes, rows, columns, group_size, dtype, symmetric}; }
};

// One x times two or three matrices of one form, which differ in rows alone. Three results, the
// last empty where there is no third matrix: a compiler calls what has a fixed number of them
// without Python.
struct QmmPrepackedEach {
  static constexpr const char* kName = "onebit::qmm_prepacked_each";
  using Result = std::tuple<Tensor, Tensor, Tensor>;
  const Tensor& x;
  at::TensorList bytes;
  at::IntArrayRef rows;
  int64_t columns;
  int64_t group_size;
  at::ScalarType dtype;
  bool symmetric;
  auto fields() const { return std::tie(x, bytes, rows, columns, group_size, dtype, symmetric); }
  QmmPrepacked product(size_t i) const {
    return {x, bytes[i], rows[i], columns, group_size, dtype, symmetric};
  }
};

template <class Int>
void check_prepack(const Prepack& o) {
  const auto& [packed, scales, biases, group_size] = o;
  check_packed<Int>(packed, group_size, 2);
  TORCH_CHECK_VALUE(packed.dim() == 2, "packed must have 2 dimensions, got ", packed.dim());
  check_levels<Int>(scales, biases, packed, group_size);
  TORCH_CHECK_VALUE(scales.scalar_type() != at::kDouble,
                    "scales must be float32, float16 or bfloat16 to be prepacked, got ",
                    scales.scalar_type());
}

// What can be said of bytes without reading them: the device knows which it made.
inline void check_prepacked(const Unprepack& w) {
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
Sizes<Int> check_qmm_prepacked(const QmmPrepacked& o) {
  const Tensor& x = o.x;
  const auto w = o.weights();
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

inline void check_each(const QmmPrepackedEach& o) {
  TORCH_CHECK_VALUE(o.bytes.size() == 2 || o.bytes.size() == 3,
                    "prepacked must be 2 or 3 prepacked weights, got ", o.bytes.size());
  TORCH_CHECK_VALUE(o.rows.size() == o.bytes.size(), "rows must be one number for each of the ",
                    o.bytes.size(), " prepacked weights, got ", o.rows.size());
}

// f of every product, in order.
template <class F>
QmmPrepackedEach::Result map_each(const QmmPrepackedEach& o, const F& f) {
  check_each(o);
  auto first = f(o.product(0)), second = f(o.product(1));
  auto third = o.bytes.size() == 3 ? f(o.product(2)) : at::empty({0}, o.x.options());
  return {std::move(first), std::move(second), std::move(third)};
}

inline QmmPrepackedEach::Result one_by_one(const QmmPrepackedEach& o) {
  return map_each(o, [](const QmmPrepacked& product) { return call(product); });
}

}  // namespace onebit

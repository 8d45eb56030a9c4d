// What the rules of every operator are made of: rules.h of its folder says what the operator
// accepts and the shape of what it returns.
//
// Every backend and the Meta kernels call the rules, so an illegal call reads the same everywhere.
// `Int` is int64_t where tensors have data and c10::SymInt under fake tensors; a rule never
// compares the number of rows of x with a constant, so one compiled graph serves them all.
#pragma once

#include <ATen/EmptyTensor.h>
#include <ATen/core/Tensor.h>
#include <c10/core/SymInt.h>
#include <c10/util/Exception.h>
#include <c10/util/SmallVector.h>

#include <optional>
#include <type_traits>

#include "../format.h"

namespace onebit {

using at::Tensor;
using OptionalTensor = std::optional<Tensor>;

template <class Int>
using Sizes = c10::SmallVector<Int, 6>;

template <class Int>
Sizes<Int> sizes_of(const Tensor& t) {
  if constexpr (std::is_same_v<Int, int64_t>) {
    return Sizes<Int>(t.sizes().begin(), t.sizes().end());
  } else {
    return Sizes<Int>(t.sym_sizes().begin(), t.sym_sizes().end());
  }
}

inline bool equal(int64_t a, int64_t b) { return a == b; }
inline bool equal(const c10::SymInt& a, const c10::SymInt& b) {
  return a.sym_eq(b).expect_true(__FILE__, __LINE__);
}

template <class Int>
c10::ArrayRef<Int> leading(const Sizes<Int>& sizes, size_t drop) {
  return c10::ArrayRef<Int>(sizes.data(), sizes.size() - drop);
}

// The two kinds of tensor that one product mixes
// ---------------------------------------------------

inline bool is_value_type(at::ScalarType type) {
  return type == at::kFloat || type == at::kHalf || type == at::kBFloat16 || type == at::kDouble;
}

inline DType dtype_of(at::ScalarType value_type) {
  return value_type == at::kHalf       ? DType::kHalf
         : value_type == at::kBFloat16 ? DType::kBFloat16
         : value_type == at::kDouble   ? DType::kDouble
                                       : DType::kFloat;
}
inline DType dtype_of(const Tensor& t) { return dtype_of(t.scalar_type()); }

// PyTorch checks strides against the storage when it makes a view, not when the storage is freed or
// shrinks afterwards (untyped_storage().resize_); a kernel would read what is no longer there.
// Tensors without data, or that stand for others, have nothing to check.
inline void check_storage(const char* name, const Tensor& t) {
  const auto* impl = t.unsafeGetTensorImpl();
  if (!impl->has_storage() || impl->has_symbolic_sizes_strides() || impl->is_meta() ||
      impl->key_set().has(c10::DispatchKey::Python)) {
    return;
  }
  const size_t needed = at::detail::computeStorageNbytes(t.sizes(), t.strides(), t.itemsize(),
                                                         size_t(t.storage_offset()));
  TORCH_CHECK_VALUE(needed <= impl->unsafe_storage().nbytes(), name,
                    " must lie within its storage (", impl->unsafe_storage().nbytes(),
                    " bytes), got strides ", t.strides(), " that reach byte ", needed);
}

inline void check_dense(const char* name, const Tensor& t) {
  TORCH_CHECK_TYPE(t.defined(), name, " must be a tensor, got None");
  TORCH_CHECK_VALUE(t.layout() == at::kStrided, name, " must be a dense tensor, got layout ",
                    t.layout());
  check_storage(name, t);
}

inline void check_values(const char* name, const Tensor& t) {
  check_dense(name, t);
  TORCH_CHECK_VALUE(is_value_type(t.scalar_type()), name,
                    " must be float32, float16, bfloat16 or float64, got ", t.scalar_type());
}

inline void check_indices(const char* name, const Tensor& t) {
  check_dense(name, t);
  TORCH_CHECK_VALUE(t.scalar_type() == at::kInt || t.scalar_type() == at::kLong, name,
                    " must be int32 or int64, got ", t.scalar_type());
}

inline void check_same_device(const char* name, const Tensor& t, const Tensor& x) {
  TORCH_CHECK_VALUE(t.device() == x.device(), name, " must be on ", x.device(),
                    " as the others, got ", t.device());
}

inline void check_group_size(int64_t group_size) {
  TORCH_CHECK_VALUE(is_group_size(group_size), "group_size must be 32, 64 or 128, got ",
                    group_size);
}

template <class Int>
void check_sizes(const char* name,
                 const Tensor& t,
                 const Sizes<Int>& expected,
                 const char* reason) {
  const auto got = sizes_of<Int>(t);
  bool same = got.size() == expected.size();
  for (size_t d = 0; same && d < got.size(); ++d) same = equal(got[d], expected[d]);
  TORCH_CHECK_VALUE(same, name, " must have shape ", c10::ArrayRef<Int>(expected), reason, ", got ",
                    c10::ArrayRef<Int>(got));
}

// packed [..., rows, columns / 32]. Returns columns.
template <class Int>
Int check_packed(const Tensor& packed, int64_t group_size, int64_t min_dim) {
  check_group_size(group_size);
  check_dense("packed", packed);
  TORCH_CHECK_VALUE(packed.scalar_type() == at::kInt || packed.scalar_type() == at::kUInt32,
                    "packed must be int32 or uint32, got ", packed.scalar_type());
  TORCH_CHECK_VALUE(packed.dim() >= min_dim, "packed must have at least ", min_dim,
                    min_dim == 1 ? " dimension, got " : " dimensions, got ", packed.dim());
  const Int words = sizes_of<Int>(packed).back();
  TORCH_CHECK_VALUE(equal(words * kWordBits % group_size, Int(0)),
                    "packed must have a last dimension of whole groups (", group_size / kWordBits,
                    " words each), got ", words);
  return words * kWordBits;
}

// scales and biases of packed [..., words] are [..., words * 32 / group_size].
template <class Int>
Sizes<Int> levels_shape(const Tensor& packed, int64_t group_size) {
  auto sizes = sizes_of<Int>(packed);
  sizes.back() = sizes.back() * kWordBits / group_size;
  return sizes;
}

template <class Int>
void check_levels(const Tensor& scales,
                  const OptionalTensor& biases,
                  const Tensor& packed,
                  int64_t group_size) {
  const auto expected = levels_shape<Int>(packed, group_size);
  check_values("scales", scales);
  check_same_device("scales", scales, packed);
  check_sizes<Int>("scales", scales, expected, " (one per group of packed)");
  if (!biases) return;
  check_values("biases", *biases);
  TORCH_CHECK_VALUE(biases->scalar_type() == scales.scalar_type(),
                    "biases must have the dtype of scales (", scales.scalar_type(), "), got ",
                    biases->scalar_type());
  check_same_device("biases", *biases, packed);
  check_sizes<Int>("biases", *biases, expected, " (one per group of packed)");
}

template <class Int>
Sizes<Int> broadcast(const char* name, c10::ArrayRef<Int> a, c10::ArrayRef<Int> b) {
  Sizes<Int> out(std::max(a.size(), b.size()), Int(1));
  for (size_t i = 0; i < out.size(); ++i) {  // i counts dimensions from the last one
    const Int one(1);
    const Int& size_a = i < a.size() ? a[a.size() - 1 - i] : one;
    const Int& size_b = i < b.size() ? b[b.size() - 1 - i] : one;
    const bool take_b = size_a == 1;
    TORCH_CHECK_VALUE(take_b || size_b == 1 || equal(size_a, size_b), name,
                      " must broadcast against ", a, ", got ", b);
    out[out.size() - 1 - i] = take_b ? size_b : size_a;
  }
  return out;
}

// Gradients are summed and returned in float, whatever the dtype of x; double stays double.
inline at::ScalarType sum_type(const Tensor& x) {
  return x.scalar_type() == at::kDouble ? at::kDouble : at::kFloat;
}

}  // namespace onebit

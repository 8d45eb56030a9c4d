// What a product reads. qmm, gather_qmm and qmm_prepacked are forms of one product: each layer,
// from autocast to the kernels, is one function of Operands.
#pragma once

#include <torch/library.h>

#include "../dispatch.h"
#include "../rules.h"

namespace onebit {

enum class Form { kQmm, kGather, kPrepacked };

inline const OptionalTensor kAbsent;

struct Operands {
  Form form;
  const Tensor& x;
  const Tensor& packed;
  const Tensor& scales;
  const OptionalTensor& biases;
  int64_t group_size;
  bool transpose = true;
  const OptionalTensor& lhs_indices = kAbsent;  // kGather
  const OptionalTensor& rhs_indices = kAbsent;
  bool sorted_indices = false;
  const Tensor* prepacked = nullptr;  // kPrepacked

  Operands with_x(const Tensor& other) const {
    return {form,      other,       packed,      scales,         biases,   group_size,
            transpose, lhs_indices, rhs_indices, sorted_indices, prepacked};
  }
};

// The public operators in terms of `f`, a function of Operands; Keys is c10::DispatchKeySet where f
// wants to know them.
template <auto f, class... Keys>
struct ProductForms {
  static Tensor qmm(Keys... keys,
                    const Tensor& x,
                    const Tensor& packed,
                    const Tensor& scales,
                    const OptionalTensor& biases,
                    int64_t group_size,
                    bool transpose) {
    return f(keys..., Operands{Form::kQmm, x, packed, scales, biases, group_size, transpose});
  }

  static Tensor gather_qmm(Keys... keys,
                           const Tensor& x,
                           const Tensor& packed,
                           const Tensor& scales,
                           const OptionalTensor& biases,
                           const OptionalTensor& lhs_indices,
                           const OptionalTensor& rhs_indices,
                           int64_t group_size,
                           bool transpose,
                           bool sorted_indices) {
    return f(keys..., Operands{Form::kGather, x, packed, scales, biases, group_size, transpose,
                               lhs_indices, rhs_indices, sorted_indices});
  }

  static Tensor qmm_prepacked(Keys... keys,
                              const Tensor& x,
                              const Tensor& packed,
                              const Tensor& scales,
                              const OptionalTensor& biases,
                              const Tensor& prepacked,
                              int64_t group_size) {
    return f(keys..., Operands{Form::kPrepacked, x, packed, scales, biases, group_size, true,
                               kAbsent, kAbsent, false, &prepacked});
  }

  // A device that has nothing prepacked leaves that form to the composite.
  static void define(torch::Library& m, bool prepacked) {
    m.impl("qmm", &qmm);
    m.impl("gather_qmm", &gather_qmm);
    if (prepacked) m.impl("qmm_prepacked", &qmm_prepacked);
  }
};

inline Tensor product(const Operands& o);

// run(operator, arguments...) of the public operator that the operands belong to.
template <class Run>
Tensor with_operator(const Operands& o, const Run& run) {
  using Signatures = ProductForms<product>;
  switch (o.form) {
    case Form::kGather: {
      static const auto op = find_op<decltype(Signatures::gather_qmm)>("onebit::gather_qmm");
      return run(op, o.x, o.packed, o.scales, o.biases, o.lhs_indices, o.rhs_indices, o.group_size,
                 o.transpose, o.sorted_indices);
    }
    case Form::kPrepacked: {
      static const auto op = find_op<decltype(Signatures::qmm_prepacked)>("onebit::qmm_prepacked");
      return run(op, o.x, o.packed, o.scales, o.biases, *o.prepacked, o.group_size);
    }
    case Form::kQmm:
      break;
  }
  static const auto op = find_op<decltype(Signatures::qmm)>("onebit::qmm");
  return run(op, o.x, o.packed, o.scales, o.biases, o.group_size, o.transpose);
}

// The product, through the dispatcher.
inline Tensor product(const Operands& o) {
  return with_operator(o, [](const auto& op, const auto&... args) { return op.call(args...); });
}

}  // namespace onebit

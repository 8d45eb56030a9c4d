// What a product reads. qmm and gather_qmm are forms of one product: each layer, from autocast to
// the kernels, is one function of Operands. The product with prepacked weights has prepacked.h.
#pragma once

#include <torch/library.h>

#include "../dispatch.h"
#include "../rules.h"

namespace onebit {

enum class Form { kQmm, kGather };

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

  Operands with_x(const Tensor& other) const {
    return {form,       other,     packed,      scales,      biases,
            group_size, transpose, lhs_indices, rhs_indices, sorted_indices};
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

  static void define(torch::Library& m) {
    m.impl("qmm", &qmm);
    m.impl("gather_qmm", &gather_qmm);
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

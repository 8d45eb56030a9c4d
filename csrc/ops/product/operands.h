// What products and their gradient read. qmm and gather_qmm are forms of one product: each layer,
// from autograd to the kernels, is one function of Operands. prepacked.h has the product with
// prepacked weights.
#pragma once

#include "../dispatch.h"

namespace onebit {

inline const OptionalTensor kAbsent;

// Which matrices of x meet which of packed: those that broadcast, as in torch.matmul; or those that
// are gathered, where an index that is absent counts them in order.
struct Pairs {
  const Tensor& x;
  const Tensor& packed;
  int64_t group_size;
  bool transpose = true;
  bool gathered = false;
  const OptionalTensor& lhs_indices = kAbsent;
  const OptionalTensor& rhs_indices = kAbsent;
};

struct Operands : Pairs {
  const Tensor& scales;
  const OptionalTensor& biases;
  bool sorted_indices = false;
};

struct Qmm {
  static constexpr const char* kName = "onebit::qmm";
  using Result = Tensor;
  const Tensor& x;
  const Tensor& packed;
  const Tensor& scales;
  const OptionalTensor& biases;
  int64_t group_size;
  bool transpose = true;
  auto fields() const { return std::tie(x, packed, scales, biases, group_size, transpose); }
  operator Operands() const { return {{x, packed, group_size, transpose}, scales, biases}; }
};

struct GatherQmm {
  static constexpr const char* kName = "onebit::gather_qmm";
  using Result = Tensor;
  const Tensor& x;
  const Tensor& packed;
  const Tensor& scales;
  const OptionalTensor& biases;
  const OptionalTensor& lhs_indices;
  const OptionalTensor& rhs_indices;
  int64_t group_size;
  bool transpose;
  bool sorted_indices = false;
  auto fields() const {
    return std::tie(x, packed, scales, biases, lhs_indices, rhs_indices, group_size, transpose,
                    sorted_indices);
  }
  operator Operands() const {
    return {{x, packed, group_size, transpose, true, lhs_indices, rhs_indices},
            scales,
            biases,
            sorted_indices};
  }
};

// The gradients of scales and biases, from x and the gradient of the result.
using LevelGrads = std::tuple<Tensor, Tensor>;

struct AffineGrad {
  static constexpr const char* kName = "onebit::affine_grad";
  using Result = LevelGrads;
  const Tensor& grad;
  const Tensor& x;
  const Tensor& packed;
  const OptionalTensor& lhs_indices;  // of gather_qmm; it was qmm when there is none
  const OptionalTensor& rhs_indices;
  int64_t group_size;
  bool transpose;
  auto fields() const {
    return std::tie(grad, x, packed, lhs_indices, rhs_indices, group_size, transpose);
  }
  Pairs pairs() const {
    return {x, packed, group_size, transpose, lhs_indices || rhs_indices, lhs_indices, rhs_indices};
  }
};

}  // namespace onebit

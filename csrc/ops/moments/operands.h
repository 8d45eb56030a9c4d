// What the operator of moments reads.
#pragma once

#include "../dispatch.h"
#include "../rules.h"

namespace onebit {

// sum [n, k], a [m, n], b [m, k].
struct ProductOperands {
  Tensor& sum;
  const Tensor& a;
  const Tensor& b;
  bool upper;
};

struct AddProducts {
  static constexpr const char* kName = "onebit::add_products_";
  using Signature = void(Tensor&, const Tensor&, const Tensor&, bool);
  static ProductOperands operands(Tensor& sum, const Tensor& a, const Tensor& b, bool upper) {
    return {sum, a, b, upper};
  }
};

}  // namespace onebit

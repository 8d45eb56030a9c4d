// What the operator of moments reads.
#pragma once

#include "../dispatch.h"

namespace onebit {

struct AddProducts {
  static constexpr const char* kName = "onebit::add_products_";
  using Result = void;
  Tensor& sum;      // [n, k]
  const Tensor& a;  // [m, n]
  const Tensor& b;  // [m, k]
  bool upper;
  auto fields() const { return std::tie(sum, a, b, upper); }
};

}  // namespace onebit

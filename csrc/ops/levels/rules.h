// What the operators of levels.cpp accept.
#pragma once

#include <string_view>

#include "../codec/rules.h"
#include "operands.h"

namespace onebit {

inline Rule rule_of(std::string_view name) {
  if (name == "minmax") return Rule::kMinMax;
  if (name == "sign") return Rule::kSign;
  if (name == "mean") return Rule::kMean;
  TORCH_CHECK_VALUE(name == "optimal", "rule must be minmax, sign, mean or optimal, got ", name);
  return Rule::kOptimal;
}

// importance is one value per column of w, or one per value of w.
template <class Int>
void check_importance(const Tensor& importance, const Tensor& w, std::string_view rule) {
  TORCH_CHECK_VALUE(rule == "sign" || rule == "optimal",
                    "rule must be sign or optimal when importance is given, got ", rule);
  check_values("importance", importance);
  check_same_device("importance", importance, w);
  const auto sizes = sizes_of<Int>(w);
  const Sizes<Int> columns{sizes.back()};
  if (importance.dim() == 1) {
    check_sizes<Int>("importance", importance, columns, " (one per column of w)");
  } else {
    check_sizes<Int>("importance", importance, sizes, " (as w)");
  }
}

// Returns the shape of what quantize_levels returns.
template <class Int>
QuantizeShape<Int> check_choice(const LevelOperands& o) {
  const auto shape = check_quantize<Int>(o.w, o.group_size);
  if (o.given()) {
    for (const auto& [name, t] : {std::pair("scales", o.scales), std::pair("biases", o.biases)}) {
      check_values(name, *t);
      check_same_device(name, *t, o.w);
      check_sizes<Int>(name, *t, shape.scales, " (one per group of w)");
    }
    TORCH_CHECK_VALUE(o.biases->scalar_type() == o.scales->scalar_type(),
                      "biases must have the dtype of scales (", o.scales->scalar_type(), "), got ",
                      o.biases->scalar_type());
  } else {
    rule_of(o.rule);
  }
  if (o.importance) check_importance<Int>(*o.importance, o.w, o.rule);
  TORCH_CHECK_VALUE(!o.dtype || is_value_type(*o.dtype),
                    "dtype must be float32, float16, bfloat16 or float64, got ", *o.dtype);
  if (o.grad) {
    check_values("grad", *o.grad);
    check_same_device("grad", *o.grad, o.w);
    check_sizes<Int>("grad", *o.grad, sizes_of<Int>(o.w), " (as w)");
  }
  return shape;
}

// Operands of coordinate descent, whichever they are.
template <class Int, class Operands>
void check_descent(const Operands& o) {
  const auto &bits = o.bits, &error = o.error;
  const int64_t group_size = o.group_size;
  check_group_size(group_size);
  check_dense("bits", bits);
  TORCH_CHECK_VALUE(bits.scalar_type() == at::kBool, "bits must be bool, got ", bits.scalar_type());
  TORCH_CHECK_VALUE(bits.dim() == 2, "bits must have 2 dimensions, got ", bits.dim());
  TORCH_CHECK_VALUE(bits.is_contiguous(), "bits must be contiguous, got strides ", bits.strides());
  const auto sizes = sizes_of<Int>(bits);
  TORCH_CHECK_VALUE(equal(sizes[1] % group_size, Int(0)),
                    "bits must have a last dimension that is a multiple of group_size ", group_size,
                    ", got ", sizes[1]);
  check_values("error", error);  // the others are compared with it
  for (const auto& [name, t] : {std::pair("error", error), std::pair("scales", o.scales),
                                std::pair("moments", o.moments)}) {
    check_values(name, t);
    TORCH_CHECK_VALUE(t.scalar_type() == at::kFloat || t.scalar_type() == at::kDouble, name,
                      " must be float32 or float64, got ", t.scalar_type());
    TORCH_CHECK_VALUE(t.scalar_type() == error.scalar_type(), name,
                      " must have the dtype of error (", error.scalar_type(), "), got ",
                      t.scalar_type());
    check_same_device(name, t, bits);
  }
  check_sizes<Int>("error", error, sizes, " (as bits)");
  check_sizes<Int>("scales", o.scales, {sizes[0], sizes[1] / group_size},
                   " (one per group of bits)");
  check_sizes<Int>("moments", o.moments, {sizes[1], sizes[1]},
                   " (a square of the columns of bits)");
}

// Returns [n, end - begin].
template <class Int>
Sizes<Int> check_flip_bits(const FlipBits& o) {
  check_descent<Int>(o);
  const auto sizes = sizes_of<Int>(o.bits);
  TORCH_CHECK_VALUE(0 <= o.begin && o.begin < o.end && o.end <= sizes[1],
                    "begin and end must lie in order within the columns of bits (", sizes[1],
                    "), got ", o.begin, " and ", o.end);
  return {sizes[0], Int(o.end - o.begin)};
}

// Returns [n].
template <class Int>
Sizes<Int> check_descend(const Descend& o) {
  check_descent<Int>(o);
  TORCH_CHECK_VALUE(o.sweeps >= 1, "sweeps must be at least 1, got ", o.sweeps);
  return {sizes_of<Int>(o.bits)[0]};
}

}  // namespace onebit

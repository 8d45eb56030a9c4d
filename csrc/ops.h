// Typed handles to the operators, for C++ that calls one through the dispatcher.
#pragma once

#include <ATen/core/dispatch/Dispatcher.h>

#include <tuple>

#include "shape.h"

namespace onebit::ops {

using QmmSignature =
    Tensor(const Tensor&, const Tensor&, const Tensor&, const OptionalTensor&, int64_t, bool);
using QmmPrepackedSignature = Tensor(
    const Tensor&, const Tensor&, const Tensor&, const OptionalTensor&, const Tensor&, int64_t);
using GatherQmmSignature = Tensor(const Tensor&,
                                  const Tensor&,
                                  const Tensor&,
                                  const OptionalTensor&,
                                  const OptionalTensor&,
                                  const OptionalTensor&,
                                  int64_t,
                                  bool,
                                  bool);
using AffineGradSignature = std::tuple<Tensor, Tensor>(const Tensor&,
                                                       const Tensor&,
                                                       const Tensor&,
                                                       const OptionalTensor&,
                                                       const OptionalTensor&,
                                                       int64_t,
                                                       bool);
using DequantizeSignature = Tensor(const Tensor&, const Tensor&, const OptionalTensor&, int64_t);
using EmbeddingSignature =
    Tensor(const Tensor&, const Tensor&, const Tensor&, const OptionalTensor&, int64_t);
using QuantizeSignature = std::tuple<Tensor, Tensor, Tensor>(const Tensor&, int64_t);

template <class Signature>
c10::TypedOperatorHandle<Signature> find(const char* name) {
  return c10::Dispatcher::singleton().findSchemaOrThrow(name, "").typed<Signature>();
}

inline const auto& qmm() {
  static const auto op = find<QmmSignature>("onebit::qmm");
  return op;
}
inline const auto& qmm_prepacked() {
  static const auto op = find<QmmPrepackedSignature>("onebit::qmm_prepacked");
  return op;
}
inline const auto& gather_qmm() {
  static const auto op = find<GatherQmmSignature>("onebit::gather_qmm");
  return op;
}
inline const auto& affine_grad() {
  static const auto op = find<AffineGradSignature>("onebit::affine_grad");
  return op;
}
inline const auto& dequantize() {
  static const auto op = find<DequantizeSignature>("onebit::dequantize");
  return op;
}
inline const auto& embedding() {
  static const auto op = find<EmbeddingSignature>("onebit::embedding");
  return op;
}
inline const auto& quantize() {
  static const auto op = find<QuantizeSignature>("onebit::quantize");
  return op;
}

}  // namespace onebit::ops

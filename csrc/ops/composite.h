// What the operators are made of as plain PyTorch, for devices that have no kernels here: right,
// slow, and announced. A backend with kernels never comes here.
#pragma once

#include <ATen/core/Tensor.h>
#include <ATen/ops/arange.h>

#include "rules.h"

namespace onebit {

// A compiler that traces through them fuses them: nothing is slow, and nothing is announced.
inline bool is_traced(const Tensor& t) {
  return t.unsafeGetTensorImpl()->key_set().has(c10::DispatchKey::Python);
}

#define ONEBIT_WARN_SLOW(op, tensor)                                                       \
  do {                                                                                     \
    if (is_traced(tensor)) break;                                                          \
    TORCH_WARN_ONCE("torch_onebit has no kernel of " op " for ", (tensor).device().type(), \
                    " devices: it runs as plain PyTorch operators, correctly and slowly"); \
  } while (false)

// [..., k] to [..., k / size, size]; a size of -1 would be ambiguous where t is empty.
inline Tensor split_last(const Tensor& t, int64_t size) {
  return t.unflatten_symint(-1, {t.sym_size(-1) / size, size});
}
// [..., a, b] to [matrices, a, b].
inline Tensor as_matrices(const Tensor& t) {
  return t.dim() == 2 ? t.unsqueeze(0) : t.flatten(0, -3);
}

// Bits [..., words * 32] as numbers of the given dtype.
inline Tensor bits_of(const Tensor& packed, at::ScalarType dtype) {
  const auto words = packed.scalar_type() == at::kInt ? packed : packed.view(at::kInt);
  const auto shifts = at::arange(kWordBits, words.options());
  return words.unsqueeze(-1).bitwise_right_shift(shifts).bitwise_and(1).flatten(-2).to(dtype);
}

inline Tensor spread(const Tensor& levels, int64_t group_size) {
  return levels.repeat_interleave(group_size, -1);
}

// scale * bit + bias, rounded as dtype rounds.
inline Tensor decode(const Tensor& packed,
                     const Tensor& scales,
                     const OptionalTensor& biases,
                     int64_t group_size,
                     at::ScalarType dtype) {
  const auto s = scales.to(dtype);
  const auto b = biases ? biases->to(dtype) : s.mul(-0.5);
  return bits_of(packed, dtype).mul(spread(s, group_size)).add(spread(b, group_size));
}

}  // namespace onebit

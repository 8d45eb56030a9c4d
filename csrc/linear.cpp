// linear, composed of the operators below it: one call from Python instead of three.
#include <ATen/TensorOperators.h>
#include <ATen/core/Tensor.h>
#include <torch/library.h>

#include "ops.h"

namespace onebit {
namespace {

Tensor linear(const Tensor& x,
              const Tensor& packed,
              const Tensor& scales,
              const OptionalTensor& biases,
              const OptionalTensor& bias,
              const OptionalTensor& prepacked,
              int64_t group_size) {
  const auto y = prepacked
                     ? ops::qmm_prepacked().call(x, packed, scales, biases, *prepacked, group_size)
                     : ops::qmm().call(x, packed, scales, biases, group_size, true);
  if (!bias) return y;
  check_values("bias", *bias);
  check_sizes<c10::SymInt>("bias", *bias, {y.sym_size(-1)}, " (one per output)");
  return y + bias->to(y.scalar_type());
}

// Where nothing is prepacked for, the weights themselves serve.
Tensor qmm_prepacked(const Tensor& x,
                     const Tensor& packed,
                     const Tensor& scales,
                     const OptionalTensor& biases,
                     const Tensor& prepacked,
                     int64_t group_size) {
  check_qmm_prepacked<c10::SymInt>(x, packed, scales, biases, prepacked, group_size);
  return ops::qmm().call(x, packed, scales, biases, group_size, true);
}

}  // namespace

TORCH_LIBRARY_IMPL(onebit, CompositeImplicitAutograd, m) { m.impl("linear", &linear); }
// torch.vmap does not look there by itself: what linear is made of has the rules.
TORCH_LIBRARY_IMPL(onebit, FuncTorchBatchedDecomposition, m) { m.impl("linear", &linear); }
TORCH_LIBRARY_IMPL(onebit, CompositeExplicitAutograd, m) {
  m.impl("qmm_prepacked", &qmm_prepacked);
}

}  // namespace onebit

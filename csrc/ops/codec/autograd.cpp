// Gradients of dequantize and embedding; formulae in docs/format.md.
#include "../autograd.h"

#include <ATen/ops/index_add.h>
#include <ATen/ops/index_select.h>
#include <ATen/ops/ones.h>
#include <ATen/ops/zeros.h>

#include <tuple>

#include "../dispatch.h"
#include "rules.h"

namespace onebit {
namespace {

using Dequantize = Tensor(const Tensor&, const Tensor&, const OptionalTensor&, int64_t);
using Embedding =
    Tensor(const Tensor&, const Tensor&, const Tensor&, const OptionalTensor&, int64_t);
using Quantize = std::tuple<Tensor, Tensor, Tensor>(const Tensor&, int64_t);

const auto& dequantize() {
  static const auto op = find_op<Dequantize>("onebit::dequantize");
  return op;
}

const auto& embedding() {
  static const auto op = find_op<Embedding>("onebit::embedding");
  return op;
}

// w_hat = scales * bit + biases: sums of grad over the groups, with and without bit; with indices,
// of gathered rows. Inputs: scales, biases.
const Backward kDecode = {
    "OneBitDequantizeBackward", [](const variable_list& grads, const Saved& saved, const Needed&) {
      const Tensor& grad = grads[0];
      const int64_t group_size = saved.numbers[0];
      const bool has_biases = saved.numbers[1] != 0;
      auto words = saved.tensors[0];
      if (words.scalar_type() != at::kInt) words = words.view(at::kInt);
      const auto all = levels_shape<c10::SymInt>(words, group_size);
      const auto rows = saved.tensors[1].defined() ? saved.tensors[1].reshape(-1) : Tensor();
      if (rows.defined()) words = words.index_select(0, rows);

      const auto sizes = levels_shape<c10::SymInt>(words, group_size);
      const auto options = grad.options().dtype(sum_type(grad));
      const auto bits = dequantize().call(words, at::ones_symint(sizes, options),
                                          at::zeros_symint(sizes, options), group_size);
      std::vector<c10::SymInt> groups(sizes.begin(), sizes.end());
      groups.emplace_back(group_size);
      const auto grad_groups = grad.to(options.dtype()).reshape_symint(groups);
      const auto finish = [&](const Tensor& sum) {
        const auto result =
            rows.defined() ? at::zeros_symint(all, options).index_add(0, rows, sum) : sum;
        return result.to(grad.scalar_type());
      };
      const auto grad_scales = (grad_groups * bits.reshape_symint(groups)).sum(-1);
      const auto grad_biases = grad_groups.sum(-1);
      variable_list out(2);
      out[0] = finish(grad_of_scales(grad_scales, grad_biases, has_biases));
      if (has_biases) out[1] = finish(grad_biases);
      return out;
    }};

// Makes w, decoded below autograd, differentiable; decode(scales, biases) decodes other levels.
template <class Decode>
Tensor differentiable(Tensor w,
                      const Tensor& packed,
                      const Tensor& indices,
                      const Tensor& scales,
                      const OptionalTensor& biases,
                      int64_t group_size,
                      const Decode& decode) {
  if (autograd::compute_requires_grad(scales, or_undefined(biases))) {
    const Saved saved{{packed, indices}, {}, {group_size, biases.has_value()}, {}};
    record(kDecode, saved, {&w}, scales, or_undefined(biases));
  }
  if (has_tangent(scales) || has_tangent(biases)) {
    const LevelTangents levels(scales, biases);
    set_tangent(w, decode(levels.scales, levels.biases));
  }
  return w;
}

Tensor dequantize_autograd(c10::DispatchKeySet keys,
                           const Tensor& packed,
                           const Tensor& scales,
                           const OptionalTensor& biases,
                           int64_t group_size) {
  const auto w = below_autograd(dequantize(), keys, packed, scales, biases, group_size);
  return differentiable(w, packed, Tensor(), scales, biases, group_size,
                        [&](const Tensor& s, const OptionalTensor& b) {
                          return dequantize().call(packed, s, b, group_size);
                        });
}

Tensor embedding_autograd(c10::DispatchKeySet keys,
                          const Tensor& indices,
                          const Tensor& packed,
                          const Tensor& scales,
                          const OptionalTensor& biases,
                          int64_t group_size) {
  const auto w = below_autograd(embedding(), keys, indices, packed, scales, biases, group_size);
  return differentiable(w, packed, indices, scales, biases, group_size,
                        [&](const Tensor& s, const OptionalTensor& b) {
                          return embedding().call(indices, packed, s, b, group_size);
                        });
}

// The bits are a step function of w and the levels its extremes: quantize has no useful gradient.
std::tuple<Tensor, Tensor, Tensor> quantize_autograd(c10::DispatchKeySet keys,
                                                     const Tensor& w,
                                                     int64_t group_size) {
  static const auto op = find_op<Quantize>("onebit::quantize");
  return below_autograd(op, keys, w, group_size);
}

}  // namespace

TORCH_LIBRARY_IMPL(onebit, Autograd, m) {
  m.impl("quantize", &quantize_autograd);
  m.impl("dequantize", &dequantize_autograd);
  m.impl("embedding", &embedding_autograd);
}

}  // namespace onebit

// Gradients of dequantize and embedding; formulae in docs/format.md.
#include "../autograd.h"

#include <ATen/ops/index_add.h>
#include <ATen/ops/index_select.h>
#include <ATen/ops/ones.h>
#include <ATen/ops/zeros.h>

#include "rules.h"

namespace onebit {
namespace {

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
      const auto bits = call(Dequantize{words, at::ones_symint(sizes, options),
                                        at::zeros_symint(sizes, options), group_size});
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

Tensor decode_autograd(const Coded& o, Below<Tensor> below) {
  const auto biases = or_undefined(o.biases);
  auto w = below();
  if (autograd::compute_requires_grad(o.scales, biases)) {
    const Saved saved{{o.packed, o.indices ? *o.indices : Tensor()},
                      {},
                      {o.group_size, o.biases.has_value()},
                      {}};
    record(kDecode, saved, {&w}, o.scales, biases);
  }
  if (has_tangent(o.scales) || has_tangent(o.biases)) {
    const LevelTangents levels(o.scales, o.biases);
    const auto& scales = levels.scales;
    const auto& shifts = levels.biases;
    set_tangent(w, o.indices ? call(Embedding{*o.indices, o.packed, scales, shifts, o.group_size})
                             : call(Dequantize{o.packed, scales, shifts, o.group_size}));
  }
  return w;
}

// The bits are a step function of w and the levels its extremes: quantize has no useful gradient.
Quantized quantize_autograd(const Quantize&, Below<Quantized> below) { return below(); }

}  // namespace

TORCH_LIBRARY_IMPL(onebit, Autograd, m) {
  define_autograd<Quantize, quantize_autograd>(m);
  define_autograd<Dequantize, decode_autograd>(m);
  define_autograd<Embedding, decode_autograd>(m);
}

}  // namespace onebit

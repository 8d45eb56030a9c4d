// Operators that choose two levels for real-valued weights, and that train through the choice:
// their schemas and Meta kernels. cpu/levels.h has the rules.
#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <torch/library.h>

#include "rules.h"

TORCH_LIBRARY_FRAGMENT(onebit, m) {
  m.def(
      "quantize_levels(Tensor w, str rule, int group_size=128, Tensor? importance=None) -> "
      "(Tensor packed, Tensor scales, Tensor biases)");
  m.def(
      "fake_quantize(Tensor w, str rule, int group_size=128, *, ScalarType? dtype=None) -> "
      "Tensor");
  m.def("fake_quantize_backward(Tensor grad, Tensor w, str rule, int group_size=128) -> Tensor");
  m.def(
      "fake_quantize_affine(Tensor w, Tensor scales, Tensor biases, int group_size=128, *, "
      "ScalarType? dtype=None) -> Tensor");
  m.def(
      "fake_quantize_affine_backward(Tensor grad, Tensor w, Tensor scales, Tensor biases, "
      "int group_size=128) -> (Tensor grad_scales, Tensor grad_biases)");
  // One pass of coordinate descent over columns [begin, end): flips every bit whose flip lowers
  // (w - w_hat) moments (w - w_hat)^T, given error = (w - w_hat) moments. Returns the changes of
  // w_hat.
  m.def(
      "flip_bits_(Tensor(a!) bits, Tensor error, Tensor scales, Tensor moments, int begin, "
      "int end, int group_size=128) -> Tensor");
  // The same over all columns, again and again while bits of a row flip, at most `sweeps` times.
  // Returns how many did, [n] int64.
  m.def(
      "descend_(Tensor(a!) bits, Tensor error, Tensor scales, Tensor moments, int sweeps, "
      "int group_size=128) -> Tensor");
}

namespace onebit {
namespace {

using c10::SymInt;

Tensor empty(const Sizes<SymInt>& sizes, const Tensor& like, at::ScalarType dtype) {
  return at::empty_symint(sizes, like.options().dtype(dtype));
}

QuantizedLevels quantize_levels_meta(const LevelOperands& o) {
  const auto shape = check_choice<SymInt>(o);
  const auto type = o.w.scalar_type();
  return {empty(shape.packed, o.w, at::kInt), empty(shape.scales, o.w, type),
          empty(shape.scales, o.w, type)};
}

Tensor fake_quantize_meta(const LevelOperands& o) {
  check_choice<SymInt>(o);
  return empty(sizes_of<SymInt>(o.w), o.w, o.result_type());
}

GradLevels grad_levels_meta(const LevelOperands& o) {
  const auto shape = check_choice<SymInt>(o);
  const auto type = o.scales->scalar_type();
  return {empty(shape.scales, o.w, type), empty(shape.scales, o.w, type)};
}

Tensor flip_bits_meta(const FlipBits& o) {
  const auto sizes = check_flip_bits<SymInt>(o);
  return empty(sizes, o.error, o.error.scalar_type());
}

Tensor descend_meta(const Descend& o) { return empty(check_descend<SymInt>(o), o.bits, at::kLong); }

}  // namespace

TORCH_LIBRARY_IMPL(onebit, Meta, m) {
  define<QuantizeLevels, quantize_levels_meta>(m);
  define<FakeQuantize, fake_quantize_meta>(m);
  define<FakeQuantizeAffine, fake_quantize_meta>(m);
  define<FakeQuantizeBackward, fake_quantize_meta>(m);
  define<FakeQuantizeAffineBackward, grad_levels_meta>(m);
  define<FlipBits, flip_bits_meta>(m);
  define<Descend, descend_meta>(m);
}

}  // namespace onebit

// Operators that choose two levels for real-valued weights, and that train through the choice:
// their schemas and Meta kernels. cpu/levels.h has the rules.
#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <torch/library.h>

#include <tuple>

#include "rules.h"

TORCH_LIBRARY_FRAGMENT(onebit, m) {
  m.def(
      "quantize_levels(Tensor w, str rule, int group_size, Tensor? importance=None) -> "
      "(Tensor packed, Tensor scales, Tensor biases)");
  m.def("fake_quantize(Tensor w, str rule, int group_size, *, ScalarType? dtype=None) -> Tensor");
  m.def("fake_quantize_backward(Tensor grad, Tensor w, str rule, int group_size) -> Tensor");
  m.def(
      "fake_quantize_affine(Tensor w, Tensor scales, Tensor biases, int group_size, *, "
      "ScalarType? dtype=None) -> Tensor");
  m.def(
      "fake_quantize_affine_backward(Tensor grad, Tensor w, Tensor scales, Tensor biases, "
      "int group_size) -> (Tensor grad_scales, Tensor grad_biases)");
  // One pass of coordinate descent over columns [begin, end): flips every bit whose flip lowers
  // (w - w_hat) moments (w - w_hat)^T, given error = (w - w_hat) moments. Returns the changes of
  // w_hat.
  m.def(
      "flip_bits_(Tensor(a!) bits, Tensor error, Tensor scales, Tensor moments, int begin, int "
      "end, "
      "int group_size) -> Tensor");
}

namespace onebit {
namespace {

using c10::SymInt;

Tensor empty(const Sizes<SymInt>& sizes, const Tensor& like, at::ScalarType dtype) {
  return at::empty_symint(sizes, like.options().dtype(dtype));
}

std::tuple<Tensor, Tensor, Tensor> quantize_levels_meta(const Tensor& w,
                                                        c10::string_view rule,
                                                        int64_t group_size,
                                                        const OptionalTensor& importance) {
  const auto shape = check_quantize_levels<SymInt>(w, rule, group_size, importance);
  return {empty(shape.packed, w, at::kInt), empty(shape.scales, w, w.scalar_type()),
          empty(shape.scales, w, w.scalar_type())};
}

Tensor fake_quantize_meta(const Tensor& w,
                          c10::string_view rule,
                          int64_t group_size,
                          OptionalType dtype) {
  check_quantize_levels<SymInt>(w, rule, group_size, std::nullopt);
  check_output_type(dtype);
  return empty(sizes_of<SymInt>(w), w, dtype.value_or(w.scalar_type()));
}

Tensor fake_quantize_backward_meta(const Tensor& grad,
                                   const Tensor& w,
                                   c10::string_view rule,
                                   int64_t group_size) {
  check_quantize_levels<SymInt>(w, rule, group_size, std::nullopt);
  check_gradient<SymInt>(grad, w);
  return empty(sizes_of<SymInt>(w), w, w.scalar_type());
}

Tensor fake_quantize_affine_meta(const Tensor& w,
                                 const Tensor& scales,
                                 const Tensor& biases,
                                 int64_t group_size,
                                 OptionalType dtype) {
  check_affine<SymInt>(w, scales, biases, group_size);
  check_output_type(dtype);
  return empty(sizes_of<SymInt>(w), w, dtype.value_or(w.scalar_type()));
}

std::tuple<Tensor, Tensor> fake_quantize_affine_backward_meta(const Tensor& grad,
                                                              const Tensor& w,
                                                              const Tensor& scales,
                                                              const Tensor& biases,
                                                              int64_t group_size) {
  check_affine<SymInt>(w, scales, biases, group_size);
  check_gradient<SymInt>(grad, w);
  const auto sizes = sizes_of<SymInt>(scales);
  return {empty(sizes, w, scales.scalar_type()), empty(sizes, w, scales.scalar_type())};
}

Tensor flip_bits_meta(Tensor& bits,
                      const Tensor& error,
                      const Tensor& scales,
                      const Tensor& moments,
                      int64_t begin,
                      int64_t end,
                      int64_t group_size) {
  const auto sizes = check_flip_bits<SymInt>(bits, error, scales, moments, begin, end, group_size);
  return empty(sizes, error, error.scalar_type());
}

}  // namespace

TORCH_LIBRARY_IMPL(onebit, Meta, m) {
  m.impl("quantize_levels", &quantize_levels_meta);
  m.impl("fake_quantize", &fake_quantize_meta);
  m.impl("fake_quantize_backward", &fake_quantize_backward_meta);
  m.impl("fake_quantize_affine", &fake_quantize_affine_meta);
  m.impl("fake_quantize_affine_backward", &fake_quantize_affine_backward_meta);
  m.impl("flip_bits_", &flip_bits_meta);
}

}  // namespace onebit

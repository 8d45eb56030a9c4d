// quantize, dequantize and embedding on CUDA.
#include "quantize.h"

#include <ATen/ops/empty.h>
#include <c10/core/DeviceGuard.h>

namespace onebit::cuda {
namespace {

Quantized quantize_cuda(const Quantize& o, Below<Quantized> composite) {
  const auto& [w, group_size] = o;
  const auto shape = check_quantize<int64_t>(w, group_size);
  if (!has_kernels(w)) return composite();
  const c10::DeviceGuard guard(w.device());
  auto packed = at::empty(shape.packed, w.options().dtype(at::kInt));
  auto scales = at::empty(shape.scales, w.options()), biases = at::empty(shape.scales, w.options());
  if (w.numel() == 0) return {packed, scales, biases};
  const auto values = aligned(w);
  const QuantizeArgs args = {values.const_data_ptr(), mutable_words(packed),
                             scales.mutable_data_ptr(), biases.mutable_data_ptr(), scales.numel()};
  launch(plan_quantize(args.groups, dtype_of(w), group_words(group_size)), args);
  return {packed, scales, biases};
}

// Rows of packed, or all of it as one row, into out.
void decode_into(const Tensor& out, const Coded& o) {
  if (out.numel() == 0) return;
  const bool indexed = o.indices;
  const auto bits = words_of(o.packed), steps = aligned(o.scales);
  const auto base = aligned(o.biases);
  const auto rows = indexed ? o.indices->to(at::kLong).contiguous() : Tensor();
  const DType type = dtype_of(out);
  const int64_t row_words = indexed ? o.packed.size(1) : o.packed.numel();
  const DecodeArgs args = {
      words(bits),      steps.const_data_ptr(),        data(base),
      index_data(rows), out.mutable_data_ptr(),        indexed ? o.packed.size(0) : 1,
      row_words,        decode_blocks(row_words, type)};
  launch(plan_decode(args, out.numel() / (row_words * kWordBits), dtype_of(o.scales), type,
                     group_words(o.group_size)),
         args);
}

Tensor decode_cuda(const Coded& o, Below<Tensor> composite) {
  const auto sizes = check_decode<int64_t>(o);
  if (!has_kernels(o.scales)) return composite();
  const c10::DeviceGuard guard(o.packed.device());
  auto out = at::empty(sizes, o.scales.options());
  decode_into(out, o);
  return out;
}

}  // namespace

Tensor decode(const Coded& o, at::ScalarType dtype) {
  const c10::DeviceGuard guard(o.packed.device());
  auto out = at::empty(check_decode<int64_t>(o), o.scales.options().dtype(dtype));
  decode_into(out, o);
  return out;
}

TORCH_LIBRARY_IMPL(onebit, CUDA, m) {
  define_above_composite<Quantize, quantize_cuda>(m);
  define_above_composite<Dequantize, decode_cuda>(m);
  define_above_composite<Embedding, decode_cuda>(m);
}

}  // namespace onebit::cuda

// quantize, dequantize and embedding on CUDA.
#include "quantize.h"

#include <ATen/ops/empty.h>
#include <c10/core/DeviceGuard.h>
#include <torch/library.h>

#include <tuple>

#include "../ops/codec/rules.h"

namespace onebit::cuda {
namespace {

std::tuple<Tensor, Tensor, Tensor> quantize_cuda(const Tensor& w, int64_t group_size) {
  const auto shape = check_quantize<int64_t>(w, group_size);
  if (!has_kernels(w)) return composite(&quantize_cuda, "onebit::quantize", w, group_size);
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

// Rows of w that indices name, or all of w as one row, into out.
void decode_into(const Tensor& out,
                 const Tensor& indices,
                 const Tensor& packed,
                 const Tensor& scales,
                 const OptionalTensor& biases,
                 int64_t group_size) {
  if (out.numel() == 0) return;
  const bool indexed = indices.defined();
  const auto bits = words_of(packed), steps = aligned(scales);
  const auto base = aligned(biases);
  const auto rows = indexed ? indices.to(at::kLong).contiguous() : Tensor();
  const DType type = dtype_of(out);
  const int64_t row_words = indexed ? packed.size(1) : packed.numel();
  const DecodeArgs args = {
      words(bits),      steps.const_data_ptr(),        data(base),
      index_data(rows), out.mutable_data_ptr(),        indexed ? packed.size(0) : 1,
      row_words,        decode_blocks(row_words, type)};
  launch(plan_decode(args, out.numel() / (row_words * kWordBits), dtype_of(scales), type,
                     group_words(group_size)),
         args);
}

Tensor dequantize_cuda(const Tensor& packed,
                       const Tensor& scales,
                       const OptionalTensor& biases,
                       int64_t group_size) {
  check_dequantize<int64_t>(packed, scales, biases, group_size);
  if (!has_kernels(scales)) {
    return composite(&dequantize_cuda, "onebit::dequantize", packed, scales, biases, group_size);
  }
  return decode(packed, scales, biases, group_size, scales.scalar_type());
}

Tensor embedding_cuda(const Tensor& indices,
                      const Tensor& packed,
                      const Tensor& scales,
                      const OptionalTensor& biases,
                      int64_t group_size) {
  const auto sizes = check_embedding<int64_t>(indices, packed, scales, biases, group_size);
  if (!has_kernels(scales)) {
    return composite(&embedding_cuda, "onebit::embedding", indices, packed, scales, biases,
                     group_size);
  }
  const c10::DeviceGuard guard(packed.device());
  auto out = at::empty(sizes, scales.options());
  decode_into(out, indices, packed, scales, biases, group_size);
  return out;
}

}  // namespace

Tensor decode(const Tensor& packed,
              const Tensor& scales,
              const OptionalTensor& biases,
              int64_t group_size,
              at::ScalarType dtype) {
  const c10::DeviceGuard guard(packed.device());
  auto sizes = packed.sizes().vec();
  sizes.back() *= kWordBits;
  auto w = at::empty(sizes, scales.options().dtype(dtype));
  decode_into(w, Tensor(), packed, scales, biases, group_size);
  return w;
}

TORCH_LIBRARY_IMPL(onebit, CUDA, m) {
  m.impl("quantize", &quantize_cuda);
  m.impl("dequantize", &dequantize_cuda);
  m.impl("embedding", &embedding_cuda);
}

}  // namespace onebit::cuda

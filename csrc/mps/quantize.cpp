// quantize, dequantize and embedding on MPS.
#include <ATen/ops/empty.h>
#include <torch/library.h>

#include <tuple>

#include "../ops/codec/rules.h"
#include "encoder.h"
#include "tensors.h"

namespace onebit::mps {
namespace {

std::tuple<Tensor, Tensor, Tensor> quantize_mps(const Tensor& w, int64_t group_size) {
  const auto shape = check_quantize<int64_t>(w, group_size);
  const DType type = dtype_on_mps("w", w);
  auto packed = at::empty(shape.packed, w.options().dtype(at::kInt));
  auto scales = at::empty(shape.scales, w.options()), biases = at::empty(shape.scales, w.options());
  if (w.numel() == 0) return {packed, scales, biases};
  check_count("w", w);
  const GroupParams params = {static_cast<uint32_t>(scales.numel()), 1};
  encode(Work{plan_groups(Kernel::kQuantize, params, type, {group_size}),
              {w.contiguous(), packed, scales, biases},
              &params,
              sizeof params});
  return {packed, scales, biases};
}

// Rows of w that indices name, or all of w as one row.
Tensor decode(at::IntArrayRef sizes,
              const Tensor& indices,
              const Tensor& packed,
              const Tensor& scales,
              const OptionalTensor& biases,
              int64_t group_size) {
  const DType type = dtype_on_mps("scales", scales);
  auto out = at::empty(sizes, scales.options());
  if (out.numel() == 0) return out;
  check_count("packed", packed);
  check_count("the result", out);
  const bool indexed = indices.defined();
  const int64_t words = indexed ? packed.size(1) : packed.numel();
  const DecodeParams params = {static_cast<uint32_t>(indexed ? packed.size(0) : 1),
                               static_cast<uint32_t>(words), group_shift(group_size)};
  const uint32_t rows = static_cast<uint32_t>(out.numel() / (words * kWordBits));
  encode(Work{plan_decode(params, rows, type, biases.has_value(), indexed),
              {words_of(packed), scales.contiguous(), biases ? biases->contiguous() : Tensor(),
               indexed ? indices.to(at::kLong).contiguous() : Tensor(), out},
              &params,
              sizeof params});
  return out;
}

Tensor dequantize_mps(const Tensor& packed,
                      const Tensor& scales,
                      const OptionalTensor& biases,
                      int64_t group_size) {
  const auto sizes = check_dequantize<int64_t>(packed, scales, biases, group_size);
  return decode(sizes, Tensor(), packed, scales, biases, group_size);
}

Tensor embedding_mps(const Tensor& indices,
                     const Tensor& packed,
                     const Tensor& scales,
                     const OptionalTensor& biases,
                     int64_t group_size) {
  const auto sizes = check_embedding<int64_t>(indices, packed, scales, biases, group_size);
  return decode(sizes, indices, packed, scales, biases, group_size);
}

}  // namespace

TORCH_LIBRARY_IMPL(onebit, MPS, m) {
  m.impl("quantize", &quantize_mps);
  m.impl("dequantize", &dequantize_mps);
  m.impl("embedding", &embedding_mps);
}

}  // namespace onebit::mps

// quantize, dequantize and embedding on the CPU: one pass over whole groups, split among threads.
#include <ATen/ops/empty.h>
#include <torch/library.h>

#include <tuple>

#include "../ops/codec/rules.h"
#include "indices.h"
#include "parallel.h"
#include "tensors.h"

namespace onebit::cpu {
namespace {

// Values below which a second thread costs more than it saves (fork and join take 30 us when cold).
constexpr int64_t kValuesPerTask = 1 << 18;

std::tuple<Tensor, Tensor, Tensor> quantize_cpu(const Tensor& w, int64_t group_size) {
  const auto shape = check_quantize<int64_t>(w, group_size);
  auto packed = at::empty(shape.packed, w.options().dtype(at::kInt));
  auto scales = at::empty(shape.scales, w.options());
  auto biases = at::empty(shape.scales, w.options());
  const auto values = w.contiguous();
  const auto& table = kernels();
  in_parallel(0, scales.numel(), kValuesPerTask / group_size, [&](int64_t begin, int64_t end) {
    table.quantize(values.const_data_ptr(), dtype_of(values), int(group_size),
                   static_cast<uint32_t*>(packed.mutable_data_ptr()), scales.mutable_data_ptr(),
                   biases.mutable_data_ptr(), begin, end);
  });
  return {packed, scales, biases};
}

Tensor dequantize_cpu(const Tensor& packed,
                      const Tensor& scales,
                      const OptionalTensor& biases,
                      int64_t group_size) {
  const auto sizes = check_dequantize<int64_t>(packed, scales, biases, group_size);
  auto w = at::empty(sizes, scales.options());
  const WeightTensors weights(packed, scales, biases, group_size);
  const auto matrix = weights.matrix(0, 0);
  const auto& table = kernels();
  auto* out = static_cast<char*>(w.mutable_data_ptr());
  const int64_t group_bytes = group_size * w.element_size();
  in_parallel(0, scales.numel(), kValuesPerTask / group_size, [&](int64_t begin, int64_t end) {
    table.dequantize(matrix, out + begin * group_bytes, begin, end);
  });
  return w;
}

Tensor embedding_cpu(const Tensor& indices,
                     const Tensor& packed,
                     const Tensor& scales,
                     const OptionalTensor& biases,
                     int64_t group_size) {
  const auto sizes = check_embedding<int64_t>(indices, packed, scales, biases, group_size);
  const auto rows = read_indices("indices", indices, packed.size(0));
  auto out = at::empty(sizes, scales.options());
  const WeightTensors weights(packed, scales, biases, group_size);
  const auto matrix = weights.matrix(0, packed.size(0));
  const int64_t groups = matrix.columns / group_size;
  const int64_t row_bytes = matrix.columns * out.element_size();
  const auto& table = kernels();
  auto* bytes = static_cast<char*>(out.mutable_data_ptr());
  const int64_t rows_per_task = kValuesPerTask / std::max<int64_t>(matrix.columns, 1) + 1;
  in_parallel(0, int64_t(rows.size()), rows_per_task, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      table.dequantize(matrix, bytes + i * row_bytes, rows[i] * groups, (rows[i] + 1) * groups);
    }
  });
  return out;
}

}  // namespace

TORCH_LIBRARY_IMPL(onebit, CPU, m) {
  m.impl("quantize", &quantize_cpu);
  m.impl("dequantize", &dequantize_cpu);
  m.impl("embedding", &embedding_cpu);
}

}  // namespace onebit::cpu

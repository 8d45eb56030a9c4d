// quantize, dequantize and embedding on the CPU: one pass over whole groups, split among threads.
#include <ATen/ops/empty.h>

#include <vector>

#include "../ops/codec/rules.h"
#include "indices.h"
#include "parallel.h"
#include "tensors.h"

namespace onebit::cpu {
namespace {

// Values below which a second thread costs more than it saves (fork and join take 30 us when cold).
constexpr int64_t kValuesPerTask = 1 << 18;

Quantized quantize_cpu(const Quantize& o) {
  const auto& w = o.w;
  const int64_t group_size = o.group_size;
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

// Rows of packed, or all of it.
Tensor decode_cpu(const Coded& o) {
  const auto sizes = check_decode<int64_t>(o);
  std::vector<int64_t> rows;
  if (o.indices) rows = read_indices("indices", *o.indices, o.packed.size(0));
  auto out = at::empty(sizes, o.scales.options());
  const WeightTensors weights(o.packed, o.scales, o.biases, o.group_size);
  const auto matrix = weights.matrix(0, o.indices ? o.packed.size(0) : 0);
  const auto& table = kernels();
  auto* bytes = static_cast<char*>(out.mutable_data_ptr());
  if (!o.indices) {
    const int64_t group_bytes = o.group_size * out.element_size();
    in_parallel(0, o.scales.numel(), kValuesPerTask / o.group_size,
                [&](int64_t begin, int64_t end) {
                  table.dequantize(matrix, bytes + begin * group_bytes, begin, end);
                });
    return out;
  }
  const int64_t groups = matrix.columns / o.group_size;
  const int64_t row_bytes = matrix.columns * out.element_size();
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
  define<Quantize, quantize_cpu>(m);
  define<Dequantize, decode_cpu>(m);
  define<Embedding, decode_cpu>(m);
}

}  // namespace onebit::cpu

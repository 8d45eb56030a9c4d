// prepack and qmm_prepacked on the CPU.
#include <ATen/ops/empty.h>
#include <torch/library.h>

#include <algorithm>

#include "../ops/product/rules.h"
#include "parallel.h"
#include "prepacked.h"
#include "tasks.h"
#include "tensors.h"

namespace onebit::cpu {
namespace {

// A sample, for all would cost what the copy saves: the first and the last group of rows spread
// over the matrix.
bool is_copy(const char* copy, const PrepackedLayout& layout, const Weights& w) {
  constexpr int64_t kSamples = 4;
  for (int64_t i = 0; i < kSamples; ++i) {
    const int64_t row = i * (w.rows - 1) / (kSamples - 1);
    if (!layout.holds(copy, w, row, 0) || !layout.holds(copy, w, row, layout.groups - 1)) {
      return false;
    }
  }
  return true;
}

Tensor prepack(const Tensor& packed,
               const Tensor& scales,
               const OptionalTensor& biases,
               int64_t group_size) {
  check_prepack<int64_t>(packed, scales, biases, group_size);
  const auto& table = kernels();
  TORCH_CHECK_NOT_IMPLEMENTED(table.prepack,
                              "onebit::prepack must run with the avx512 kernels, got ", table.name);
  const WeightTensors weights(packed, scales, biases, group_size);
  const auto w = weights.matrix(0, packed.size(0));
  const PrepackedLayout layout(w);
  auto out = at::empty({layout.bytes()}, packed.options().dtype(at::kByte));
  char* data = static_cast<char*>(out.mutable_data_ptr());
  in_parallel(0, layout.tiles, 16,
              [&](int64_t begin, int64_t end) { table.prepack(w, data, begin, end); });
  return out;
}

Tensor prepack_meta(const Tensor& packed,
                    const Tensor& scales,
                    const OptionalTensor& biases,
                    int64_t group_size) {
  using Layout = PrepackedLayout;
  check_prepack<c10::SymInt>(packed, scales, biases, group_size);
  const auto block = Layout::block_size(int(group_size), scales.element_size(), biases.has_value());
  const auto columns = packed.sym_size(1) * kWordBits;
  const auto bytes = Layout::bytes(packed.sym_size(0), columns, int(group_size), block);
  return at::empty_symint({bytes}, packed.options().dtype(at::kByte));
}

Tensor prepacked_cpu(const Operands& o) {
  const auto shape = check_product<int64_t>(o);
  const Tensor &x = o.x, &prepacked = *o.prepacked;
  const auto& table = kernels();
  const int64_t rows = shape.n ? c10::multiply_integers(shape.y) / shape.n : 0;
  if (rows > PrepackedLayout::kMaxRows || rows == 0 || shape.k == 0 ||
      x.scalar_type() == at::kDouble || !table.qmm_prepacked) {
    return product({Form::kQmm, x, o.packed, o.scales, o.biases, o.group_size});
  }
  const WeightTensors weights(o.packed, o.scales, o.biases, o.group_size);
  const auto w = weights.matrix(0, shape.n);
  const PrepackedLayout layout(w);
  const char* data = static_cast<const char*>(prepacked.const_data_ptr());
  TORCH_CHECK_VALUE(
      prepacked.numel() == layout.bytes() && is_copy(data, layout, w),
      "prepacked must be made from these weights as they are now (prepack again), got "
      "a copy of ",
      prepacked.numel(), " bytes from others or from before a change");
  auto y = at::empty(shape.y, x.options());
  const auto values = x.contiguous();
  QmmArgs args{
      values.const_data_ptr(), y.mutable_data_ptr(), dtype_of(x), rows, shape.n, shape.k, w};
  const int64_t grain = ceil_div(kMacsPerTask, PrepackedLayout::kTileRows * shape.k * rows);
  in_parallel(0, layout.tiles, grain, [&](int64_t begin, int64_t end) {
    table.qmm_prepacked(args, data,
                        {0, rows, begin * PrepackedLayout::kTileRows,
                         std::min(end * PrepackedLayout::kTileRows, shape.n)});
  });
  return y;
}

}  // namespace

TORCH_LIBRARY_IMPL(onebit, CPU, m) {
  m.impl("prepack", &prepack);
  m.impl("qmm_prepacked", &ProductForms<prepacked_cpu>::qmm_prepacked);
}

// Here and not with the schema: only this device prepacks, and its layout is its own.
TORCH_LIBRARY_IMPL(onebit, Meta, m) { m.impl("prepack", &prepack_meta); }

}  // namespace onebit::cpu

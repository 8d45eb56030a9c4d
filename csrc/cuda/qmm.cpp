// qmm and gather_qmm on CUDA: plan, then launch.
#include <ATen/ops/empty.h>
#include <ATen/ops/matmul.h>
#include <c10/core/DeviceGuard.h>

#include <limits>

#include "../ops/product/rules.h"
#include "quantize.h"

namespace onebit::cuda {
namespace {

// The operands of a product, as kernels read them.
struct Inputs {
  Tensor x, packed, scales;
  OptionalTensor biases;
  int64_t group_size;

  explicit Inputs(const Operands& o)
      : x(aligned(o.x)),
        packed(aligned(words_of(o.packed))),
        scales(aligned(o.scales)),
        biases(aligned(o.biases)),
        group_size(o.group_size) {}
};

ProductArgs product_args(const Inputs& o,
                         const Product& p,
                         const BatchIndices& index,
                         const Tensor& y) {
  return {o.x.const_data_ptr(),
          words(o.packed),
          o.scales.const_data_ptr(),
          data(o.biases),
          y.mutable_data_ptr(),
          index_data(index.x),
          index_data(index.w),
          index.x_matrices,
          index.w_matrices,
          p.m,
          p.n,
          p.k,
          nullptr,
          nullptr};
}

void run_b1(const ProductPlan& plan, const Product& p, ProductArgs args, const Tensor& like) {
  const int64_t items = int64_t(p.k) / 128 * p.m, octets = p.x == DType::kFloat ? 4 : 2;
  const int64_t of_groups = 4 * (4 / p.group_words);
  const auto scratch =
      at::empty({items * (octets * 32 + of_groups)}, like.options().dtype(at::kFloat));
  args.planes = mutable_words(scratch);
  args.groups = scratch.mutable_data_ptr<float>() + items * octets * 32;
  launch(plan.planes, args);
  launch(plan.product, args);
}

// float32 x as three bfloat16 parts and its group sums.
struct Parts {
  Tensor parts, sums;
};
Parts split(const Inputs& o, const Product& p, uint32_t sum_rows) {
  Parts result = {at::empty({3, p.m, p.k}, o.x.options().dtype(at::kBFloat16)),
                  at::empty({2, int64_t(p.k) / o.group_size, sum_rows}, o.x.options())};
  const SplitArgs args = {o.x.const_data_ptr<float>(),
                          static_cast<uint16_t*>(result.parts.mutable_data_ptr()),
                          result.sums.mutable_data_ptr<float>(),
                          p.m,
                          p.k,
                          sum_rows};
  launch(plan_split(args, p.group_words), args);
  return result;
}

// Where y is written, or the partial sums that are then added up to it.
struct Sums {
  Tensor y, partial;
  uint32_t splits;

  Sums(const Tensor& y, uint32_t splits) : y(y), splits(splits) {
    if (splits == 1) return;
    partial = at::empty({int64_t(splits), y.numel()}, y.options().dtype(at::kFloat));
  }
  void* to() const { return (partial.defined() ? partial : y).mutable_data_ptr(); }
  void add_up(DType out) const {
    if (!partial.defined()) return;
    const SumArgs args = {partial.const_data_ptr<float>(), y.mutable_data_ptr(), y.numel(), splits};
    launch(plan_sum(args.count, out), args);
  }
};

void run_wgmma(const ProductPlan& plan, const Product& p, const Inputs& o, const Tensor& y) {
  const Variant& v = plan.product.variant;
  const uint32_t sum_rows = ceil_div(p.m, v.rows) * v.rows;
  Parts split_x;
  if (p.x == DType::kFloat) split_x = split(o, p, sum_rows);
  const Tensor& x = split_x.parts.defined() ? split_x.parts : o.x;
  const uint32_t parts = split_x.parts.defined() ? 3 : 1;
  const Sums sums(y, plan.splits);
  const uint64_t k = p.k;
  const WgmmaArgs args = {tensor_map({x.const_data_ptr(),
                                      false,
                                      4,
                                      {64, p.m, k / 64, parts},
                                      {k * 2, 128, k * 2 * p.m},
                                      {64, v.rows, 2u * v.steps, parts},
                                      p.x == DType::kHalf}),
                          tensor_map({o.packed.const_data_ptr(),
                                      true,
                                      2,
                                      {k / kWordBits, p.n},
                                      {k / 8},
                                      {4u * v.steps, 64u * v.consumers},
                                      false}),
                          o.scales.const_data_ptr(),
                          data(o.biases),
                          split_x.sums.defined() ? split_x.sums.const_data_ptr<float>() : nullptr,
                          sums.to(),
                          p.m,
                          p.n,
                          p.k,
                          plan.steps,
                          sum_rows};
  launch(plan.product, args);
  sums.add_up(p.x);
}

void run_tiles(const ProductPlan& plan, const Product& p, const Inputs& o, const Tensor& y) {
  const Sums sums(y, plan.splits);
  const TileArgs args = {o.x.const_data_ptr(),
                         words(o.packed),
                         o.scales.const_data_ptr(),
                         data(o.biases),
                         sums.to(),
                         p.m,
                         p.n,
                         p.k,
                         plan.steps};
  launch(plan.product, args);
  sums.add_up(p.x);
}

Tensor product_cuda(const Operands& o, Below<Tensor> composite) {
  const auto shape = check_product<int64_t>(o);
  if (!has_kernels(o.x) || !has_kernels(o.scales)) return composite();
  const Tensor& x = o.x;
  const c10::DeviceGuard guard(x.device());
  auto y = at::empty(shape.y, x.options());
  if (y.numel() == 0) return y;
  if (shape.k == 0) return y.zero_();
  // Every index is out of range where there are no matrices.
  constexpr double kNaN = std::numeric_limits<double>::quiet_NaN();
  if (x.numel() == 0 || o.packed.numel() == 0) return y.fill_(kNaN);
  const BatchIndices index(shape, o);
  const Product p = {uint32_t(shape.m),         uint32_t(shape.n), uint32_t(shape.k),
                     group_words(o.group_size), o.transpose,       index.batches,
                     index.indexed(),           dtype_of(x),       dtype_of(o.scales),
                     o.biases.has_value()};
  const ProductPlan plan = plan_product(p, gpu_of(x));
  // Matrices that meet in order are a plain batch: torch multiplies those of many rows.
  const bool batch_of_many =
      index.indexed() && !o.gathered && (!o.transpose || shape.m > kHmmaAloneMaxM);
  if (plan.way == Way::kDense || batch_of_many) {
    const auto w = decode({o.packed, o.scales, o.biases, o.group_size}, x.scalar_type());
    return at::matmul(x, o.transpose ? w.transpose(-1, -2) : w);
  }
  const Inputs inputs(o);
  const auto args = product_args(inputs, p, index, y);
  if (plan.way == Way::kB1) run_b1(plan, p, args, x);
  if (plan.way == Way::kWgmma) run_wgmma(plan, p, inputs, y);
  if (plan.way == Way::kTiles) run_tiles(plan, p, inputs, y);
  if (plan.way == Way::kHmma || plan.way == Way::kGatherN) launch(plan.product, args);
  return y;
}

}  // namespace

TORCH_LIBRARY_IMPL(onebit, CUDA, m) {
  define_above_composite<Qmm, product_cuda>(m);
  define_above_composite<GatherQmm, product_cuda>(m);
}

}  // namespace onebit::cuda

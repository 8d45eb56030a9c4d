// qmm and gather_qmm on MPS: contiguous, plan, encode.
#include <ATen/ops/empty.h>

#include <atomic>
#include <string>

#include "../ops/product/rules.h"
#include "product.h"
#include "tensor_tiles.h"
#include "tensors.h"

namespace onebit::mps {
namespace {

// For measurements: the kernel of every product that it fits, in place of the planned one.
std::atomic<int> forced_kernel{-1};

void force_kernel(c10::string_view name) {
  int found = -1;
  for (int i = 0; i <= static_cast<int>(Kernel::kFlipBits); i++) {
    if (name == kernel_name(static_cast<Kernel>(i))) found = i;
  }
  TORCH_CHECK_VALUE(found >= 0 || name.empty(), "kernel must be one of launch_plan.h, got ", name);
  forced_kernel = found;
}

// "family cores tensor_ops" of the GPU, then "transpose min_family max_m kernel" of each rule, a
// line each.
std::string tuning() {
  const Gpu gpu = current_gpu();
  std::string text = std::to_string(gpu.family) + " " + std::to_string(gpu.cores) + " " +
                     std::to_string(gpu.tensor_ops) + "\n";
  for (const ProductRule& rule : kProductRules) {
    text += std::to_string(rule.transpose) + " " + std::to_string(rule.min_family) + " " +
            std::to_string(rule.max_m) + " " + kernel_name(rule.kernel) + "\n";
  }
  return text;
}

ProductPlan plan(const Product& p) {
  const Gpu gpu = current_gpu();
  const int forced = forced_kernel;
  const Kernel kernel = static_cast<Kernel>(forced);
  if (forced >= 0 && fits(kernel, p, gpu)) return plan_product(p, gpu, kernel);
  const ProductPlan plan = plan_product(p, gpu);
  const Pipeline& pipeline = plan.product.pipeline;
  if (!needs_metal4(pipeline.kernel) || tensor_tiles_agree(pipeline, gpu)) return plan;
  return plan_product(p, Gpu{gpu.family, gpu.cores});
}

Tensor product_mps(const Operands& o) {
  const auto shape = check_product<int64_t>(o);
  const Tensor& x = o.x;
  const DType type = dtype_on_mps("x", x), levels = dtype_on_mps("scales", o.scales);
  auto y = at::empty(shape.y, x.options());
  if (y.numel() == 0) return y;
  if (shape.k == 0) return y.zero_();
  check_count("x", x);
  check_count("packed", o.packed);
  check_count("the result", y);

  const BatchIndices index(shape, o, BatchIndices::Formula::kYes);
  const Product p = {static_cast<uint32_t>(shape.m),
                     static_cast<uint32_t>(shape.n),
                     static_cast<uint32_t>(shape.k),
                     o.group_size,
                     o.transpose,
                     index.batches,
                     index.x_matrices,
                     index.w_matrices,
                     index.indexed(),
                     o.sorted_indices,
                     type,
                     levels,
                     o.biases.has_value(),
                     index.x_repeat,
                     index.w_repeat};
  const ProductPlan plan = mps::plan(p);
  const Tensor biases = o.biases ? o.biases->contiguous() : Tensor();
  encode_product(
      plan, {aligned(x), words_of(o.packed), o.scales.contiguous(), biases, index.x, index.w}, y);
  return y;
}

}  // namespace

void encode_product(const ProductPlan& plan, const ProductTensors& t, const Tensor& y) {
  const auto buffers = [&](const Tensor& out) {
    return c10::SmallVector<Tensor, 8>{t.x, t.packed,  t.scales, t.biases,
                                       out, t.x_index, t.w_index};
  };
  if (plan.splits == 1) {
    encode(Work{plan.product, buffers(y), &plan.params, sizeof plan.params});
    return;
  }
  const auto partial =
      at::empty({int64_t(plan.splits), y.numel()}, t.x.options().dtype(at::kFloat));
  encode({Work{plan.product, buffers(partial), &plan.params, sizeof plan.params},
          Work{plan.sum, {partial, y}, &plan.sum_params, sizeof plan.sum_params}});
}

TORCH_LIBRARY_IMPL(onebit, MPS, m) {
  define<Qmm, product_mps>(m);
  define<GatherQmm, product_mps>(m);
}

TORCH_LIBRARY_FRAGMENT(onebit, m) {
  m.def("mps_tuning() -> str", &tuning);
  m.def("mps_force_kernel(str kernel) -> ()", &force_kernel);
}

}  // namespace onebit::mps

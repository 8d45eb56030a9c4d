// qmm and gather_qmm on MPS: contiguous, plan, encode.
#include <ATen/ops/empty.h>

#include <atomic>
#include <string>

#include "../ops/product/rules.h"
#include "encoder.h"
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

// "family cores" of the GPU, then "transpose min_family max_m kernel" of each rule, a line each.
std::string tuning() {
  const Gpu gpu = current_gpu();
  std::string text = std::to_string(gpu.family) + " " + std::to_string(gpu.cores) + "\n";
  for (const ProductRule& rule : kProductRules) {
    text += std::to_string(rule.transpose) + " " + std::to_string(rule.min_family) + " " +
            std::to_string(rule.max_m) + " " + kernel_name(rule.kernel) + "\n";
  }
  return text;
}

ProductPlan plan(const Product& p) {
  const int forced = forced_kernel;
  const Kernel kernel = static_cast<Kernel>(forced);
  return forced >= 0 && fits(kernel, p.transpose, p.m) ? plan_product(p, current_gpu(), kernel)
                                                       : plan_product(p, current_gpu());
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
  const auto biases = o.biases ? o.biases->contiguous() : Tensor();
  const auto inputs = [&](const Tensor& out) {
    return c10::SmallVector<Tensor, 8>{
        aligned(x), words_of(o.packed), o.scales.contiguous(), biases, out, index.x, index.w};
  };
  if (plan.splits == 1) {
    encode(Work{plan.product, inputs(y), &plan.params, sizeof plan.params});
    return y;
  }
  const auto partial = at::empty({int64_t(plan.splits), y.numel()}, x.options().dtype(at::kFloat));
  encode({Work{plan.product, inputs(partial), &plan.params, sizeof plan.params},
          Work{plan.sum, {partial, y}, &plan.sum_params, sizeof plan.sum_params}});
  return y;
}

}  // namespace

TORCH_LIBRARY_IMPL(onebit, MPS, m) {
  define<Qmm, product_mps>(m);
  define<GatherQmm, product_mps>(m);
}

TORCH_LIBRARY_FRAGMENT(onebit, m) {
  m.def("mps_tuning() -> str", &tuning);
  m.def("mps_force_kernel(str kernel) -> ()", &force_kernel);
}

}  // namespace onebit::mps

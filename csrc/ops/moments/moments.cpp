// Sums of outer products, of which calibration is made: schema, Meta, plain PyTorch.
#include <ATen/core/Tensor.h>
#include <torch/library.h>

#include "rules.h"

TORCH_LIBRARY_FRAGMENT(onebit, m) {
  // sum += a^T b in float32. With `upper` what lies below the diagonal is left undefined: the
  // product is symmetric, or the caller wants no more.
  m.def("add_products_(Tensor(a!) sum, Tensor a, Tensor b, bool upper=False) -> ()");
}

namespace onebit {
namespace {

void add_products_meta(const AddProducts& o) { check_add_products<c10::SymInt>(o); }

void add_products_composite(const AddProducts& o) {
  check_add_products<int64_t>(o);
  o.sum.addmm_(o.a.to(at::kFloat).t(), o.b.to(at::kFloat));
}

}  // namespace

TORCH_LIBRARY_IMPL(onebit, Meta, m) { define<AddProducts, add_products_meta>(m); }
TORCH_LIBRARY_IMPL(onebit, ADInplaceOrView, m) { define_inplace<AddProducts>(m); }
TORCH_LIBRARY_IMPL(onebit, CompositeExplicitAutograd, m) {
  define<AddProducts, add_products_composite>(m);
}

}  // namespace onebit

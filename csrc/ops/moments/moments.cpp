// Sums of outer products, of which calibration is made: schema, Meta, versions, plain PyTorch.
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

void add_products_meta(const ProductOperands& o) { check_add_products<c10::SymInt>(o); }

void add_products_composite(const ProductOperands& o) {
  check_add_products<int64_t>(o);
  o.sum.addmm_(o.a.to(at::kFloat).t(), o.b.to(at::kFloat));
}

// Autograd looks at versions to tell whether what it saved is still what it was.
void add_products_counted(const ProductOperands& o, Below<void> below) {
  below();
  o.sum.unsafeGetTensorImpl()->bump_version();
}

}  // namespace

TORCH_LIBRARY_IMPL(onebit, Meta, m) { define<AddProducts, add_products_meta>(m); }
TORCH_LIBRARY_IMPL(onebit, ADInplaceOrView, m) {
  define_inplace<AddProducts, add_products_counted>(m);
}
TORCH_LIBRARY_IMPL(onebit, CompositeExplicitAutograd, m) {
  define<AddProducts, add_products_composite>(m);
}

}  // namespace onebit

// Products with 1-bit weights: their schemas; shapes without data (Meta); autocast; and linear and
// linear_prepacked, which are composed of them.
#include <ATen/TensorOperators.h>
#include <ATen/autocast_mode.h>
#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>

#include "prepacked.h"
#include "rules.h"

TORCH_LIBRARY_FRAGMENT(onebit, m) {
  m.def(
      "qmm(Tensor x, Tensor packed, Tensor scales, Tensor? biases, int group_size=128, "
      "bool transpose=True) -> Tensor");
  m.def(
      "gather_qmm(Tensor x, Tensor packed, Tensor scales, Tensor? biases, Tensor? lhs_indices, "
      "Tensor? rhs_indices, int group_size=128, bool transpose=True, bool sorted_indices=False) -> "
      "Tensor");
  // Weights in the order in which the kernels of a device read them, and back (biases are empty
  // where there were none); the product with them.
  m.def("prepack(Tensor packed, Tensor scales, Tensor? biases, int group_size=128) -> Tensor");
  m.def(
      "unprepack(Tensor prepacked, int rows, int columns, int group_size, ScalarType dtype, "
      "bool symmetric) -> (Tensor packed, Tensor scales, Tensor biases)");
  m.def(
      "qmm_prepacked(Tensor x, Tensor prepacked, int rows, int columns, int group_size, "
      "ScalarType dtype, bool symmetric) -> Tensor");
  // Two or three, each with its number of rows: one call for products that read the same x.
  m.def(
      "qmm_prepacked_each(Tensor x, Tensor[] prepacked, int[] rows, int columns, int group_size, "
      "ScalarType dtype, bool symmetric) -> (Tensor, Tensor, Tensor)");
  m.def(
      "linear(Tensor x, Tensor packed, Tensor scales, Tensor? biases, Tensor? bias, "
      "int group_size=128) -> Tensor");
  m.def(
      "linear_prepacked(Tensor x, Tensor prepacked, Tensor? bias, int rows, int columns, "
      "int group_size, ScalarType dtype, bool symmetric) -> Tensor");
  // The backward pass of qmm and gather_qmm for scales and biases; the one for x is the same
  // product with transpose flipped.
  m.def(
      "affine_grad(Tensor grad, Tensor x, Tensor packed, Tensor? lhs_indices, Tensor? rhs_indices, "
      "int group_size=128, bool transpose=True) -> (Tensor grad_scales, Tensor grad_biases)");
}

namespace onebit {
namespace {

using c10::SymInt;

Tensor product_meta(const Operands& o) {
  const auto shape = check_product<SymInt>(o);
  return at::empty_symint(shape.y, o.x.options());
}

LevelGrads affine_grad_meta(const AffineGrad& o) {
  check_affine_grad<SymInt>(o);
  const auto sizes = levels_shape<SymInt>(o.packed, o.group_size);
  const auto options = o.x.options().dtype(sum_type(o.x));
  return {at::empty_symint(sizes, options), at::empty_symint(sizes, options)};
}

Tensor prepacked_meta(const QmmPrepacked& o) {
  return at::empty_symint(check_qmm_prepacked<SymInt>(o), o.x.options());
}

QmmPrepackedEach::Result each_meta(const QmmPrepackedEach& o) {
  return map_each(o, prepacked_meta);
}

Canonical unprepack_meta(const Unprepack& w) {
  check_prepacked(w);
  const auto options = w.bytes.options();
  const int64_t groups = w.columns / w.group_size;
  return {at::empty({w.rows, w.columns / kWordBits}, options.dtype(at::kInt)),
          at::empty({w.rows, groups}, options.dtype(w.dtype)),
          at::empty({w.symmetric ? 0 : w.rows, groups}, options.dtype(w.dtype))};
}

// x takes the region's dtype, as in F.linear; scales and biases keep theirs, for a kernel reads any
// mix of dtypes and converting them would cost a pass per call.
template <class Op>
typename Op::Result in_region(const Op& o) {
  check_dense("x", o.x);  // converting reads it
  const auto device = o.x.device().type();
  c10::impl::ExcludeDispatchKeyGuard no_autocast(
      at::autocast::get_autocast_dispatch_key_from_device_type(device));
  const auto type = at::autocast::get_autocast_dtype(device);
  return call(with_x(o, at::autocast::cached_cast(type, o.x, device)));
}

struct Linear {
  static constexpr const char* kName = "onebit::linear";
  using Result = Tensor;
  const Tensor& x;
  const Tensor& packed;
  const Tensor& scales;
  const OptionalTensor& biases;
  const OptionalTensor& bias;
  int64_t group_size;
  auto fields() const { return std::tie(x, packed, scales, biases, bias, group_size); }
  Qmm product() const { return {x, packed, scales, biases, group_size}; }
};

struct LinearPrepacked {
  static constexpr const char* kName = "onebit::linear_prepacked";
  using Result = Tensor;
  const Tensor& x;
  const Tensor& bytes;
  const OptionalTensor& bias;
  int64_t rows, columns;
  int64_t group_size;
  at::ScalarType dtype;
  bool symmetric;
  auto fields() const {
    return std::tie(x, bytes, bias, rows, columns, group_size, dtype, symmetric);
  }
  QmmPrepacked product() const { return {x, bytes, rows, columns, group_size, dtype, symmetric}; }
};

template <class Op>
Tensor linear(const Op& o) {
  const auto y = call(o.product());
  if (!o.bias) return y;
  check_values("bias", *o.bias);
  check_sizes<SymInt>("bias", *o.bias, {y.sym_size(-1)}, " (one per output)");
  return y + o.bias->to(y.scalar_type());
}

void define_autocast(torch::Library& m) {
  define<Qmm, in_region<Qmm>>(m);
  define<GatherQmm, in_region<GatherQmm>>(m);
}

void define_linear(torch::Library& m) {
  define<Linear, linear<Linear>>(m);
  define<LinearPrepacked, linear<LinearPrepacked>>(m);
}

}  // namespace

TORCH_LIBRARY_IMPL(onebit, Meta, m) {
  define<Qmm, product_meta>(m);
  define<GatherQmm, product_meta>(m);
  define<QmmPrepacked, prepacked_meta>(m);
  define<QmmPrepackedEach, each_meta>(m);
  define<Unprepack, unprepack_meta>(m);
  define<AffineGrad, affine_grad_meta>(m);
}

TORCH_LIBRARY_IMPL(onebit, AutocastCPU, m) {
  define_autocast(m);
  define<QmmPrepacked, in_region<QmmPrepacked>>(m);
  define<QmmPrepackedEach, in_region<QmmPrepackedEach>>(m);
}
TORCH_LIBRARY_IMPL(onebit, AutocastMPS, m) { define_autocast(m); }
TORCH_LIBRARY_IMPL(onebit, AutocastCUDA, m) { define_autocast(m); }
TORCH_LIBRARY_IMPL(onebit, AutocastXPU, m) { define_autocast(m); }

TORCH_LIBRARY_IMPL(onebit, CompositeImplicitAutograd, m) { define_linear(m); }
// torch.vmap does not look there by itself: what they are made of has the rules.
TORCH_LIBRARY_IMPL(onebit, FuncTorchBatchedDecomposition, m) {
  define_linear(m);
  define<QmmPrepackedEach, one_by_one>(m);
}

}  // namespace onebit

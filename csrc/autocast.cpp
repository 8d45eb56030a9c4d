// Autocast: x takes the region's dtype, as in F.linear; scales and biases keep theirs, for a kernel
// reads any mix of dtypes and converting them would cost a pass per call.
#include <ATen/autocast_mode.h>
#include <torch/library.h>

#include "ops.h"

namespace onebit {
namespace {

template <c10::DeviceType device, c10::DispatchKey key>
struct Autocast {
  static Tensor cast(const Tensor& x) {
    check_dense("x", x);  // converting reads it
    return at::autocast::cached_cast(at::autocast::get_autocast_dtype(device), x, device);
  }

  static Tensor qmm(const Tensor& x,
                    const Tensor& packed,
                    const Tensor& scales,
                    const OptionalTensor& biases,
                    int64_t group_size,
                    bool transpose) {
    c10::impl::ExcludeDispatchKeyGuard no_autocast(key);
    return ops::qmm().call(cast(x), packed, scales, biases, group_size, transpose);
  }

  static Tensor qmm_prepacked(const Tensor& x,
                              const Tensor& packed,
                              const Tensor& scales,
                              const OptionalTensor& biases,
                              const Tensor& prepacked,
                              int64_t group_size) {
    c10::impl::ExcludeDispatchKeyGuard no_autocast(key);
    return ops::qmm_prepacked().call(cast(x), packed, scales, biases, prepacked, group_size);
  }

  static Tensor gather_qmm(const Tensor& x,
                           const Tensor& packed,
                           const Tensor& scales,
                           const OptionalTensor& biases,
                           const OptionalTensor& lhs_indices,
                           const OptionalTensor& rhs_indices,
                           int64_t group_size,
                           bool transpose,
                           bool sorted_indices) {
    c10::impl::ExcludeDispatchKeyGuard no_autocast(key);
    return ops::gather_qmm().call(cast(x), packed, scales, biases, lhs_indices, rhs_indices,
                                  group_size, transpose, sorted_indices);
  }

  static void define(torch::Library& m) {
    m.impl("qmm", &qmm);
    m.impl("qmm_prepacked", &qmm_prepacked);
    m.impl("gather_qmm", &gather_qmm);
  }
};

}  // namespace

using c10::DeviceType;
using c10::DispatchKey;

TORCH_LIBRARY_IMPL(onebit, AutocastCPU, m) {
  Autocast<DeviceType::CPU, DispatchKey::AutocastCPU>::define(m);
}
TORCH_LIBRARY_IMPL(onebit, AutocastMPS, m) {
  Autocast<DeviceType::MPS, DispatchKey::AutocastMPS>::define(m);
}
TORCH_LIBRARY_IMPL(onebit, AutocastCUDA, m) {
  Autocast<DeviceType::CUDA, DispatchKey::AutocastCUDA>::define(m);
}
TORCH_LIBRARY_IMPL(onebit, AutocastXPU, m) {
  Autocast<DeviceType::XPU, DispatchKey::AutocastXPU>::define(m);
}

}  // namespace onebit

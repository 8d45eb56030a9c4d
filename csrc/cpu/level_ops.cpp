// The operators of ../ops/levels on the CPU: whole groups, split among threads.
#include <ATen/ops/empty.h>
#include <torch/library.h>

#include <tuple>

#include "../ops/levels/rules.h"
#include "levels.h"
#include "parallel.h"
#include "tensors.h"

namespace onebit::cpu {
namespace {

// Values below which a second thread costs more than it saves (fork and join take 30 us when cold).
constexpr int64_t kValuesPerTask = 1 << 16;

template <class F>
void for_groups(int64_t groups, int64_t group_size, const F& f) {
  in_parallel(0, groups, kValuesPerTask / group_size, f);
}

LevelsArgs levels_args(const Tensor& contiguous_w, c10::string_view rule, int64_t group_size) {
  return {contiguous_w.const_data_ptr(),
          dtype_of(contiguous_w),
          rule_of(rule),
          int(group_size),
          nullptr,
          1};
}

std::tuple<Tensor, Tensor, Tensor> quantize_levels_cpu(const Tensor& w,
                                                       c10::string_view rule,
                                                       int64_t group_size,
                                                       const OptionalTensor& importance) {
  const auto shape = check_quantize_levels<int64_t>(w, rule, group_size, importance);
  auto packed = at::empty(shape.packed, w.options().dtype(at::kInt));
  auto scales = at::empty(shape.scales, w.options());
  auto biases = at::empty(shape.scales, w.options());
  const auto values = w.contiguous();
  auto args = levels_args(values, rule, group_size);
  Tensor weights;
  if (importance) {
    weights = importance->to(at::kFloat).contiguous();
    args.importance = weights.const_data_ptr<float>();
    args.period = std::max<int64_t>(weights.numel() / group_size, 1);
  }
  const QuantizeLevelsOut out{static_cast<uint32_t*>(packed.mutable_data_ptr()),
                              scales.mutable_data_ptr(), biases.mutable_data_ptr()};
  for_groups(scales.numel(), group_size, [&](int64_t begin, int64_t end) {
    kernels().levels->quantize(args, out, begin, end);
  });
  return {packed, scales, biases};
}

Tensor fake_quantize_cpu(const Tensor& w,
                         c10::string_view rule,
                         int64_t group_size,
                         OptionalType dtype) {
  check_quantize_levels<int64_t>(w, rule, group_size, std::nullopt);
  check_output_type(dtype);
  auto out = at::empty(w.sizes(), w.options().dtype(dtype.value_or(w.scalar_type())));
  const auto values = w.contiguous();
  const auto args = levels_args(values, rule, group_size);
  for_groups(w.numel() / group_size, group_size, [&](int64_t begin, int64_t end) {
    kernels().levels->fake_quantize(args, out.mutable_data_ptr(), dtype_of(out), begin, end);
  });
  return out;
}

Tensor fake_quantize_backward_cpu(const Tensor& grad,
                                  const Tensor& w,
                                  c10::string_view rule,
                                  int64_t group_size) {
  check_quantize_levels<int64_t>(w, rule, group_size, std::nullopt);
  check_gradient<int64_t>(grad, w);
  auto grad_w = at::empty(w.sizes(), w.options());
  const auto values = w.contiguous(), grads = grad.contiguous();
  const auto args = levels_args(values, rule, group_size);
  for_groups(w.numel() / group_size, group_size, [&](int64_t begin, int64_t end) {
    kernels().levels->fake_quantize_backward(args, grads.const_data_ptr(), dtype_of(grads),
                                             grad_w.mutable_data_ptr(), begin, end);
  });
  return grad_w;
}

// The contiguous tensors behind AffineArgs.
struct AffineTensors {
  Tensor w, scales, biases;

  AffineTensors(const Tensor& w, const Tensor& scales, const Tensor& biases)
      : w(w.contiguous()), scales(scales.contiguous()), biases(biases.contiguous()) {}

  AffineArgs args(int64_t group_size) const {
    return {w.const_data_ptr(),      dtype_of(w),      scales.const_data_ptr(),
            biases.const_data_ptr(), dtype_of(scales), int(group_size)};
  }
};

Tensor fake_quantize_affine_cpu(const Tensor& w,
                                const Tensor& scales,
                                const Tensor& biases,
                                int64_t group_size,
                                OptionalType dtype) {
  check_affine<int64_t>(w, scales, biases, group_size);
  check_output_type(dtype);
  auto out = at::empty(w.sizes(), w.options().dtype(dtype.value_or(w.scalar_type())));
  const AffineTensors tensors(w, scales, biases);
  for_groups(scales.numel(), group_size, [&](int64_t begin, int64_t end) {
    kernels().levels->fake_quantize_affine(tensors.args(group_size), out.mutable_data_ptr(),
                                           dtype_of(out), begin, end);
  });
  return out;
}

std::tuple<Tensor, Tensor> fake_quantize_affine_backward_cpu(const Tensor& grad,
                                                             const Tensor& w,
                                                             const Tensor& scales,
                                                             const Tensor& biases,
                                                             int64_t group_size) {
  check_affine<int64_t>(w, scales, biases, group_size);
  check_gradient<int64_t>(grad, w);
  auto grad_scales = at::empty(scales.sizes(), scales.options());
  auto grad_biases = at::empty(scales.sizes(), scales.options());
  const AffineTensors tensors(w, scales, biases);
  const auto grads = grad.contiguous();
  for_groups(scales.numel(), group_size, [&](int64_t begin, int64_t end) {
    kernels().levels->fake_quantize_affine_backward(
        tensors.args(group_size), grads.const_data_ptr(), dtype_of(grads),
        grad_scales.mutable_data_ptr(), grad_biases.mutable_data_ptr(), begin, end);
  });
  return {grad_scales, grad_biases};
}

// A flip moves w_hat by d = +-scale and the loss by d^2 moments[j, j] - 2 d error[j].
template <class Real>
void flip_row(bool* bits,           // [k]
              const Real* scales,   // [k / group_size]
              const Real* moments,  // [k, k]
              Real* error,          // [end - begin], updated as bits flip
              Real* changes,        // [end - begin]
              int64_t k,
              int64_t begin,
              int64_t end,
              int64_t group_size) {
  for (int64_t j = begin; j < end; ++j) {
    const Real* row = moments + j * k;
    const Real scale = scales[j / group_size];
    const Real d = bits[j] ? -scale : scale;
    if (!(2 * d * error[j - begin] > d * d * row[j])) {
      changes[j - begin] = 0;
      continue;
    }
    bits[j] = !bits[j];
    changes[j - begin] = d;
    for (int64_t i = begin; i < end; ++i) error[i - begin] -= d * row[i];
  }
}

Tensor flip_bits_cpu(Tensor& bits,
                     const Tensor& error,
                     const Tensor& scales,
                     const Tensor& moments,
                     int64_t begin,
                     int64_t end,
                     int64_t group_size) {
  const auto sizes = check_flip_bits<int64_t>(bits, error, scales, moments, begin, end, group_size);
  auto changes = at::empty(sizes, error.options());
  const int64_t n = bits.size(0), k = bits.size(1);
  auto local = error.narrow(1, begin, end - begin).clone(at::MemoryFormat::Contiguous);
  const auto steps = scales.contiguous(), square = moments.contiguous();
  auto* flags = bits.mutable_data_ptr<bool>();
  const auto run = [&](auto zero) {
    using Real = decltype(zero);
    const auto* scale = steps.template const_data_ptr<Real>();
    const auto* moment = square.template const_data_ptr<Real>();
    auto* errors = local.template mutable_data_ptr<Real>();
    auto* change = changes.template mutable_data_ptr<Real>();
    in_parallel(0, n, 16, [&](int64_t first, int64_t last) {
      for (int64_t r = first; r < last; ++r) {
        const int64_t offset = r * (end - begin);
        flip_row(flags + r * k, scale + r * (k / group_size), moment, errors + offset,
                 change + offset, k, begin, end, group_size);
      }
    });
  };
  error.scalar_type() == at::kDouble ? run(double()) : run(float());
  return changes;
}

}  // namespace

TORCH_LIBRARY_IMPL(onebit, CPU, m) {
  m.impl("quantize_levels", &quantize_levels_cpu);
  m.impl("fake_quantize", &fake_quantize_cpu);
  m.impl("fake_quantize_backward", &fake_quantize_backward_cpu);
  m.impl("fake_quantize_affine", &fake_quantize_affine_cpu);
  m.impl("fake_quantize_affine_backward", &fake_quantize_affine_backward_cpu);
  m.impl("flip_bits_", &flip_bits_cpu);
}

}  // namespace onebit::cpu

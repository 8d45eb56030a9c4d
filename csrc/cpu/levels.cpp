// The operators of ../ops/levels on the CPU: whole groups, split among threads.
#include <ATen/ops/empty.h>
#include <torch/library.h>

#include "../ops/levels/rules.h"
#include "kernels/levels.h"
#include "parallel.h"
#include "tensors.h"

namespace onebit::cpu {
namespace {

// Values below which a second thread costs more than it saves (fork and join take 30 us when cold).
constexpr int64_t kValuesPerTask = 1 << 16;

template <class F>
void for_groups(const LevelOperands& o, const F& f) {
  in_parallel(0, o.w.numel() / o.group_size, kValuesPerTask / o.group_size, f);
}

// The operands as contiguous tensors, which they keep alive for the kernels.
struct Inputs {
  Tensor w, scales, biases, importance, grad;
  int group_size;
  c10::string_view rule;

  explicit Inputs(const LevelOperands& o)
      : w(o.w.contiguous()), group_size(int(o.group_size)), rule(o.rule) {
    if (o.given()) scales = o.scales->contiguous(), biases = o.biases->contiguous();
    if (o.importance) importance = o.importance->to(at::kFloat).contiguous();
    if (o.grad) grad = o.grad->contiguous();
  }

  LevelsArgs by_rule() const {
    LevelsArgs args{w.const_data_ptr(), dtype_of(w), rule_of(rule), group_size, nullptr, 1};
    if (importance.defined()) {
      args.importance = static_cast<const float*>(importance.const_data_ptr());
      args.period = std::max<int64_t>(importance.numel() / group_size, 1);
    }
    return args;
  }
  AffineArgs affine() const {
    return {w.const_data_ptr(),      dtype_of(w),      scales.const_data_ptr(),
            biases.const_data_ptr(), dtype_of(scales), group_size};
  }
};

QuantizedLevels quantize_levels_cpu(const LevelOperands& o) {
  const auto shape = check_choice<int64_t>(o);
  auto packed = at::empty(shape.packed, o.w.options().dtype(at::kInt));
  auto scales = at::empty(shape.scales, o.w.options());
  auto biases = at::empty(shape.scales, o.w.options());
  const Inputs in(o);
  const auto args = in.by_rule();
  const QuantizeLevelsOut out{static_cast<uint32_t*>(packed.mutable_data_ptr()),
                              scales.mutable_data_ptr(), biases.mutable_data_ptr()};
  for_groups(
      o, [&](int64_t begin, int64_t end) { kernels().levels->quantize(args, out, begin, end); });
  return {packed, scales, biases};
}

Tensor fake_quantize_cpu(const LevelOperands& o) {
  check_choice<int64_t>(o);
  auto result = at::empty(o.w.sizes(), o.w.options().dtype(o.result_type()));
  const Inputs in(o);
  auto* out = result.mutable_data_ptr();
  const DType type = dtype_of(result);
  const auto& levels = *kernels().levels;
  for_groups(o, [&](int64_t begin, int64_t end) {
    if (o.given()) {
      levels.fake_quantize_affine(in.affine(), out, type, begin, end);
    } else {
      levels.fake_quantize(in.by_rule(), out, type, begin, end);
    }
  });
  return result;
}

Tensor grad_w_cpu(const LevelOperands& o) {
  check_choice<int64_t>(o);
  auto grad_w = at::empty(o.w.sizes(), o.w.options());
  const Inputs in(o);
  for_groups(o, [&](int64_t begin, int64_t end) {
    kernels().levels->fake_quantize_backward(in.by_rule(), in.grad.const_data_ptr(),
                                             dtype_of(in.grad), grad_w.mutable_data_ptr(), begin,
                                             end);
  });
  return grad_w;
}

GradLevels grad_levels_cpu(const LevelOperands& o) {
  check_choice<int64_t>(o);
  auto grad_scales = at::empty(o.scales->sizes(), o.scales->options());
  auto grad_biases = at::empty(o.scales->sizes(), o.scales->options());
  const Inputs in(o);
  for_groups(o, [&](int64_t begin, int64_t end) {
    kernels().levels->fake_quantize_affine_backward(
        in.affine(), in.grad.const_data_ptr(), dtype_of(in.grad), grad_scales.mutable_data_ptr(),
        grad_biases.mutable_data_ptr(), begin, end);
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

Tensor flip_bits_cpu(const FlipBits& o) {
  const auto sizes = check_flip_bits<int64_t>(o);
  auto changes = at::empty(sizes, o.error.options());
  const int64_t n = o.bits.size(0), k = o.bits.size(1), width = o.end - o.begin;
  auto local = o.error.narrow(1, o.begin, width).clone(at::MemoryFormat::Contiguous);
  const auto steps = o.scales.contiguous(), square = o.moments.contiguous();
  auto* flags = o.bits.mutable_data_ptr<bool>();
  const auto run = [&](auto zero) {
    using Real = decltype(zero);
    const auto* scale = static_cast<const Real*>(steps.const_data_ptr());
    const auto* moment = static_cast<const Real*>(square.const_data_ptr());
    auto* errors = local.template mutable_data_ptr<Real>();
    auto* change = changes.template mutable_data_ptr<Real>();
    in_parallel(0, n, 16, [&](int64_t first, int64_t last) {
      for (int64_t r = first; r < last; ++r) {
        flip_row(flags + r * k, scale + r * (k / o.group_size), moment, errors + r * width,
                 change + r * width, k, o.begin, o.end, o.group_size);
      }
    });
  };
  o.error.scalar_type() == at::kDouble ? run(double()) : run(float());
  return changes;
}

Tensor descend_cpu(const Descend& o) {
  check_descend<int64_t>(o);
  const int64_t n = o.bits.size(0), k = o.bits.size(1);
  auto flips = at::empty({n}, o.bits.options().dtype(at::kLong));
  auto local = o.error.clone(at::MemoryFormat::Contiguous);
  const auto steps = o.scales.contiguous(), square = o.moments.contiguous();
  const DescentArgs args{o.error.scalar_type() == at::kDouble,
                         o.bits.mutable_data_ptr<bool>(),
                         local.mutable_data_ptr(),
                         steps.const_data_ptr(),
                         square.const_data_ptr(),
                         flips.mutable_data_ptr<int64_t>(),
                         k,
                         int(o.group_size),
                         o.sweeps};
  in_parallel(0, n, 32,
              [&](int64_t begin, int64_t end) { kernels().levels->descend(args, begin, end); });
  return flips;
}

}  // namespace

TORCH_LIBRARY_IMPL(onebit, CPU, m) {
  define<QuantizeLevels, quantize_levels_cpu>(m);
  define<FakeQuantize, fake_quantize_cpu>(m);
  define<FakeQuantizeAffine, fake_quantize_cpu>(m);
  define<FakeQuantizeBackward, grad_w_cpu>(m);
  define<FakeQuantizeAffineBackward, grad_levels_cpu>(m);
  define<FlipBits, flip_bits_cpu>(m);
  define<Descend, descend_cpu>(m);
}

}  // namespace onebit::cpu

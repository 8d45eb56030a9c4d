// qmm, gather_qmm and their gradient on the CPU: which matrix of x meets which matrix of weights,
// and how the work is split among threads.
#include <ATen/Parallel.h>
#include <ATen/ops/arange.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/zeros.h>
#include <torch/library.h>

#include <tuple>
#include <vector>

#include "indices.h"
#include "tensors.h"

namespace onebit::cpu {
namespace {

// Multiply-adds below which a product stays on one thread.
constexpr int64_t kMacsPerTask = 1 << 20;

// Output matrix b is x[x_index[b]] . w[w_index[b]].
struct Batches {
  std::vector<int64_t> x_index, w_index;
};

// 0, 1, 2, ... in the shape of t's leading dimensions, or the given indices, checked; then
// broadcast.
std::vector<int64_t> batch_index(const char* name,
                                 const OptionalTensor& indices,
                                 at::IntArrayRef matrices,
                                 at::IntArrayRef batch) {
  const int64_t count = c10::multiply_integers(matrices);
  const auto index = indices ? *indices : at::arange(count, at::kLong).reshape(matrices);
  return read_indices(name, index.expand(batch), count);
}

Batches batches_of(const QmmShape<int64_t>& shape,
                   const Tensor& x,
                   const Tensor& packed,
                   const OptionalTensor& lhs_indices,
                   const OptionalTensor& rhs_indices) {
  if (packed.dim() == 2 && !lhs_indices && !rhs_indices && shape.batch.empty()) return {{0}, {0}};
  const auto x_matrices = x.sizes().slice(0, std::max<int64_t>(x.dim() - 2, 0));
  const auto w_matrices = packed.sizes().slice(0, packed.dim() - 2);
  return {batch_index("lhs_indices", lhs_indices, x_matrices, shape.batch),
          batch_index("rhs_indices", rhs_indices, w_matrices, shape.batch)};
}

int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

Tensor product(const QmmShape<int64_t>& shape,
               const Tensor& x,
               const Tensor& packed,
               const Tensor& scales,
               const OptionalTensor& biases,
               const OptionalTensor& lhs_indices,
               const OptionalTensor& rhs_indices,
               int64_t group_size,
               bool transpose) {
  auto y = at::empty(shape.y, x.options());  // first: sizes beyond memory end here, not in a copy
  const auto batches = batches_of(shape, x, packed, lhs_indices, rhs_indices);
  if (y.numel() == 0) return y;
  const auto values = x.contiguous();
  const WeightTensors weights(packed, scales, biases, group_size);
  const auto& table = kernels();
  const auto run = transpose ? table.qmm_t : table.qmm_n;
  const int64_t x_bytes = shape.m * shape.k * x.element_size();
  const int64_t y_bytes = shape.m * shape.n * x.element_size();
  const auto args = [&](int64_t b) {
    return QmmArgs{static_cast<const char*>(values.const_data_ptr()) + batches.x_index[b] * x_bytes,
                   static_cast<char*>(y.mutable_data_ptr()) + b * y_bytes,
                   dtype_of(x),
                   shape.m,
                   shape.n,
                   shape.k,
                   weights.matrix(batches.w_index[b], transpose ? shape.n : shape.k)};
  };
  // Blocks of whole tiles, small enough that every thread gets a few. transpose=False works on
  // whole groups of columns.
  const int64_t n_tile = transpose ? table.n_tile : std::max<int64_t>(table.n_tile, 128);
  const int64_t n_step = ceil_div(ceil_div(shape.n, n_tile), 8) * n_tile;
  const int64_t m_step = ceil_div(ceil_div(shape.m, table.m_tile), 8) * table.m_tile;
  const int64_t n_blocks = ceil_div(shape.n, n_step), m_blocks = ceil_div(shape.m, m_step);
  const int64_t macs = std::max<int64_t>(m_step * n_step, 1) * std::max<int64_t>(shape.k, 1);
  const int64_t count = int64_t(batches.x_index.size()) * m_blocks * n_blocks;
  at::parallel_for(0, count, ceil_div(kMacsPerTask, macs), [&](int64_t begin, int64_t end) {
    for (int64_t task = begin; task < end; ++task) {
      const int64_t n = task % n_blocks * n_step;
      const int64_t m = task / n_blocks % m_blocks * m_step;
      run(args(task / n_blocks / m_blocks),
          {m, std::min(m + m_step, shape.m), n, std::min(n + n_step, shape.n)});
    }
  });
  return y;
}

Tensor qmm_cpu(const Tensor& x,
               const Tensor& packed,
               const Tensor& scales,
               const OptionalTensor& biases,
               int64_t group_size,
               bool transpose) {
  const auto shape = check_qmm<int64_t>(x, packed, scales, biases, group_size, transpose);
  return product(shape, x, packed, scales, biases, {}, {}, group_size, transpose);
}

Tensor gather_qmm_cpu(const Tensor& x,
                      const Tensor& packed,
                      const Tensor& scales,
                      const OptionalTensor& biases,
                      const OptionalTensor& lhs_indices,
                      const OptionalTensor& rhs_indices,
                      int64_t group_size,
                      bool transpose,
                      bool /*sorted_indices*/) {
  const auto shape = check_gather_qmm<int64_t>(x, packed, scales, biases, lhs_indices, rhs_indices,
                                               group_size, transpose);
  return product(shape, x, packed, scales, biases, lhs_indices, rhs_indices, group_size, transpose);
}

std::tuple<Tensor, Tensor> affine_grad_cpu(const Tensor& grad,
                                           const Tensor& x,
                                           const Tensor& packed,
                                           const OptionalTensor& lhs_indices,
                                           const OptionalTensor& rhs_indices,
                                           int64_t group_size,
                                           bool transpose) {
  const auto shape =
      check_affine_grad<int64_t>(grad, x, packed, lhs_indices, rhs_indices, group_size, transpose);
  const auto batches = batches_of(shape, x, packed, lhs_indices, rhs_indices);
  const auto sizes = levels_shape<int64_t>(packed, group_size);
  auto grad_scales = at::zeros(sizes, x.options().dtype(sum_type(x)));
  auto grad_biases = at::zeros(sizes, x.options().dtype(sum_type(x)));
  const auto values = x.contiguous(), grads = grad.contiguous(), words = packed.contiguous();
  const auto& table = kernels();
  const auto run = transpose ? table.affine_grad_t : table.affine_grad_n;
  const int64_t rows = packed.size(-2), word_count = packed.size(-1);
  const int64_t groups = word_count * kWordBits / group_size;
  const auto at_matrix = [](const Tensor& t, int64_t index, int64_t elements) {
    return static_cast<char*>(const_cast<void*>(t.const_data_ptr())) +
           index * elements * t.element_size();
  };
  const int64_t macs = std::max<int64_t>(shape.m * word_count * kWordBits, 1);
  at::parallel_for(0, rows, ceil_div(kMacsPerTask, macs), [&](int64_t begin, int64_t end) {
    for (size_t b = 0; b < batches.x_index.size();
         ++b) {  // in order: sums do not depend on threads
      const int64_t w = batches.w_index[b];
      run({at_matrix(grads, int64_t(b), shape.m * shape.n),
           at_matrix(values, batches.x_index[b], shape.m * shape.k), dtype_of(x),
           at_matrix(grad_scales, w, rows * groups), at_matrix(grad_biases, w, rows * groups),
           shape.m, shape.n, shape.k, words_of(words) + w * rows * word_count, int(group_size)},
          begin, end);
    }
  });
  return {grad_scales, grad_biases};
}

}  // namespace

TORCH_LIBRARY_IMPL(onebit, CPU, m) {
  m.impl("qmm", &qmm_cpu);
  m.impl("gather_qmm", &gather_qmm_cpu);
  m.impl("affine_grad", &affine_grad_cpu);
}

}  // namespace onebit::cpu

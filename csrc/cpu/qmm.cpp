// qmm, gather_qmm and their gradient on the CPU: which matrix of x meets which matrix of weights,
// and how the work is split among threads.
#include <ATen/ops/empty.h>
#include <ATen/ops/zeros.h>

#include <algorithm>
#include <numeric>
#include <vector>

#include "../ops/product/batch_indices.h"
#include "indices.h"
#include "parallel.h"
#include "tasks.h"
#include "tensors.h"

namespace onebit::cpu {
namespace {

// Output matrix b is x[x_index[b]] . w[w_index[b]].
struct Batches {
  std::vector<int64_t> x_index, w_index;
};

Batches batches_of(const QmmShape<int64_t>& shape, const Pairs& o) {
  const BatchIndices index(shape, o);
  if (!index.indexed()) return {{0}, {0}};
  return {read_indices("lhs_indices", index.x, index.x_matrices),
          read_indices("rhs_indices", index.w, index.w_matrices)};
}

// Rows [m_begin, m_end) of a product with one matrix of weights, which has rows [first, last): the
// order of its sums depends on how many those are, so a piece of it must know.
struct Piece {
  int64_t matrix;
  int64_t m_begin, m_end;
  int64_t first, last;
};

// All rows of x that meet one matrix of weights are one product, wherever they lie.
struct Plan {
  std::vector<int64_t> x_rows, y_rows;  // of all products, or empty: row i is row i
  std::vector<Piece> products;
};

Plan plan_of(const Batches& batches, int64_t m) {
  const int64_t count = int64_t(batches.x_index.size());
  if (count == 1 && batches.x_index[0] == 0) return {{}, {}, {{batches.w_index[0], 0, m, 0, m}}};
  std::vector<int64_t> order(count);
  std::iota(order.begin(), order.end(), 0);
  std::stable_sort(order.begin(), order.end(),
                   [&](int64_t a, int64_t b) { return batches.w_index[a] < batches.w_index[b]; });
  Plan plan;
  plan.x_rows.reserve(count * m);
  plan.y_rows.reserve(count * m);
  for (const int64_t b : order) {
    const int64_t row = int64_t(plan.x_rows.size());
    if (plan.products.empty() || plan.products.back().matrix != batches.w_index[b]) {
      plan.products.push_back({batches.w_index[b], row, row, row, row});
    }
    plan.products.back().m_end = plan.products.back().last = row + m;
    for (int64_t i = 0; i < m; ++i) {
      plan.x_rows.push_back(batches.x_index[b] * m + i);
      plan.y_rows.push_back(b * m + i);
    }
  }
  return plan;
}

// Where there are fewer tiles of columns than threads, rows are split too.
std::vector<Piece> split_rows(const std::vector<Piece>& products, int64_t tiles, int64_t m_tile) {
  const int64_t wanted = ceil_div(at::get_num_threads(), tiles * int64_t(products.size()));
  if (wanted <= 1) return products;
  std::vector<Piece> pieces;
  for (const auto& p : products) {
    const int64_t step = ceil_div(ceil_div(p.m_end - p.m_begin, wanted), m_tile) * m_tile;
    for (int64_t m = p.m_begin; m < p.m_end; m += step) {
      pieces.push_back({p.matrix, m, std::min(m + step, p.m_end), p.first, p.last});
    }
  }
  return pieces;
}

Tensor product_cpu(const Operands& o) {
  const auto shape = check_product<int64_t>(o);
  const Tensor& x = o.x;
  auto y = at::empty(shape.y, x.options());  // first: sizes beyond memory end here, not in a copy
  const auto batches = batches_of(shape, o);
  if (y.numel() == 0) return y;
  const auto values = x.contiguous();
  const WeightTensors weights(o.packed, o.scales, o.biases, o.group_size);
  const auto& table = kernels();
  const bool transpose = o.transpose;
  const auto run = transpose ? table.qmm_t : table.qmm_n;
  // transpose=False works on whole groups of columns.
  const int64_t n_tile = transpose ? table.n_tile : std::max<int64_t>(table.n_tile, 128);
  const int64_t tiles = ceil_div(shape.n, n_tile);
  const auto plan = plan_of(batches, shape.m);
  const auto pieces = split_rows(plan.products, tiles, table.m_tile);
  int64_t tasks = 0;  // a task: one row of x times one tile of columns
  for (const auto& p : pieces) tasks += (p.m_end - p.m_begin) * tiles;
  const int64_t grain = ceil_div(kMacsPerTask, std::max<int64_t>(n_tile * shape.k, 1));
  in_parallel(0, tasks, grain, [&](int64_t begin, int64_t end) {
    int64_t first_task = 0;  // of the piece
    for (const auto& p : pieces) {
      // A tile goes to the thread that has its first task; no thread's tile is split.
      const int64_t rows = p.m_end - p.m_begin;
      const int64_t first = std::clamp<int64_t>(ceil_div(begin - first_task, rows), 0, tiles);
      const int64_t last = std::clamp<int64_t>(ceil_div(end - first_task, rows), 0, tiles);
      first_task += rows * tiles;
      if (first >= last) continue;
      QmmArgs args{values.const_data_ptr(),
                   y.mutable_data_ptr(),
                   dtype_of(x),
                   p.last - p.first,
                   shape.n,
                   shape.k,
                   weights.matrix(p.matrix, transpose ? shape.n : shape.k)};
      if (!plan.x_rows.empty()) {
        args.x_rows = plan.x_rows.data() + p.first;
        args.y_rows = plan.y_rows.data() + p.first;
      }
      run(args, {p.m_begin - p.first, p.m_end - p.first, first * n_tile,
                 std::min(last * n_tile, shape.n)});
    }
  });
  return y;
}

LevelGrads affine_grad_cpu(const AffineGrad& o) {
  const auto shape = check_affine_grad<int64_t>(o);
  const Tensor &x = o.x, &packed = o.packed;
  const int64_t group_size = o.group_size;
  const auto batches = batches_of(shape, o.pairs());
  const auto sizes = levels_shape<int64_t>(packed, group_size);
  auto grad_scales = at::zeros(sizes, x.options().dtype(sum_type(x)));
  auto grad_biases = at::zeros(sizes, x.options().dtype(sum_type(x)));
  const auto values = x.contiguous(), grads = o.grad.contiguous(), words = packed.contiguous();
  const auto& table = kernels();
  const auto run = o.transpose ? table.affine_grad_t : table.affine_grad_n;
  const int64_t rows = packed.size(-2), word_count = packed.size(-1);
  const int64_t groups = word_count * kWordBits / group_size;
  const auto at_matrix = [](auto* data, const Tensor& t, int64_t index, int64_t elements) {
    return data + index * elements * t.element_size();
  };
  const auto* grad_data = static_cast<const char*>(grads.const_data_ptr());
  const auto* x_data = static_cast<const char*>(values.const_data_ptr());
  auto* scales_data = static_cast<char*>(grad_scales.mutable_data_ptr());
  auto* biases_data = static_cast<char*>(grad_biases.mutable_data_ptr());
  const int64_t macs = std::max<int64_t>(shape.m * word_count * kWordBits, 1);
  in_parallel(0, rows, ceil_div(kMacsPerTask, macs), [&](int64_t begin, int64_t end) {
    for (size_t b = 0; b < batches.x_index.size();
         ++b) {  // in order: sums do not depend on threads
      const int64_t w = batches.w_index[b];
      run({at_matrix(grad_data, grads, int64_t(b), shape.m * shape.n),
           at_matrix(x_data, values, batches.x_index[b], shape.m * shape.k), dtype_of(x),
           at_matrix(scales_data, grad_scales, w, rows * groups),
           at_matrix(biases_data, grad_biases, w, rows * groups), shape.m, shape.n, shape.k,
           words_of(words) + w * rows * word_count, int(group_size)},
          begin, end);
    }
  });
  return {grad_scales, grad_biases};
}

}  // namespace

TORCH_LIBRARY_IMPL(onebit, CPU, m) {
  define<Qmm, product_cpu>(m);
  define<GatherQmm, product_cpu>(m);
  define<AffineGrad, affine_grad_cpu>(m);
}

}  // namespace onebit::cpu

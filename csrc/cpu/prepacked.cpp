// prepack, unprepack and qmm_prepacked on the CPU.
#include "kernels/prepacked.h"

#include <ATen/ops/empty.h>

#include <algorithm>
#include <cstring>

#include "../ops/product/operands.h"
#include "../ops/product/prepacked.h"
#include "large_pages.h"
#include "parallel.h"
#include "tasks.h"
#include "tensors.h"

namespace onebit::cpu {
namespace {

constexpr int64_t kRowsPerTask = 64;  // that are worth a second thread when they are copied

Tensor prepack_cpu(const Prepack& o) {
  check_prepack<int64_t>(o);
  const WeightTensors weights(o.packed, o.scales, o.biases, o.group_size);
  const auto w = weights.matrix(0, o.packed.size(0));
  auto out = zeros_in_large_pages(PrepackedLayout(w).bytes());
  char* data = static_cast<char*>(out.mutable_data_ptr());
  const PrepackedHeader header(w, o.biases.has_value());
  std::memcpy(data, &header, sizeof header);
  in_parallel(0, w.rows, kRowsPerTask,
              [&](int64_t begin, int64_t end) { prepack(w, data, begin, end); });
  return out;
}

Tensor prepack_meta(const Prepack& o) {
  check_prepack<c10::SymInt>(o);
  const auto bytes = PrepackedLayout::bytes<c10::SymInt>(
      o.packed.sym_size(0), o.packed.sym_size(1) * kWordBits, int(o.group_size),
      o.scales.element_size(), o.biases.has_value());
  return at::empty_symint({bytes}, o.packed.options().dtype(at::kByte));
}

// The sizes of prepacked weights, whose bytes say the same.
Weights sizes_of(const Unprepack& p) {
  const char* data = static_cast<const char*>(p.bytes.const_data_ptr());
  const Weights w{nullptr,           nullptr, p.symmetric ? nullptr : data,
                  dtype_of(p.dtype), p.rows,  p.columns,
                  int(p.group_size)};
  const PrepackedHeader header(w, !p.symmetric);
  // Bytes of a bit per weight at least: sizes of which the rest holds do not overflow.
  const bool same = p.bytes.numel() >= int64_t(sizeof header) &&
                    std::memcmp(data, &header, sizeof header) == 0 &&
                    (p.rows == 0 || p.columns <= 8 * p.bytes.numel() / p.rows) &&
                    p.bytes.numel() == PrepackedLayout(w).bytes();
  TORCH_CHECK_VALUE(same, "prepacked must be what prepack of this version made of [", p.rows, ", ",
                    p.columns, "] weights in groups of ", p.group_size, " with ", p.dtype,
                    p.symmetric ? " scales" : " scales and biases", ", got ", p.bytes.numel(),
                    " bytes of something else");
  return w;
}

Canonical unprepack_cpu(const Unprepack& p) {
  check_prepacked(p);
  const auto w = sizes_of(p);
  const auto options = p.bytes.options();
  const int64_t groups = p.columns / p.group_size;
  auto packed = at::empty({p.rows, p.columns / kWordBits}, options.dtype(at::kInt));
  auto scales = at::empty({p.rows, groups}, options.dtype(p.dtype));
  auto biases = at::empty({p.symmetric ? 0 : p.rows, groups}, options.dtype(p.dtype));
  const auto bytes = [](const Tensor& t) { return static_cast<char*>(t.mutable_data_ptr()); };
  const CanonicalBytes<char> out{bytes(packed), bytes(scales), bytes(biases)};
  const char* data = static_cast<const char*>(p.bytes.const_data_ptr());
  in_parallel(0, p.rows, kRowsPerTask,
              [&](int64_t begin, int64_t end) { unprepack(w, data, out, begin, end); });
  return {packed, scales, biases};
}

Tensor product_of_unpacked(const Tensor& x, const Unprepack& p) {
  const auto [packed, scales, all_biases] = unprepack_cpu(p);
  const auto biases = p.symmetric ? std::nullopt : OptionalTensor(all_biases);
  return call(Qmm{x, packed, scales, biases, p.group_size});
}

struct Product {
  QmmArgs args;
  const char* data;
  int64_t tiles;
};
using Products = c10::SmallVector<Product, 3>;  // q, k and v

// The result of a product, which is done here where there is no kernel of it, else added to `todo`.
// `shape` is of the result, `values` x made contiguous.
Tensor plan_product(const QmmPrepacked& o,
                    const Sizes<int64_t>& shape,
                    const Tensor& values,
                    Products& todo) {
  const auto p = o.weights();
  const auto w = sizes_of(p);
  const auto& table = kernels();
  const int64_t n = p.rows, k = p.columns, m = n ? c10::multiply_integers(shape) / n : 0;
  if (!table.qmm_prepacked) {
    TORCH_WARN_ONCE("torch_onebit has no kernel of qmm_prepacked among the ", table.name,
                    " ones: weights are unpacked for every call, correctly and slowly");
    return product_of_unpacked(o.x, p);
  }
  auto y = at::empty(shape, o.x.options());
  const QmmArgs args{values.const_data_ptr(), y.mutable_data_ptr(), dtype_of(o.x), m, n, k, w};
  if (m == 0 || k == 0 || needs_scalar(args)) return product_of_unpacked(o.x, p);
  todo.push_back({args, static_cast<const char*>(p.bytes.const_data_ptr()),
                  ceil_div(n, PrepackedLayout::kTileRows)});
  return y;
}

// All in one parallel region: their tiles are counted through.
void run(const Products& products) {
  if (products.empty()) return;
  constexpr int64_t kTile = PrepackedLayout::kTileRows;
  const auto& table = kernels();
  const int64_t m = products[0].args.m, k = products[0].args.k;
  int64_t tiles = 0;
  for (const auto& p : products) tiles += p.tiles;
  // Where there are fewer tiles of outputs than threads, rows of x are split too.
  const int64_t row_tiles = ceil_div(m, table.m_tile);
  const int64_t parts = std::min(ceil_div(at::get_num_threads(), tiles), row_tiles);
  const int64_t step = ceil_div(row_tiles, parts) * table.m_tile;
  const int64_t grain = ceil_div(kMacsPerTask, kTile * k * std::min(step, m));
  in_parallel(0, ceil_div(m, step) * tiles, grain, [&](int64_t begin, int64_t end) {
    while (begin < end) {
      const int64_t part = begin / tiles, at = begin % tiles;
      const int64_t count = std::min(tiles - at, end - begin);
      int64_t tile = 0;  // the first of a product
      for (const auto& p : products) {
        const int64_t first = std::max<int64_t>(at - tile, 0);
        const int64_t last = std::min(at + count - tile, p.tiles);
        tile += p.tiles;
        if (first >= last) continue;
        table.qmm_prepacked(p.args, p.data,
                            {part * step, std::min((part + 1) * step, m), first * kTile,
                             std::min(last * kTile, p.args.n)});
      }
      begin += count;
    }
  });
}

Tensor qmm_prepacked_cpu(const QmmPrepacked& o) {
  const auto shape = check_qmm_prepacked<int64_t>(o);
  const auto values = o.x.contiguous();
  Products products;
  auto y = plan_product(o, shape, values, products);
  run(products);
  return y;
}

QmmPrepackedEach::Result each_cpu(const QmmPrepackedEach& o) {
  Tensor values;
  Products products;
  auto results = map_each(o, [&](const QmmPrepacked& product) {
    const auto shape = check_qmm_prepacked<int64_t>(product);
    if (!values.defined()) values = o.x.contiguous();
    return plan_product(product, shape, values, products);
  });
  run(products);
  return results;
}

}  // namespace

TORCH_LIBRARY_IMPL(onebit, CPU, m) {
  define<Prepack, prepack_cpu>(m);
  define<Unprepack, unprepack_cpu>(m);
  define<QmmPrepacked, qmm_prepacked_cpu>(m);
  define<QmmPrepackedEach, each_cpu>(m);
}

// Here and not with the schema: only this device prepacks, and its layout is its own.
TORCH_LIBRARY_IMPL(onebit, Meta, m) { define<Prepack, prepack_meta>(m); }

}  // namespace onebit::cpu

// The operators of ../ops/moments on matrix units, by the micro-kernel that torch has for them:
// bfloat16 products, float32 sums. Without such units float32 products are faster, and exact.
#include <ATen/native/CPUBlas.h>
#include <ATen/ops/empty.h>
#include <torch/library.h>

#include <algorithm>
#include <cstring>

#include "../ops/moments/rules.h"
#include "parallel.h"

namespace onebit::cpu {
namespace {

constexpr int64_t kTile = 64;    // rows and columns of sum per call
constexpr int64_t kRows = 1024;  // of a and b: a tile of each fits the second-level cache
constexpr int64_t kSkew = 32;    // so that the rows of a tile do not share a set of the first one

bool has_matrix_units() { return at::native::cpublas::could_pack(at::kBFloat16); }

constexpr int64_t tiles(int64_t count) { return (count + kTile - 1) / kTile; }

// kTile x kTile of a matrix with `stride`, of which there are count rows and width columns.
struct Block {
  uint16_t values[kTile][kTile];

  Block(const uint16_t* from, int64_t stride, int64_t count, int64_t width) {
    if (count < kTile || width < kTile) std::memset(values, 0, sizeof values);
    for (int64_t r = 0; r < std::min(count, kTile); ++r) {
      std::memcpy(values[r], from + r * stride, size_t(width) * sizeof(uint16_t));
    }
  }
};

// Rows [0, count) of a tile's columns, as pairs of rows side by side: [padded / 2][kTile][2].
void pack_pairs(const uint16_t* from, int64_t stride, int64_t count, int64_t width, uint16_t* to) {
  for (int64_t begin = 0; begin < count; begin += kTile) {
    const Block block(from + begin * stride, stride, count - begin, width);
    for (int64_t r = 0; r < kTile; r += 2, to += 2 * kTile) {
      for (int64_t c = 0; c < kTile; ++c) {
        to[2 * c] = block.values[r][c];
        to[2 * c + 1] = block.values[r + 1][c];
      }
    }
  }
}

// The same columns as rows: [kTile][count + kSkew].
void transpose(const uint16_t* from, int64_t stride, int64_t count, int64_t width, uint16_t* to) {
  const int64_t pitch = tiles(count) * kTile + kSkew;
  for (int64_t begin = 0; begin < count; begin += kTile) {
    const Block block(from + begin * stride, stride, count - begin, width);
    for (int64_t c = 0; c < kTile; ++c) {
      for (int64_t r = 0; r < kTile; ++r) to[c * pitch + begin + r] = block.values[r][c];
    }
  }
}

void add_products_cpu(const AddProducts& o, Below<void> below) {
  if (!has_matrix_units()) return below();
  check_add_products<int64_t>(o);
  const auto& [sum, a, b, upper] = o;
  const int64_t n = sum.size(0), k = sum.size(1), m = a.size(0);
  if (n == 0 || k == 0 || m == 0) return;
  const auto left = a.contiguous(), right = b.contiguous();
  const auto* rows = static_cast<const uint16_t*>(left.const_data_ptr());
  const auto* columns = static_cast<const uint16_t*>(right.const_data_ptr());
  auto* out = sum.mutable_data_ptr<float>();
  const int64_t tile_values = kTile * std::min(kRows, tiles(m) * kTile);
  const auto packed = at::empty({tiles(k), tile_values}, right.options());
  auto* pairs = static_cast<at::BFloat16*>(packed.mutable_data_ptr());
  for (int64_t begin = 0; begin < m; begin += kRows) {
    const int64_t count = std::min(kRows, m - begin), padded = tiles(count) * kTile;
    in_parallel(0, tiles(k), 1, [&](int64_t first, int64_t last) {
      for (int64_t t = first; t < last; ++t) {
        pack_pairs(columns + begin * k + t * kTile, k, count, std::min(kTile, k - t * kTile),
                   reinterpret_cast<uint16_t*>(pairs + t * tile_values));
      }
    });
    in_parallel(0, tiles(n), 1, [&](int64_t first, int64_t last) {
      const auto buffer = at::empty({tile_values + kTile * kSkew}, right.options());
      auto* tile = static_cast<at::BFloat16*>(buffer.mutable_data_ptr());
      for (int64_t i = first; i < last; ++i) {
        const int64_t height = std::min(kTile, n - i * kTile);
        transpose(rows + begin * n + i * kTile, n, count, height,
                  reinterpret_cast<uint16_t*>(tile));
        for (int64_t t = o.upper ? i : 0; t < tiles(k); ++t) {
          at::native::cpublas::brgemm(height, std::min(kTile, k - t * kTile), padded,
                                      padded + kSkew, kTile, k, true, tile, pairs + t * tile_values,
                                      out + i * kTile * k + t * kTile);
        }
      }
      at::native::cpublas::brgemm_release();
    });
  }
}

}  // namespace

TORCH_LIBRARY_FRAGMENT(onebit, m) { m.def("has_matrix_units() -> bool", &has_matrix_units); }
TORCH_LIBRARY_IMPL(onebit, CPU, m) { define_above_composite<AddProducts, add_products_cpu>(m); }

}  // namespace onebit::cpu

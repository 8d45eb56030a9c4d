// transpose=False, y[m, n] = sum_k x[m, k] * (scale[k, g] * bit[k, n] + bias[k, g]), g the group of
// column n: the product of the backward pass.
//
// Within one group of columns both levels belong to the activation: x[m, k] * (scale[k, g] +
// bias[k, g]) for a set bit, x[m, k] * bias[k, g] for a clear one. Sums of one or the other are a
// lookup once the bits of 32 rows k of a column lie in one word. `pack_columns` transposes them so,
// a unit of 128 rows at a time; tables serve one group of columns. A level of zero blanks its
// activation, and nothing is subtracted that was added: floats are accurate enough.
#pragma once

#include "qmm-inl.h"

namespace onebit::cpu {
namespace {

constexpr int kUnit = 128;  // rows of w in one lookup pass
constexpr int kUnitWords = kUnit / kWordBits;
constexpr int64_t kColumnPanel = 1024;
constexpr int kRowChunk = 512;

// kM rows of x, one unit of k, all columns of a panel.
template <class L, int kM, int kGroup>
void add_unit(const QmmArgs& a,
              int64_t m,
              int64_t k,
              int64_t columns,
              const uint32_t* index,
              const float* scales,  // [groups][kRowChunk]
              const float* biases,
              float* table,
              float* acc,
              int64_t ld) {
  constexpr int kTiles = kGroup / L::kRows;
  static_assert(kTiles * L::kRows == kGroup, "a tile must lie in one group");
  const auto x = activations(a);
  alignas(64) float values[kM][kUnit], clear[kUnit], set[kUnit];
  const int64_t count = at_most(kUnit, a.k - k);
  for (int i = 0; i < kM; ++i) {
    for (int j = 0; j < kUnit; j += L::kLanes) {
      L::store(values[i] + j, L::load_as(x.data, x.dtype, x.offset(m + i, k + j), count - j));
    }
  }
  for (int64_t n = 0; n < columns; n += kGroup) {
    for (int i = 0; i < kM; ++i) {
      ONEBIT_UNROLL
      for (int j = 0; j < kUnit; j += L::kLanes) {
        const auto v = L::load(values[i] + j), scale = L::load(scales + j);
        const auto bias = L::load(biases + j);
        // An infinite scale makes a level of neither bit.
        L::store(clear + j, L::mul(v, L::fma(scale, L::zero(), bias)));
        L::store(set + j, L::mul(v, L::add(scale, bias)));
      }
      L::template build<kM, kUnitWords>({clear, set}, i, table);
    }
    for (int t = 0; t < kTiles; ++t, index += L::index_size(kUnitWords), acc += L::kRows) {
      typename L::Vec sum[kM][L::kVectors];
      collect<L, kM, kUnitWords>(index, table, sum);
      ONEBIT_UNROLL
      for (int i = 0; i < kM; ++i) {
        ONEBIT_UNROLL
        for (int r = 0; r < L::kVectors; ++r) {
          float* out = acc + i * ld + r * L::kLanes;
          L::store(out, L::add(L::load(out), sum[i][r]));
        }
      }
    }
    scales += kRowChunk;
    biases += kRowChunk;
  }
}

template <class L, int kGroup>
void qmm_n_panels(const QmmArgs& a, const Block& block) {
  constexpr int kIndex = L::index_size(kUnitWords), kUnits = kRowChunk / kUnit;
  const int64_t panel = at_most(kColumnPanel, block.n_end - block.n_begin);
  const int64_t m_block = at_most(kBlockM, block.m_end - block.m_begin);
  const int64_t words = a.n / kWordBits;
  Arena arena(kUnits * panel / L::kRows * kIndex * 4 + 2 * (panel / kGroup) * kRowChunk * 4 +
              L::kMaxM * L::table_size(kUnitWords) * 4 + sums_size(m_block, panel));
  auto* index = arena.take<uint32_t>(kUnits * panel / L::kRows * kIndex);
  auto* scales = arena.take<float>(panel / kGroup * kRowChunk);
  auto* biases = arena.take<float>(panel / kGroup * kRowChunk);
  auto* table = arena.take<float>(L::kMaxM * L::table_size(kUnitWords));
  Sums sums = take_sums(arena, m_block, panel);
  for (int64_t m = block.m_begin; m < block.m_end; m += kBlockM) {
    const int64_t m_count = at_most(kBlockM, block.m_end - m);
    for (int64_t n = block.n_begin; n < block.n_end; n += kColumnPanel) {
      const int64_t columns = at_most(kColumnPanel, block.n_end - n);
      const int64_t unit_size = columns / L::kRows * kIndex;
      sums.ld = columns;
      clear_sums<L>(sums, m_count, columns);
      for (int64_t k = 0; k < a.k; k += kRowChunk) {
        const int64_t rows = at_most(kRowChunk, a.k - k), units = tiles_for(rows, kUnit);
        for (int64_t u = 0; u < units; ++u) {
          for (int64_t c = 0; c < columns; c += L::kRows) {
            L::pack_columns(a.w.packed + (k + u * kUnit) * words, words, n + c,
                            int(at_most(kUnit, rows - u * kUnit)),
                            index + u * unit_size + c / L::kRows * kIndex);
          }
        }
        // Lanes past the last row hold copies of it; x is 0 there, and the copies are finite or
        // spoil an output that is not finite anyway.
        pack_levels<L>(a.w, k, rows, n / kGroup, int(columns / kGroup), scales, biases, kRowChunk);
        const int64_t filled = tiles_for(rows, L::kLanes) * L::kLanes;
        for (int64_t g = 0; g < columns / kGroup; ++g) {
          for (int64_t i = filled; i < units * kUnit; i += L::kLanes) {
            L::store(scales + g * kRowChunk + i, L::zero());
            L::store(biases + g * kRowChunk + i, L::zero());
          }
        }
        for_row_tiles<L>(m_count, [&](auto tile, int64_t i) {
          for (int64_t u = 0; u < units; ++u) {
            add_unit<L, decltype(tile)::value, kGroup>(
                a, m + i, k + u * kUnit, columns, index + u * unit_size, scales + u * kUnit,
                biases + u * kUnit, table, sums.from(i).floats, columns);
          }
        });
        end_chains(a, tiles_for(k + rows, kUnit), tiles_for(a.k, kUnit), sums, m_count, columns);
      }
      store_rows<L>(a, m, m_count, n, columns, sums);
    }
  }
}

}  // namespace
}  // namespace onebit::cpu

// Holds every kernel table of this machine to the scalar one, and every table of level kernels to
// the generic one. Torch-free, so that it can be cross-compiled, run under an emulator and
// sanitised.
#include <algorithm>
#include <cmath>
#include <cstring>
#include <string>
#include <thread>
#include <vector>

#include "../../csrc/cpu/kernels/kernels.h"
#include "../../csrc/cpu/kernels/prepacked.h"
#include "guarded.h"
#include "test_levels.h"

namespace {

using namespace onebit;
using namespace onebit::cpu;

struct Case {
  int64_t m, n, k;
  int group_size;
  DType x, scales;
  bool symmetric;
  const char* reason;
};

const DType kF = DType::kFloat, kH = DType::kHalf, kB = DType::kBFloat16, kD = DType::kDouble;
const Case kCases[] = {
    {1, 128, 512, 128, kF, kH, false, "one whole tile, one cache line of weights per row"},
    {1, 7, 32, 32, kF, kF, true, "one group, fewer outputs than a vector"},
    {1, 200, 1120, 32, kB, kB, false, "one row, last tile and last line incomplete"},
    {1, 130, 2176, 64, kH, kF, true, "one row, k not a multiple of 128"},
    {2, 65, 160, 32, kH, kB, false, "k not a multiple of 128, group 32"},
    {3, 17, 2560, 128, kF, kH, false, "k = 20 groups: levels end inside a vector"},
    {4, 64, 576, 64, kB, kH, true, "whole tile of rows"},
    {5, 1100, 256, 128, kF, kB, false, "two panels of outputs, a row left over"},
    {67, 66, 384, 128, kF, kF, false, "two blocks of rows"},
    {7, 129, 1152, 64, kB, kB, false, "chunk of columns left over, 16 bits throughout"},
    {6, 160, 640, 128, kB, kH, false, "int16 tables in groups of 128, two rows left over"},
    {4, 130, 416, 32, kH, kB, true, "float16 by int16 tables, words not a multiple of 4"},
    {1, 131, 384, 128, kB, kF, false, "one row by int16 tables in groups of 128"},
    {37, 200, 1184, 32, kB, kH, false, "bfloat16 by tiles of 16, 4 and 1 rows, groups left over"},
    {145, 2112, 64, 64, kB, kF, true, "two blocks of rows and two panels by tiles"},
    {3, 70, 160, 32, kD, kD, false, "double sums"},
    {5, 33, 256, 64, kD, kB, true, "double x, 16-bit levels"},
};

std::string name_of(const char* table, const char* op, const Case& c) {
  return std::string(table) + " " + op + ": " + c.reason;
}

struct Problem {
  Problem(const Case& c, bool transpose)
      : rows(transpose ? c.n : (c.k + 1) / 2),
        columns(transpose ? c.k : (c.n + c.group_size - 1) / c.group_size * c.group_size),
        n(transpose ? c.n : columns),
        k(transpose ? c.k : rows),
        groups(rows * columns / c.group_size),
        packed(rows * columns / 8),
        scales(groups * element_size(c.scales)),
        biases(groups * element_size(c.scales)),
        x(c.m * k * element_size(c.x)) {
    for (int64_t i = 0; i < rows * columns / 32; ++i) packed.as<uint32_t>()[i] = uint32_t(rng());
    fill(scales, c.scales, groups, 0.03f, 0.005f);
    fill(biases, c.scales, groups, -0.015f, 0.003f);
    fill(x, c.x, c.m * k, 0, 1);
  }

  QmmArgs args(const Case& c, const Guarded& y) const {
    return {x.data(),
            y.data(),
            c.x,
            c.m,
            n,
            k,
            {packed.as<uint32_t>(), scales.data(), c.symmetric ? nullptr : biases.data(), c.scales,
             rows, columns, c.group_size}};
  }

  int64_t rows, columns, n, k, groups;
  Guarded packed, scales, biases, x;
};

void test_qmm(const Kernels& table, const Case& c, bool transpose) {
  const Problem p(c, transpose);
  const Guarded got(c.m * p.n * element_size(c.x)), want(c.m * p.n * element_size(c.x));
  const auto run = transpose ? table.qmm_t : table.qmm_n;
  (transpose ? kScalarKernels.qmm_t : kScalarKernels.qmm_n)(p.args(c, want), {0, c.m, 0, p.n});
  run(p.args(c, got), {0, c.m, 0, p.n});
  const char* op = transpose ? "qmm_t" : "qmm_n";
  const double e = error(got, want, c.x, c.m * p.n);
  expect(e <= tolerance(c.x), name_of(table.name, op, c) + ", error " + std::to_string(e));

  // The same bits from two threads, each with half of the columns and all of its rows in two parts.
  const Guarded split(c.m * p.n * element_size(c.x));
  const int64_t tile = std::max<int64_t>(table.n_tile, transpose ? 1 : 128);
  const int64_t n = std::min(p.n, (p.n / 2 + tile - 1) / tile * tile);
  const int64_t m = c.m / 2 / table.m_tile * table.m_tile;
  const auto half = [&](int64_t begin, int64_t end) {
    run(p.args(c, split), {m, c.m, begin, end});
    run(p.args(c, split), {0, m, begin, end});
  };
  std::thread other(half, n, p.n);
  half(0, n);
  other.join();
  expect(std::memcmp(got.data(), split.data(), c.m * p.n * element_size(c.x)) == 0,
         name_of(table.name, op, c) + ", depends on the split");

  // Rows by index, backwards.
  const Guarded mapped(c.m * p.n * element_size(c.x));
  std::vector<int64_t> order(c.m);
  for (int64_t i = 0; i < c.m; ++i) order[i] = c.m - 1 - i;
  auto args = p.args(c, mapped);
  args.x_rows = args.y_rows = order.data();
  run(args, {0, c.m, 0, p.n});
  expect(error(mapped, want, c.x, c.m * p.n) <= tolerance(c.x),
         name_of(table.name, op, c) + ", rows by index");
}

void test_prepacked(const Kernels& table, const Case& c) {
  const Problem p(c, true);
  const Guarded got(c.m * p.n * element_size(c.x)), want(c.m * p.n * element_size(c.x));
  auto args = p.args(c, got);
  const PrepackedLayout layout(args.w);
  const Guarded prepacked(layout.bytes());
  std::memset(prepacked.data(), 0, layout.bytes());
  const int64_t middle = layout.tiles / 2, n = middle * PrepackedLayout::kTileRows;
  prepack(args.w, prepacked.data(), n, p.n);
  prepack(args.w, prepacked.data(), 0, n);
  kScalarKernels.qmm_t(p.args(c, want), {0, c.m, 0, p.n});
  const auto name = name_of(table.name, "qmm_prepacked", c);
  if (table.qmm_prepacked) {
    auto bare = args;
    bare.w.packed = nullptr;
    bare.w.scales = nullptr;
    std::thread other([&] { table.qmm_prepacked(bare, prepacked.data(), {0, c.m, n, p.n}); });
    table.qmm_prepacked(bare, prepacked.data(), {0, c.m, 0, n});
    other.join();
    const double e = error(got, want, c.x, c.m * p.n);
    expect(e <= tolerance(c.x), name + ", error " + std::to_string(e));
  }

  const Guarded packed(p.rows * p.columns / 8), scales(p.groups * element_size(c.scales));
  const Guarded biases(p.groups * element_size(c.scales));
  unprepack(args.w, prepacked.data(), {packed.data(), scales.data(), biases.data()}, 0, p.n);
  const auto same = [](const Guarded& a, const Guarded& b, int64_t bytes) {
    return std::memcmp(a.data(), b.data(), bytes) == 0;
  };
  expect(same(packed, p.packed, p.rows * p.columns / 8) &&
             same(scales, p.scales, p.groups * element_size(c.scales)) &&
             (c.symmetric || same(biases, p.biases, p.groups * element_size(c.scales))),
         name + ", back");
}

// Products of bfloat16 and usual levels are the same bits whatever the vectors: fixed-point sums,
// and what is added up of them in one order.
void test_bits(const Kernels& table, int64_t m, uint64_t want) {
  const Case c{m, 200, 1152, 128, kB, kB, true, "the same bits everywhere"};
  const Problem p(c, true);
  std::mt19937 numbers(0);  // distributions differ among standard libraries
  for (int64_t i = 0; i < p.rows * p.columns / 32; ++i) p.packed.as<uint32_t>()[i] = numbers();
  for (int64_t i = 0; i < p.groups; ++i) put(p.scales, kB, i, 64 + numbers() % 64);
  for (int64_t i = 0; i < m * p.k; ++i) {
    const int value = int(numbers() % 511) - 255;
    put(p.x, kB, i, std::ldexp(value, -int(numbers() % 12)));
  }
  const Guarded got(m * p.n * element_size(kB));
  table.qmm_t(p.args(c, got), {0, m, 0, p.n});
  uint64_t bits = 0;
  for (int64_t i = 0; i < m * p.n; ++i) bits = bits * 31 + got.as<uint16_t>()[i];
  expect(bits == want, name_of(table.name, "qmm_t", c) + ", got " + std::to_string(bits));
}

void test_affine_grad(const Kernels& table, const Case& c, bool transpose) {
  const Problem p(c, transpose);
  const Guarded grad(c.m * p.n * element_size(c.x));
  fill(grad, c.x, c.m * p.n, 0, 1);
  const DType sums = c.x == kD ? kD : kF;
  const int64_t bytes = p.groups * element_size(sums);
  const Guarded ds(bytes), db(bytes), want_ds(bytes), want_db(bytes);
  const auto run = [&](const Kernels& t, const Guarded& s, const Guarded& b) {
    (transpose ? t.affine_grad_t : t.affine_grad_n)(
        {grad.data(), p.x.data(), c.x, s.data(), b.data(), c.m, p.n, p.k, p.packed.as<uint32_t>(),
         c.group_size},
        0, p.rows);
  };
  run(table, ds, db);
  run(kScalarKernels, want_ds, want_db);
  const char* op = transpose ? "affine_grad_t" : "affine_grad_n";
  expect(error(ds, want_ds, sums, p.groups) <= tolerance(sums),
         name_of(table.name, op, c) + ", scales");
  expect(error(db, want_db, sums, p.groups) <= tolerance(sums),
         name_of(table.name, op, c) + ", biases");
}

void test_codec(const Kernels& table, DType dtype, int group_size) {
  const int64_t groups = 300, count = groups * group_size, size = element_size(dtype);
  const Guarded w(count * size);
  fill(w, dtype, count, 0, 1);
  for (int64_t g = 0; g < groups; ++g) {
    const int kind = int(g % 10);
    for (int64_t j = 0; j < group_size; ++j) {
      const int64_t i = g * group_size + j;
      if (kind == 1) put(w, dtype, i, 0.375f);                    // constant
      if (kind == 2) put(w, dtype, i, rng() % 2 ? 0.0f : -0.0f);  // zeros of both signs
      if (kind == 3) put(w, dtype, i, std::fabs(get(w, dtype, i)) * float(rng() % 2));  // low is 0
      if (kind == 4) put(w, dtype, i, float(int(rng() % 3)));                           // ties
      if (kind == 5) put(w, dtype, i, NAN);
      if (kind == 6 && rng() % 8 == 0) put(w, dtype, i, special(rng()));
      if (kind == 7 && j == int64_t(g % group_size)) put(w, dtype, i, special(uint64_t(g / 10)));
    }
  }
  const int64_t words = count / 32;
  const Guarded packed[2]{Guarded(words * 4), Guarded(words * 4)};
  const Guarded scales[2]{Guarded(groups * size), Guarded(groups * size)};
  const Guarded biases[2]{Guarded(groups * size), Guarded(groups * size)};
  const Guarded out[2]{Guarded(count * size), Guarded(count * size)};
  const Kernels* tables[] = {&table, &kScalarKernels};
  const std::string name = std::string(table.name) + " group " + std::to_string(group_size) +
                           " dtype " + std::to_string(int(dtype));
  const auto same = [&](const Guarded(&a)[2], int64_t n) {
    for (int64_t i = 0; i < n; ++i) {
      const double v = get(a[0], dtype, i), u = get(a[1], dtype, i);
      if (std::memcmp(a[0].data() + i * size, a[1].data() + i * size, size) && (v == v || u == u)) {
        return false;
      }
    }
    return true;
  };
  for (int i = 0; i < 2; ++i) {
    tables[i]->quantize(w.data(), dtype, group_size, packed[i].as<uint32_t>(), scales[i].data(),
                        biases[i].data(), 0, groups);
  }
  expect(std::memcmp(packed[0].data(), packed[1].data(), words * 4) == 0, name + " packed");
  expect(same(scales, groups), name + " scales");
  expect(same(biases, groups), name + " biases");
  for (const bool symmetric : {false, true}) {
    for (int i = 0; i < 2; ++i) {
      tables[i]->dequantize(
          {packed[1].as<uint32_t>(), scales[1].data(), symmetric ? nullptr : biases[1].data(),
           dtype, groups, group_size, group_size},
          out[i].data(), 0, groups);
    }
    expect(same(out, count), name + (symmetric ? " dequantize, symmetric" : " dequantize"));
  }
}

}  // namespace

int main() {
  int count = 0;
  const auto* tables = available_kernels(&count);
  for (int i = 0; i < count; ++i) {
    const Kernels& table = *tables[i];
    const int before = failures;
    for (const Case& c : kCases) {
      for (const bool transpose : {true, false}) {
        test_qmm(table, c, transpose);
        test_affine_grad(table, c, transpose);
      }
    }
    for (const Case& c : kCases) {
      if (c.x != kD && c.scales != kD) test_prepacked(table, c);
    }
    for (const DType dtype : {kF, kH, kB, kD}) {
      for (const int group_size : {32, 64, 128}) test_codec(table, dtype, group_size);
    }
    if (&table != &kScalarKernels) {
      test_bits(table, 1, 12375439049393372732u);
      test_bits(table, 21, 2636794133620870065u);
    }
    test_levels(table);
    std::printf("%-8s %s\n", table.name, failures == before ? "ok" : "FAILED");
  }
  return failures != 0;
}

// Holds every kernel table of this machine to the scalar one. Torch-free, so that it can be
// cross-compiled, run under an emulator and sanitised. Every buffer ends at a page that may not be
// touched: a kernel that reads or writes past the end dies here.
#include <sys/mman.h>
#include <unistd.h>

#include <cmath>
#include <cstdio>
#include <cstring>
#include <random>
#include <string>
#include <thread>
#include <vector>

#include "../../csrc/cpu/float_types.h"
#include "../../csrc/cpu/kernels.h"
#include "../../csrc/cpu/prepacked.h"

namespace {

using namespace onebit;
using namespace onebit::cpu;

int failures = 0;
std::mt19937 rng(0);

void expect(bool ok, const std::string& what) {
  if (ok) return;
  ++failures;
  std::printf("FAIL %s\n", what.c_str());
}

class Guarded {
 public:
  explicit Guarded(size_t bytes) {
    const size_t page = size_t(sysconf(_SC_PAGESIZE));
    length_ = (bytes + page - 1) / page * page + page;
    base_ = static_cast<char*>(
        mmap(nullptr, length_, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0));
    mprotect(base_ + length_ - page, page, PROT_NONE);
    data_ = base_ + length_ - page - bytes;
  }
  ~Guarded() { munmap(base_, length_); }
  Guarded(const Guarded&) = delete;
  Guarded& operator=(const Guarded&) = delete;

  char* data() const { return data_; }
  template <class T>
  T* as() const {
    return reinterpret_cast<T*>(data_);
  }

 private:
  char *base_, *data_;
  size_t length_;
};

size_t size_of(DType t) { return size_t(element_size(t)); }

float get(const Guarded& b, DType t, int64_t i) {
  if (t == DType::kHalf) return to_float(b.as<Half>()[i]);
  if (t == DType::kBFloat16) return to_float(b.as<BFloat16>()[i]);
  return b.as<float>()[i];
}

void put(const Guarded& b, DType t, int64_t i, float v) {
  if (t == DType::kHalf) return from_float(v, b.as<Half>()[i]);
  if (t == DType::kBFloat16) return from_float(v, b.as<BFloat16>()[i]);
  b.as<float>()[i] = v;
}

void fill(const Guarded& b, DType t, int64_t count, float mean, float deviation) {
  std::normal_distribution<float> normal(mean, deviation);
  for (int64_t i = 0; i < count; ++i) put(b, t, i, normal(rng));
}

// Relative error of the whole, in L2.
double error(const Guarded& got, const Guarded& want, DType t, int64_t count) {
  double difference = 0, norm = 0;
  for (int64_t i = 0; i < count; ++i) {
    const double w = get(want, t, i), d = get(got, t, i) - w;
    difference += d * d;
    norm += w * w;
  }
  return norm > 0 ? std::sqrt(difference / norm) : std::sqrt(difference);
}

// Half a unit in the last place, as a relative error of evenly spread values, with room for sums.
double tolerance(DType t) { return t == DType::kFloat ? 2e-6 : t == DType::kHalf ? 6e-4 : 5e-3; }

struct Case {
  int64_t m, n, k;
  int group_size;
  DType x, scales;
  bool symmetric;
  const char* reason;
};

const DType kF = DType::kFloat, kH = DType::kHalf, kB = DType::kBFloat16;
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
        scales(groups * size_of(c.scales)),
        biases(groups * size_of(c.scales)),
        x(c.m * k * size_of(c.x)) {
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
  const Guarded got(c.m * p.n * size_of(c.x)), want(c.m * p.n * size_of(c.x));
  const auto run = transpose ? table.qmm_t : table.qmm_n;
  (transpose ? kScalarKernels.qmm_t : kScalarKernels.qmm_n)(p.args(c, want), {0, c.m, 0, p.n});
  run(p.args(c, got), {0, c.m, 0, p.n});
  const char* op = transpose ? "qmm_t" : "qmm_n";
  const double e = error(got, want, c.x, c.m * p.n);
  expect(e <= tolerance(c.x), name_of(table.name, op, c) + ", error " + std::to_string(e));

  // The same bits from two threads, each with half of the columns and all of its rows in two parts.
  const Guarded split(c.m * p.n * size_of(c.x));
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
  expect(std::memcmp(got.data(), split.data(), c.m * p.n * size_of(c.x)) == 0,
         name_of(table.name, op, c) + ", depends on the split");

  // Rows by index, backwards.
  const Guarded mapped(c.m * p.n * size_of(c.x));
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
  const Guarded got(c.m * p.n * size_of(c.x)), want(c.m * p.n * size_of(c.x));
  const auto args = p.args(c, got);
  const PrepackedLayout layout(args.w);
  const Guarded copy(layout.bytes());
  const int64_t middle = layout.tiles / 2, n = middle * PrepackedLayout::kTileRows;
  table.prepack(args.w, copy.data(), middle, layout.tiles);
  table.prepack(args.w, copy.data(), 0, middle);
  kScalarKernels.qmm_t(p.args(c, want), {0, c.m, 0, p.n});
  std::thread other([&] { table.qmm_prepacked(args, copy.data(), {0, c.m, n, p.n}); });
  table.qmm_prepacked(args, copy.data(), {0, c.m, 0, n});
  other.join();
  const double e = error(got, want, c.x, c.m * p.n);
  const auto name = name_of(table.name, "qmm_prepacked", c);
  expect(e <= tolerance(c.x), name + ", error " + std::to_string(e));
  bool all = true;
  for (int64_t row = 0; row < p.n; ++row) {
    for (int64_t g = 0; g < layout.groups; ++g) all &= layout.holds(copy.data(), args.w, row, g);
  }
  expect(all, name + ", holds");
}

void test_affine_grad(const Kernels& table, const Case& c, bool transpose) {
  const Problem p(c, transpose);
  const Guarded grad(c.m * p.n * size_of(c.x));
  fill(grad, c.x, c.m * p.n, 0, 1);
  const Guarded ds(p.groups * 4), db(p.groups * 4), want_ds(p.groups * 4), want_db(p.groups * 4);
  const auto run = [&](const Kernels& t, const Guarded& s, const Guarded& b) {
    (transpose ? t.affine_grad_t : t.affine_grad_n)(
        {grad.data(), p.x.data(), c.x, s.data(), b.data(), c.m, p.n, p.k, p.packed.as<uint32_t>(),
         c.group_size},
        0, p.rows);
  };
  run(table, ds, db);
  run(kScalarKernels, want_ds, want_db);
  const char* op = transpose ? "affine_grad_t" : "affine_grad_n";
  expect(error(ds, want_ds, kF, p.groups) <= 2e-6, name_of(table.name, op, c) + ", scales");
  expect(error(db, want_db, kF, p.groups) <= 2e-6, name_of(table.name, op, c) + ", biases");
}

// Values that the rule of quantize is about, among ordinary ones.
float special(int i) {
  const float inf = INFINITY, values[] = {0.0f, -0.0f, inf, -inf, NAN, 1e-8f, 1e-40f, 65504, 1e38f};
  return values[i % 9];
}

void test_codec(const Kernels& table, DType dtype, int group_size) {
  const int64_t groups = 300, count = groups * group_size, size = int64_t(size_of(dtype));
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
      if (kind == 6 && rng() % 8 == 0) put(w, dtype, i, special(int(rng())));
      if (kind == 7 && j == int64_t(g % group_size)) put(w, dtype, i, special(int(g / 10)));
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
      const float v = get(a[0], dtype, i), u = get(a[1], dtype, i);
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
      if (table.prepack) test_prepacked(table, c);
    }
    for (const DType dtype : {kF, kH, kB}) {
      for (const int group_size : {32, 64, 128}) test_codec(table, dtype, group_size);
    }
    std::printf("%-8s %s\n", table.name, failures == before ? "ok" : "FAILED");
  }
  return failures != 0;
}

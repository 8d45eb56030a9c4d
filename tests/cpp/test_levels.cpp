// Every table of level kernels against the generic one, and what the rules promise.
#include "test_levels.h"

#include <algorithm>
#include <cstring>
#include <thread>
#include <vector>

#include "guarded.h"

namespace onebit::cpu {

namespace {

constexpr DType kF = DType::kFloat, kH = DType::kHalf, kB = DType::kBFloat16, kD = DType::kDouble;
constexpr Rule kRules[] = {Rule::kMinMax, Rule::kSign, Rule::kMean, Rule::kOptimal};
constexpr const char* kRuleNames[] = {"minmax", "sign", "mean", "optimal"};

struct Case {
  int64_t groups;
  int group_size;
  DType w, out;    // out: of results that have a dtype of their own, and of gradients
  int64_t period;  // of importance; 0: none
  const char* reason;
};

const Case kCases[] = {
    {1, 32, kF, kF, 0, "one group: 15 lanes of a tile are empty"},
    {16, 64, kF, kH, 4, "one whole tile, importance repeats within it"},
    {35, 128, kB, kF, 5, "two tiles and a rest"},
    {33, 32, kH, kB, 33, "importance of every group"},
    {37, 64, kD, kD, 1, "double"},
    {18, 128, kF, kD, 3, "double gradients of float weights"},
};

// A group's buffers, each ending at a guard page.
struct Problem {
  explicit Problem(const Case& c)
      : count(c.groups * c.group_size),
        w(count * element_size(c.w)),
        grad(count * element_size(c.out)),
        importance(c.period * c.group_size * 4),
        scales(c.groups * element_size(c.out)),
        biases(c.groups * element_size(c.out)) {
    fill(w, c.w, count, 0.1, 1);
    fill(grad, c.out, count, 0, 1);
    fill(scales, c.out, c.groups, 1, 1);  // a sixth of them negative
    fill(biases, c.out, c.groups, -0.5, 0.3);
    for (int64_t i = 0; i < c.period * c.group_size; ++i) {
      importance.as<float>()[i] = float(rng() % 4) / 4;
    }
  }

  LevelsArgs args(const Case& c, Rule rule) const {
    const bool weighted = c.period && (rule == Rule::kSign || rule == Rule::kOptimal);
    return {w.data(),
            c.w,
            rule,
            c.group_size,
            weighted ? importance.as<float>() : nullptr,
            weighted ? c.period : 1};
  }
  AffineArgs affine(const Case& c) const {
    return {w.data(), c.w, scales.data(), biases.data(), c.out, c.group_size};
  }

  int64_t count;
  Guarded w, grad, importance, scales, biases;
};

// What all functions of a table make of a problem.
struct Results {
  Results(const Case& c, const Problem& p)
      : packed(p.count / 8),
        scales(c.groups * element_size(c.w)),
        biases(c.groups * element_size(c.w)),
        fake(p.count * element_size(c.out)),
        grad_w(p.count * element_size(c.w)),
        affine(p.count * element_size(c.out)),
        grad_scales(c.groups * element_size(c.out)),
        grad_biases(c.groups * element_size(c.out)) {}

  void make(const LevelKernels& t,
            const Case& c,
            const Problem& p,
            Rule rule,
            int64_t begin,
            int64_t end) {
    const LevelsArgs args = p.args(c, rule),
                     free = {p.w.data(), c.w, rule, c.group_size, nullptr, 1};
    t.quantize(args, {packed.as<uint32_t>(), scales.data(), biases.data()}, begin, end);
    t.fake_quantize(free, fake.data(), c.out, begin, end);
    t.fake_quantize_backward(free, p.grad.data(), c.out, grad_w.data(), begin, end);
    t.fake_quantize_affine(p.affine(c), affine.data(), c.out, begin, end);
    t.fake_quantize_affine_backward(p.affine(c), p.grad.data(), c.out, grad_scales.data(),
                                    grad_biases.data(), begin, end);
  }

  Guarded packed, scales, biases, fake, grad_w, affine, grad_scales, grad_biases;
};

bool same(const Guarded& a, const Guarded& b, int64_t bytes) {
  return std::memcmp(a.data(), b.data(), size_t(bytes)) == 0;
}

// A bit may differ only where rounding can decide it: nearly nowhere.
double different_bits(const Guarded& a, const Guarded& b, int64_t count) {
  int64_t different = 0;
  for (int64_t i = 0; i < count / 32; ++i) {
    different += __builtin_popcount(a.as<uint32_t>()[i] ^ b.as<uint32_t>()[i]);
  }
  return double(different) / double(count);
}

void compare(const Results& got,
             const Results& want,
             const Case& c,
             const Problem& p,
             const std::string& name) {
  const double w = tolerance(c.w) * 4, out = tolerance(c.out) * 4;
  const auto close = [&](const Guarded& a, const Guarded& b, DType t, int64_t count, double bound,
                         const char* what) {
    const double e = error(a, b, t, count);
    expect(e <= bound, name + " " + what + ", error " + std::to_string(e));
  };
  expect(different_bits(got.packed, want.packed, p.count) <= 0.001, name + " packed");
  close(got.scales, want.scales, c.w, c.groups, w, "scales");
  close(got.biases, want.biases, c.w, c.groups, w, "biases");
  close(got.fake, want.fake, c.out, p.count, std::max(w, out), "fake_quantize");
  close(got.grad_w, want.grad_w, c.w, p.count, std::max(w, out), "fake_quantize_backward");
  close(got.affine, want.affine, c.out, p.count, out, "fake_quantize_affine");
  close(got.grad_scales, want.grad_scales, c.out, c.groups, out, "grad_scales");
  close(got.grad_biases, want.grad_biases, c.out, c.groups, out, "grad_biases");
}

void test_rule(const Kernels& table, const Case& c, Rule rule) {
  const std::string name = std::string(table.name) + " " + kRuleNames[int(rule)] + ": " + c.reason;
  const Problem p(c);
  Results got(c, p), want(c, p), split(c, p);
  want.make(kGenericLevelKernels, c, p, rule, 0, c.groups);
  got.make(*table.levels, c, p, rule, 0, c.groups);
  compare(got, want, c, p, name);

  // The same bits from two threads that share the groups unevenly.
  const int64_t middle = c.groups / 3;
  std::thread other([&] { split.make(*table.levels, c, p, rule, middle, c.groups); });
  split.make(*table.levels, c, p, rule, 0, middle);
  other.join();
  const int64_t w = element_size(c.w), out = element_size(c.out);
  expect(same(got.packed, split.packed, p.count / 8) &&
             same(got.scales, split.scales, c.groups * w) &&
             same(got.biases, split.biases, c.groups * w) &&
             same(got.fake, split.fake, p.count * out) &&
             same(got.grad_w, split.grad_w, p.count * w) &&
             same(got.affine, split.affine, p.count * out) &&
             same(got.grad_scales, split.grad_scales, c.groups * out) &&
             same(got.grad_biases, split.grad_biases, c.groups * out),
         name + ", depends on the split");
}

// No rule has a smaller squared error than "optimal", in any group.
void test_optimal(const Kernels& table, int group_size) {
  const Case c{40, group_size, kD, kD, 0, ""};
  const Problem p(c);
  std::vector<double> best;
  for (const Rule rule : {Rule::kOptimal, Rule::kMinMax, Rule::kSign, Rule::kMean}) {
    Results r(c, p);
    r.make(*table.levels, c, p, rule, 0, c.groups);
    for (int64_t g = 0; g < c.groups; ++g) {
      double loss = 0;
      for (int64_t i = g * group_size; i < (g + 1) * group_size; ++i) {
        const double d = r.fake.as<double>()[i] - p.w.as<double>()[i];
        loss += d * d;
      }
      if (rule == Rule::kOptimal) best.push_back(loss);
      expect(best[size_t(g)] <= loss * (1 + 1e-9),
             std::string(table.name) + " optimal is beaten by " + kRuleNames[int(rule)] +
                 ", group " + std::to_string(g));
    }
  }
}

// Zeros, infinities, NaN, subnormals, constants and ties: no access outside, nothing undefined.
// Bits of a constant group decode to it.
void test_special(const Kernels& table, DType dtype, int group_size) {
  const Case c{40, group_size, dtype, dtype, 0, ""};
  const Problem p(c);
  for (int64_t g = 0; g < c.groups; ++g) {
    for (int64_t j = 0; j < group_size; ++j) {
      const int64_t i = g * group_size + j;
      if (g % 5 == 0) put(p.w, dtype, i, special(rng()));
      if (g % 5 == 1) put(p.w, dtype, i, special(uint64_t(g / 5)));
      if (g % 5 == 2) put(p.w, dtype, i, double(int(rng() % 3)) - 1);
      if (g % 5 == 3) put(p.w, dtype, i, 0.375);
      if (rng() % 64 == 0) put(p.grad, dtype, i, special(rng()));
    }
    if (g % 7 == 0) put(p.scales, dtype, g, special(uint64_t(g / 7)));
  }
  for (const Rule rule : kRules) {
    Results r(c, p);
    r.make(*table.levels, c, p, rule, 0, c.groups);
    if (rule == Rule::kSign) continue;  // a constant is not one of its levels
    for (int64_t g = 3; g < c.groups; g += 5) {
      for (int64_t i = g * group_size; i < (g + 1) * group_size; ++i) {
        expect(get(r.fake, dtype, i) == 0.375,
               std::string(table.name) + " " + kRuleNames[int(rule)] + " of a constant group");
      }
    }
  }
}

}  // namespace

void test_levels(const Kernels& table) {
  for (const Case& c : kCases) {
    for (const Rule rule : kRules) test_rule(table, c, rule);
  }
  for (const int group_size : {32, 64, 128}) {
    test_optimal(table, group_size);
    for (const DType dtype : {kF, kH, kB, kD}) test_special(table, dtype, group_size);
  }
}

}  // namespace onebit::cpu

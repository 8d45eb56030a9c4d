// The launch plans behind a C interface, for the tests: each launch is one line of text.
#include "../../csrc/cuda/launch_plan.h"

#include <cstdio>
#include <string>

using namespace onebit;
using namespace onebit::cuda;

namespace {

std::string text(const Launch& l) {
  char numbers[200];
  const auto [name, source] = info_of(l.kernel);
  snprintf(numbers, sizeof numbers, "%s %s %u %u %u %u %u %d %llu", name, source_name(source),
           l.grid.x, l.grid.y, l.grid.z, l.threads, l.shared_bytes, l.early,
           static_cast<unsigned long long>(l.variant.key()));
  std::string line = numbers;
  if (!contracts(source)) line += " --fmad=false";
  for_each_define(l.variant, [&](const char* macro, const auto& value) {
    line += std::string(" -D") + macro + "=";
    if constexpr (std::is_same_v<std::decay_t<decltype(value)>, int>) {
      line += std::to_string(value);
    } else {
      line += value;
    }
  });
  return line + "\n";
}

DType type(int64_t i) { return static_cast<DType>(i); }

}  // namespace

// p: architecture, multiprocessors, m, n, k, group words, transpose, batches, indexed, x, levels,
// has biases. First line: the way, splits, stages in a split.
extern "C" void product(const int64_t* p, char* out, size_t size) {
  const Gpu gpu = {int(p[0]), uint32_t(p[1])};
  const Product product = {uint32_t(p[2]), uint32_t(p[3]), uint32_t(p[4]), int(p[5]),   p[6] != 0,
                           uint32_t(p[7]), p[8] != 0,      type(p[9]),     type(p[10]), p[11] != 0};
  const ProductPlan plan = plan_product(product, gpu);
  constexpr const char* ways[] = {"b1", "hmma", "wgmma", "tiles", "gather_n", "dense"};
  std::string lines = std::string(ways[int(plan.way)]) + " " + std::to_string(plan.splits) + " " +
                      std::to_string(plan.steps) + "\n";
  if (plan.way == Way::kB1) lines += text(plan.planes);
  if (plan.way != Way::kDense) lines += text(plan.product);
  snprintf(out, size, "%s", lines.c_str());
}

// p: kernel, groups (of decode, of a row; or rows), type, other type, levels, group words, rule,
// has importance, columns, has biases, matrices (of decode, rows of the result; of split, rows of
// sums).
extern "C" void rows(const int64_t* p, char* out, size_t size) {
  const auto kernel = static_cast<Kernel>(p[0]);
  const int words = int(p[5]);
  GroupOptions options = {words, static_cast<Rule>(p[6]), type(p[3]), type(p[4])};
  options.has_importance = p[7] != 0;
  Launch launch = plan_groups(kernel, p[1], type(p[2]), options);
  const uint32_t columns = uint32_t(p[8]);
  if (kernel == Kernel::kQuantize) launch = plan_quantize(p[1], type(p[2]), words);
  if (kernel == Kernel::kDecode) {
    DecodeArgs args = {};
    args.blocks_per_row = decode_blocks(p[1] * words, type(p[3]));
    args.biases = p[9] ? p : nullptr;
    launch = plan_decode(args, p[10], type(p[4]), type(p[3]), words);
  }
  if (kernel == Kernel::kAffineGrad) {
    AffineGradArgs args = {};
    args.rows = uint32_t(p[1]), args.columns = columns;
    launch = plan_affine_grad(args, p[10], type(p[2]), words);
  }
  if (kernel == Kernel::kFlipBits) {
    FlipArgs args = {};
    args.rows = uint32_t(p[1]), args.columns = columns;
    launch = plan_flip_bits(args, words);
  }
  if (kernel == Kernel::kSplit) {
    SplitArgs args = {};
    args.m = uint32_t(p[1]), args.sum_rows = larger(p[1], p[10]), args.k = columns;
    launch = plan_split(args, words);
  }
  if (kernel == Kernel::kSumPartials) launch = plan_sum(p[1], type(p[3]));
  snprintf(out, size, "%s", text(launch).c_str());
}

// The launch plan behind a C interface, for test_launch_plan.py.
#include "../../csrc/mps/launch_plan.h"

#include <cstdio>

using namespace onebit;
using namespace onebit::mps;

extern "C" __attribute__((visibility("default"))) void plan(const int* gpu,
                                                            const int64_t* p,
                                                            char* out,
                                                            size_t size) {
  const Product product = {static_cast<uint32_t>(p[0]),
                           static_cast<uint32_t>(p[1]),
                           static_cast<uint32_t>(p[2]),
                           p[3],
                           p[4] != 0,
                           static_cast<uint32_t>(p[5]),
                           static_cast<uint32_t>(p[6]),
                           static_cast<uint32_t>(p[7]),
                           p[8] != 0,
                           p[9] != 0,
                           static_cast<DType>(p[10]),
                           DType::kFloat,
                           true};
  const ProductPlan plan = plan_product(product, {gpu[0], static_cast<uint32_t>(gpu[1]), gpu[2] != 0});
  const Launch& l = plan.product;
  snprintf(out, size, "%s %d %ux%ux%u %u %d %u %u %u", kernel_name(l.pipeline.kernel),
           l.pipeline.rows, l.groups.x, l.groups.y, l.groups.z, l.threads, l.pipeline.partial,
           plan.splits, plan.params.split_k, plan.sum.groups.x);
}

// The grid and the key of fake_quantize, by {groups, group size, rule, dtype of w, of the result}.
extern "C" __attribute__((visibility("default"))) void group_plan(const int* p, uint32_t* out) {
  const GroupParams params = {static_cast<uint32_t>(p[0]), 1};
  const GroupOptions options = {p[1], static_cast<Rule>(p[2]), static_cast<DType>(p[4])};
  const Launch l =
      plan_groups(Kernel::kFakeQuantize, params, static_cast<DType>(p[3]), options);
  out[0] = l.groups.x;
  out[1] = l.threads;
  out[2] = l.pipeline.key();
}

// The name of a kernel and of its library, "" after the last.
extern "C" __attribute__((visibility("default"))) void library(int kernel, char* out, size_t size) {
  if (kernel > static_cast<int>(Kernel::kFlipBits)) {
    *out = 0;
  } else {
    const Kernel k = static_cast<Kernel>(kernel);
    snprintf(out, size, "%s %s", kernel_name(k), library_name(k));
  }
}

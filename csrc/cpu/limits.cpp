// The machine's own limits as operators, measured by benchmarks beside the kernels.
#include <ATen/Parallel.h>
#include <ATen/core/Tensor.h>
#include <torch/library.h>

#include "kernels.h"

namespace onebit::cpu {
namespace {

void check(float result) { TORCH_CHECK(result == result, "limits must be numbers, got NaN"); }

// Reads a contiguous float tensor once, on all threads.
void read_memory(const at::Tensor& t) {
  TORCH_CHECK_VALUE(t.scalar_type() == at::kFloat && t.is_contiguous() && t.device().is_cpu(),
                    "t must be contiguous float32 on the cpu, got ", t.scalar_type());
  const float* data = t.const_data_ptr<float>();
  at::parallel_for(0, t.numel() / 1024, 64, [&](int64_t begin, int64_t end) {
    check(kernels().read_floats(data + begin * 1024, (end - begin) * 1024));
  });
}

// Runs `steps` vectors of multiply-adds on every thread; returns how many there were.
int64_t multiply_adds(int64_t steps) {
  TORCH_CHECK_VALUE(steps > 0, "steps must be positive, got ", steps);
  const int64_t threads = at::get_num_threads();
  int64_t per_thread = 0;
  at::parallel_for(0, threads, 1, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      int64_t count = 0;
      check(kernels().multiply_adds(steps, &count));
      if (i == 0) per_thread = count;
    }
  });
  return per_thread * threads;
}

}  // namespace

TORCH_LIBRARY_FRAGMENT(onebit, m) {
  m.def("read_memory(Tensor t) -> ()", &read_memory);
  m.def("multiply_adds(int steps) -> int", &multiply_adds);
}

}  // namespace onebit::cpu

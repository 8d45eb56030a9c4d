// What the machine can do at most, which benchmarks measure beside the kernels: bytes read and
// multiply-adds done by its widest vectors. Operators of a namespace that nothing else uses.
#include <ATen/Parallel.h>
#include <ATen/core/Tensor.h>
#include <torch/library.h>

#include <cstring>

namespace onebit::bench {
namespace {

constexpr int64_t kBlock = 1024;  // floats

typedef float Vec16 __attribute__((vector_size(16)));
typedef float Vec32 __attribute__((vector_size(32)));
typedef float Vec64 __attribute__((vector_size(64)));

template <class Vec>
struct Limits {
  static constexpr int kLanes = sizeof(Vec) / sizeof(float);

  // The largest of whole blocks of floats: one load and one comparison per vector, four at a time.
  __attribute__((always_inline)) static float read(const float* p, int64_t count) {
    Vec most[4] = {};
    for (int64_t i = 0; i < count; i += 4 * kLanes) {
      for (int j = 0; j < 4; ++j) {
        Vec v;
        std::memcpy(&v, p + i + j * kLanes, sizeof v);
        most[j] = v > most[j] ? v : most[j];
      }
    }
    const Vec all = most[0] + most[1] + most[2] + most[3];
    float sum = 0;
    for (int l = 0; l < kLanes; ++l) sum += all[l];
    return sum;
  }

  // Fused multiply-adds of 12 independent vectors: more than two units of four cycles need.
  __attribute__((always_inline)) static float multiply_adds(int64_t steps) {
    Vec v[12];
    for (int i = 0; i < 12; ++i) v[i] = Vec{} + float(i);
    for (int64_t s = 0; s < steps; ++s) {
      for (int i = 0; i < 12; ++i) v[i] = v[i] * 0.999f + 0.001f;
    }
    Vec all{};
    for (int i = 0; i < 12; ++i) all += v[i];
    return all[0];
  }
};

struct Machine {
  float (*read)(const float*, int64_t count);
  float (*multiply_adds)(int64_t steps);
  int lanes;
};

#define ONEBIT_MACHINE(name, attributes, bytes)                                                    \
  attributes float read_##name(const float* p, int64_t count) {                                    \
    return Limits<Vec##bytes>::read(p, count);                                                     \
  }                                                                                                \
  attributes float adds_##name(int64_t steps) { return Limits<Vec##bytes>::multiply_adds(steps); } \
  constexpr Machine name{read_##name, adds_##name, Limits<Vec##bytes>::kLanes};

ONEBIT_MACHINE(kBase, , 16)
#if defined(__x86_64__)
ONEBIT_MACHINE(kAvx2, __attribute__((target("avx2,fma"))), 32)
ONEBIT_MACHINE(kAvx512, __attribute__((target("avx512f,avx2,fma"))), 64)
#endif

const Machine& machine() {
#if defined(__x86_64__)
  if (__builtin_cpu_supports("avx512f")) return kAvx512;
  if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) return kAvx2;
#endif
  return kBase;
}

// Results only keep the compiler from leaving the work out.
void check(float result) { TORCH_CHECK(result == result, "limits must be numbers, got NaN"); }

// Reads a contiguous float tensor once, on all threads.
void read_memory(const at::Tensor& t) {
  TORCH_CHECK_VALUE(t.scalar_type() == at::kFloat && t.is_contiguous() && t.device().is_cpu(),
                    "t must be contiguous float32 on the cpu, got ", t.scalar_type());
  const float* data = static_cast<const float*>(t.const_data_ptr());
  at::parallel_for(0, t.numel() / kBlock, 64, [&](int64_t begin, int64_t end) {
    check(machine().read(data + begin * kBlock, (end - begin) * kBlock));
  });
}

// Runs `steps` vectors of multiply-adds on every thread; returns how many there were.
int64_t multiply_adds(int64_t steps) {
  TORCH_CHECK_VALUE(steps > 0, "steps must be positive, got ", steps);
  const int64_t threads = at::get_num_threads();
  at::parallel_for(0, threads, 1, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) check(machine().multiply_adds(steps));
  });
  return threads * steps * 12 * machine().lanes;
}

}  // namespace
}  // namespace onebit::bench

TORCH_LIBRARY(onebit_bench, m) {
  m.def("read_memory(Tensor t) -> ()", &onebit::bench::read_memory);
  m.def("multiply_adds(int steps) -> int", &onebit::bench::multiply_adds);
}

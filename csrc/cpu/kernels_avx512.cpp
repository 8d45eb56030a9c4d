// The AVX-512 table: Skylake-X, Ice Lake, Zen 4 and later.
#include <immintrin.h>

#include "kernels.h"
#include "scratch.h"
#include "target.h"

ONEBIT_TARGET_BEGIN("avx512f,avx512bw,avx512vl,avx512dq,avx2,fma,f16c")

#include "avx512-inl.h"
#include "lookup_avx512-inl.h"
#include "qmm-inl.h"

namespace onebit::cpu {

extern const Kernels kScalarKernels;

namespace {

bool supported() {
  return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
         __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq") &&
         __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
}

// 8 vectors of rows at M = 1: tables of all of k come from L2, and are read half as often.
using Tall = LookupAvx512<8>;
using Wide = LookupAvx512<4>;

// Rows of x whose tables over all of k fit L2 beside the weights.
constexpr int64_t kStreamColumns = 32768;

template <int kWords>
void qmm_t_group(const QmmArgs& a, const Block& block) {
  if (a.m == 1 && a.k <= kStreamColumns) {
    qmm_t_stream<Tall, 1, kWords>(a, block);
  } else {
    qmm_t_panels<Wide, kWords>(a, block);
  }
}

void qmm_t(const QmmArgs& a, const Block& block) {
  if (block.m_begin == block.m_end || block.n_begin == block.n_end) return;
  if (a.dtype == DType::kDouble || a.w.dtype == DType::kDouble) {
    kScalarKernels.qmm_t(a, block);
  } else if (a.w.group_size == 128) {
    qmm_t_group<4>(a, block);
  } else if (a.w.group_size == 64) {
    qmm_t_group<2>(a, block);
  } else {
    qmm_t_group<1>(a, block);
  }
}

}  // namespace

extern const Kernels kAvx512Kernels = {"avx512", supported, 4, 64, qmm_t};

}  // namespace onebit::cpu

ONEBIT_TARGET_END

// The AVX2 table: x86 since Haswell and Zen.
#if defined(__x86_64__)

#include <immintrin.h>

#include <cstring>

#include "../float_types.h"
#include "../kernels.h"
#include "../scratch.h"
#include "../target.h"

ONEBIT_TARGET_BEGIN("avx2,fma,f16c")

#include "../table-inl.h"
#include "lookup_avx2-inl.h"
#include "lookup_avx2_int16-inl.h"

namespace onebit::cpu {
namespace {

struct Shapes {
  using Stream = LookupAvx2<4, Integers>;
  using Panel = LookupAvx2<2, Integers>;
  using Sums = LookupAvx2<2, Chosen>;
  using NarrowPanel = Panel;
  using Stream16 = LookupAvx2Int16<2>;
  using Panel16 = LookupAvx2Int16<1>;
  static constexpr int kTile = 64;
};

bool supported() {
  return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") &&
         __builtin_cpu_supports("f16c");
}

}  // namespace

extern const LevelKernels kAvx2LevelKernels;  // levels_avx2.cpp
extern const Kernels kAvx2Kernels;
const Kernels kAvx2Kernels = Table<Shapes>::make("avx2", supported, &kAvx2LevelKernels);

}  // namespace onebit::cpu

ONEBIT_TARGET_END

#endif

// The level kernels compiled for AVX2; the same loops, wider vectors.
#if defined(__x86_64__)
#include <type_traits>

#include "../float_types.h"
#include "../levels.h"
#include "../target.h"

ONEBIT_TARGET_BEGIN("avx2,fma")

namespace onebit::cpu {
namespace {

constexpr int kVectorBytes = 32;

#include "../levels-inl.h"

}  // namespace

extern const LevelKernels kAvx2LevelKernels = make_level_kernels();

}  // namespace onebit::cpu

ONEBIT_TARGET_END
#endif  // __x86_64__

// The level kernels compiled for AVX2; the same loops, wider vectors.
#if defined(__x86_64__)
#include <type_traits>

#include "float_types.h"
#include "levels.h"

#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx2,fma,f16c"))), apply_to = function)
#else
#pragma GCC push_options
#pragma GCC target("avx2,fma,f16c")
#endif

namespace onebit::cpu {
namespace {

constexpr int kVectorBytes = 32;

#include "levels-inl.h"

}  // namespace

extern const LevelKernels kAvx2LevelKernels = make_level_kernels("avx2");

}  // namespace onebit::cpu

#if defined(__clang__)
#pragma clang attribute pop
#else
#pragma GCC pop_options
#endif
#endif  // __x86_64__

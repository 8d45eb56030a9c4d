// The level kernels compiled for AVX-512; the same loops, wider vectors.
#if defined(__x86_64__)
#include <type_traits>

#include "float_types.h"
#include "levels.h"

#if defined(__clang__)
#pragma clang attribute push(                                                    \
    __attribute__((target("avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,f16c"))), \
    apply_to = function)
#else
#pragma GCC push_options
#pragma GCC target("avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,f16c")
#endif

namespace onebit::cpu {
namespace {

constexpr int kVectorBytes = 64;

#include "levels-inl.h"

}  // namespace

extern const LevelKernels kAvx512LevelKernels = make_level_kernels("avx512");

}  // namespace onebit::cpu

#if defined(__clang__)
#pragma clang attribute pop
#else
#pragma GCC pop_options
#endif
#endif  // __x86_64__

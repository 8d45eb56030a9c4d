// The AVX-512 table: Skylake-X, Ice Lake, Zen 4 and later.
#if defined(__x86_64__)

#include <immintrin.h>

#include <cstring>

#include "../float_types.h"
#include "../kernels.h"
#include "../prepacked.h"  // which others include too: its inline functions are for any machine
#include "../scratch.h"
#include "../target.h"

#if defined(__GNUC__) && !defined(__clang__)
// GCC 12 takes the undefined operand of its own intrinsics for a mistake of ours.
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#pragma GCC diagnostic ignored "-Wuninitialized"
#endif

ONEBIT_TARGET_BEGIN("avx512f,avx512bw,avx512vl,avx512dq,avx2,fma,f16c")

#include "../table-inl.h"
#include "lookup_avx512-inl.h"
#include "lookup_avx512_int16-inl.h"
#include "prepacked-inl.h"

namespace onebit::cpu {

extern const LevelKernels kAvx512LevelKernels;  // levels_avx512.cpp

namespace {

struct Shapes {
  // 128 outputs at a time for one row of x: the tables of all of k come from L2, and are read half
  // as often as with 64.
  using Stream = LookupAvx512<8, Integers>;
  using Panel = LookupAvx512<4, Integers>;
  using Sums = LookupAvx512<4, Chosen>;
  using NarrowPanel = LookupAvx512<2, Integers>;
  using Stream16 = LookupAvx512Int16<4>;
  using Panel16 = LookupAvx512Int16<4>;
  static constexpr int kTile = 64;
};

void qmm_prepacked(const QmmArgs& a, const char* prepacked, const Block& block) {
  if (is_empty(block)) return;
  with_words(a.w.group_size, [&](auto words) {
    constexpr int kWords = decltype(words)::value;
    if (has_int16_tables(a)) {
      qmm_prepacked_panels<LookupAvx512Int16<2>, kWords>(a, prepacked, block);
    } else {
      qmm_prepacked_panels<Shapes::Panel, kWords>(a, prepacked, block);
    }
  });
}

constexpr Kernels make_kernels(bool (*supported)()) {
  Kernels k = Table<Shapes>::make("avx512", supported, &kAvx512LevelKernels);
  k.qmm_prepacked = qmm_prepacked;
  return k;
}

bool supported() {
  return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
         __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq") &&
         __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
}

}  // namespace

extern const Kernels kAvx512Kernels;
const Kernels kAvx512Kernels = make_kernels(supported);

}  // namespace onebit::cpu

ONEBIT_TARGET_END

#endif

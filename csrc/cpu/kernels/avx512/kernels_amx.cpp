// The AMX table: Sapphire Rapids and later. It is the AVX-512 one where tiles are no faster.
#if defined(__x86_64__) && defined(__linux__)

#include <cpuid.h>
#include <immintrin.h>
#include <sys/syscall.h>
#include <unistd.h>

#include <cstring>

#include "../float_types.h"
#include "../kernels.h"
#include "../prepacked.h"
#include "../scratch.h"
#include "../target.h"

#if defined(__GNUC__) && !defined(__clang__)
// GCC 12 takes the undefined operand of its own intrinsics for a mistake of ours.
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#pragma GCC diagnostic ignored "-Wuninitialized"
#endif

ONEBIT_TARGET_BEGIN(
    "amx-tile,amx-bf16,amx-int8,gfni,avx512vbmi,avx512f,avx512bw,avx512vl,avx512dq,avx2,fma,f16c")

#include "../table-inl.h"
#include "qmm_amx-inl.h"

namespace onebit::cpu {

extern const Kernels kAvx512Kernels;

namespace {

// Fewer rows of x do not pay for spreading the bits.
bool is_for_tiles(const QmmArgs& a) {
  return !needs_scalar(a) && a.m >= (has_int16_tables(a) ? 16 : 6);
}

// f(L{}): with the tiles for these activations.
template <class F>
void with_tiles(const QmmArgs& a, const F& f) {
  if (has_int16_tables(a)) return f(TilesBFloat16());
  return f(TilesBytes());
}

void qmm_t(const QmmArgs& a, const Block& block) {
  if (is_empty(block)) return;
  if (!is_for_tiles(a)) return kAvx512Kernels.qmm_t(a, block);
  with_tiles(a, [&](auto tiles) {
    using L = decltype(tiles);
    with_words(a.w.group_size, [&](auto words) {
      constexpr int kWords = decltype(words)::value;
      qmm_t_tiles<L, kWords>(a, block, [&](int64_t row, int64_t rows) {
        return StoredTile<L, kWords>{a.w, row, rows};
      });
    });
  });
}

void qmm_prepacked(const QmmArgs& a, const char* prepacked, const Block& block) {
  if (is_empty(block)) return;
  if (!is_for_tiles(a)) return kAvx512Kernels.qmm_prepacked(a, prepacked, block);
  const PrepackedLayout layout(a.w);
  with_tiles(a, [&](auto tiles) {
    using L = decltype(tiles);
    with_words(a.w.group_size, [&](auto words) {
      constexpr int kWords = decltype(words)::value;
      qmm_t_tiles<L, kWords>(a, block, [&](int64_t row, int64_t) {
        return PrepackedTile<L, kWords>{layout, a.w, prepacked, row / L::kRows};
      });
    });
  });
}

// Tile registers are large: the kernel lends them to a process that asks for them.
bool may_use_tiles() {
  constexpr long kRequest = 0x1023, kTileData = 18;  // ARCH_REQ_XCOMP_PERM
  return syscall(SYS_arch_prctl, kRequest, kTileData) == 0;
}

bool supported() {
  constexpr unsigned kTile = 1u << 24, kBytes = 1u << 25, kBFloat16 = 1u << 22;
  unsigned a, b, c, d;
  return kAvx512Kernels.supported() && __builtin_cpu_supports("avx512vbmi") &&
         __builtin_cpu_supports("gfni") && __get_cpuid_count(7, 0, &a, &b, &c, &d) && (d & kTile) &&
         (d & kBytes) && (d & kBFloat16) && may_use_tiles();
}

Kernels make_kernels() {
  Kernels k = kAvx512Kernels;
  k.name = "amx";
  k.supported = supported;
  k.m_tile = TilesBFloat16::kMaxM;  // a multiple of the others'
  k.qmm_t = qmm_t;
  k.qmm_prepacked = qmm_prepacked;
  return k;
}

}  // namespace

extern const Kernels kAmxKernels;
const Kernels kAmxKernels = make_kernels();

}  // namespace onebit::cpu

ONEBIT_TARGET_END

#endif

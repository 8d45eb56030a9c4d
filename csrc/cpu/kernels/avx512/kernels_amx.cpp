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

ONEBIT_TARGET_BEGIN("amx-tile,amx-bf16,avx512f,avx512bw,avx512vl,avx512dq,avx2,fma,f16c")

#include "../table-inl.h"
#include "qmm_amx-inl.h"

namespace onebit::cpu {

extern const Kernels kAvx512Kernels;

namespace {

// Fewer rows of x do not pay for spreading the bits.
constexpr int64_t kLeastRows = 16;

bool is_for_tiles(const QmmArgs& a) {
  return !needs_scalar(a) && has_int16_tables(a) && a.m >= kLeastRows;
}

void qmm_t(const QmmArgs& a, const Block& block) {
  if (is_empty(block)) return;
  if (!is_for_tiles(a)) return kAvx512Kernels.qmm_t(a, block);
  with_words(a.w.group_size, [&](auto words) {
    constexpr int kWords = decltype(words)::value;
    qmm_t_tiles<TilesAmx, kWords>(a, block, [&](int64_t row, int64_t rows) {
      return StoredTile<TilesAmx, kWords>{a.w, row, rows};
    });
  });
}

void qmm_prepacked(const QmmArgs& a, const char* prepacked, const Block& block) {
  if (is_empty(block)) return;
  if (!is_for_tiles(a)) return kAvx512Kernels.qmm_prepacked(a, prepacked, block);
  const PrepackedLayout layout(a.w);
  with_words(a.w.group_size, [&](auto words) {
    constexpr int kWords = decltype(words)::value;
    qmm_t_tiles<TilesAmx, kWords>(a, block, [&](int64_t row, int64_t) {
      return PrepackedTile<TilesAmx, kWords>{layout, a.w, prepacked, row / TilesAmx::kRows};
    });
  });
}

// Tile registers are large: the kernel lends them to a process that asks for them.
bool may_use_tiles() {
  constexpr long kRequest = 0x1023, kTileData = 18;  // ARCH_REQ_XCOMP_PERM
  return syscall(SYS_arch_prctl, kRequest, kTileData) == 0;
}

bool supported() {
  constexpr unsigned kTile = 1u << 24, kBFloat16 = 1u << 22;
  unsigned a, b, c, d;
  return kAvx512Kernels.supported() && __get_cpuid_count(7, 0, &a, &b, &c, &d) && (d & kTile) &&
         (d & kBFloat16) && may_use_tiles();
}

Kernels make_kernels() {
  Kernels k = kAvx512Kernels;
  k.name = "amx";
  k.supported = supported;
  k.m_tile = TilesAmx::kMaxM;
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

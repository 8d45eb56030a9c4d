// The level kernels follow the choice kernels() made, so that ONEBIT_CPU_ISA rules both.
#include "levels.h"

#include <cstring>

namespace onebit::cpu {

extern const LevelKernels kGenericLevelKernels;
#if defined(__x86_64__)
extern const LevelKernels kAvx2LevelKernels;
extern const LevelKernels kAvx512LevelKernels;
#endif

const LevelKernels& level_kernels() {
#if defined(__x86_64__)
  const char* name = kernels().name;
  if (std::strncmp(name, "avx512", 6) == 0) return kAvx512LevelKernels;
  if (std::strncmp(name, "avx2", 4) == 0) return kAvx2LevelKernels;
#endif
  return kGenericLevelKernels;
}

}  // namespace onebit::cpu

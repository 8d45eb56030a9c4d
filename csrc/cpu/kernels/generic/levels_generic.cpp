// The level kernels for the machine every binary must run on: SSE2 on x86-64, NEON on arm64.
#include <type_traits>

#include "../float_types.h"
#include "../levels.h"

namespace onebit::cpu {
namespace {

constexpr int kVectorBytes = 16;

#include "../levels-inl.h"

}  // namespace

const LevelKernels kGenericLevelKernels = make_level_kernels();

}  // namespace onebit::cpu

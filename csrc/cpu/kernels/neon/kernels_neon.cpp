// The NEON table: every 64-bit ARM, Apple silicon included.
#if defined(__aarch64__)

#include <arm_neon.h>

#include <cstring>

#include "../float_types.h"
#include "../kernels.h"
#include "../levels.h"
#include "../scratch.h"
#include "../table-inl.h"
#include "../target.h"
#include "lookup_neon-inl.h"
#include "neon-inl.h"

namespace onebit::cpu {
namespace {

struct Shapes {
  using Stream = LookupNeon<2, int32_t>;
  using Panel = LookupNeon<1, int32_t>;
  using Stream16 = LookupNeon<4, int16_t>;
  using Panel16 = LookupNeon<2, int16_t>;
  using Sums = ChosenNeon<4>;
  using NarrowPanel = Panel;
  static constexpr int kTile = 64;
};

bool supported() { return true; }

}  // namespace

extern const Kernels kNeonKernels;
const Kernels kNeonKernels = Table<Shapes>::make("neon", supported, &kGenericLevelKernels);

}  // namespace onebit::cpu

#endif

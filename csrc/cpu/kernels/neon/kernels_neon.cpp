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
#include "lookup_neon_int16-inl.h"
#include "neon-inl.h"

namespace onebit::cpu {
namespace {

struct Shapes {
  using Stream = LookupNeon<4, Integers>;
  using Panel = Stream;
  using Stream16 = LookupNeonInt16<4>;
  using Panel16 = LookupNeonInt16<2>;
  using Sums = LookupNeon<4, Chosen>;
  using NarrowPanel = Panel;
  static constexpr int kTile = 64;
};

bool supported() { return true; }

}  // namespace

extern const Kernels kNeonKernels;
const Kernels kNeonKernels = Table<Shapes>::make("neon", supported, &kGenericLevelKernels);

}  // namespace onebit::cpu

#endif

// The tests of the level kernels, for the one main() there is.
#pragma once

#include "../../csrc/cpu/kernels/levels.h"

namespace onebit::cpu {

// Counts what it finds in `failures`.
void test_levels(const Kernels& table);

}  // namespace onebit::cpu

// Tensor operations are used where they have shown that they compute what simdgroup matrices do.
#pragma once

#include "launch_plan.h"

namespace onebit::mps {

// Does this pipeline of qmm_tensor? Multiplies a few tiles when it is asked the first time. The
// first no holds for every pipeline of the process, and is said in a warning.
bool tensor_tiles_agree(const Pipeline& pipeline, const Gpu& gpu);

}  // namespace onebit::mps

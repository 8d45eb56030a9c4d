// Runs planned launches on PyTorch's current MPS stream. C++ only: the Metal is in encoder.mm.
#pragma once

#include <ATen/core/Tensor.h>

#include "launch_plan.h"

namespace onebit::mps {

// One launch and its arguments: buffers[i] is [[buffer(i)]], the argument struct comes after them.
// A buffer the pipeline does not use may be undefined.
struct Work {
  Launch launch;
  c10::SmallVector<at::Tensor, 8> buffers;
  const void* params;  // at most 4096 bytes
  size_t params_size;
};

// Encodes in order; each launch sees what the one before it wrote. Raises RuntimeError when the
// library or a pipeline cannot be compiled.
void encode(at::ArrayRef<Work> works);

// The GPU of the current stream.
Gpu current_gpu();

}  // namespace onebit::mps

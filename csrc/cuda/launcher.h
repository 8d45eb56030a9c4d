// Compiles kernels when they are first needed, and launches them on PyTorch's current stream.
#pragma once

#include <ATen/core/Tensor.h>

#include "launch_plan.h"

namespace onebit::cuda {

// The device of t, which a launch needs to be the current one.
Gpu gpu_of(const at::Tensor& t);

// Queues one kernel, whose only argument is *args. Raises RuntimeError when it cannot be compiled.
void launch(const Launch& launch, const void* args, size_t size);

template <class Args>
void launch(const Launch& planned, const Args& args) {
  launch(planned, &args, sizeof args);
}

// A matrix in global memory for the copy engine, dimensions from the innermost.
struct TensorShape {
  const void* data;
  bool words;  // 32-bit words, else values of 16 bits in rows of 128 bytes, swizzled
  int rank;
  uint64_t sizes[4];
  uint64_t strides[3];  // bytes between elements of dimension 1, 2, ...
  uint32_t box[4];      // what one copy brings
  bool is_half;
};
TensorMap tensor_map(const TensorShape& shape);

}  // namespace onebit::cuda

// Choosing two levels for a group of real-valued weights, and training through that choice.
// The part of a kernel table that does this.
//
//   bit(v)   = (v - origin) > threshold
//   w_hat(v) = bit(v) ? high : low                     scale = high - low, bias = low
//
//   rule      origin  threshold     low, high
//   minmax    min     (max-min)/2   min, max
//   sign      0       0             -+ mean|v|
//   mean      mean    0             mean -+ mean|v - mean|
//   optimal   0       best cut      means of the values below and above: the least squared error
#pragma once

#include <cstdint>

#include "kernels.h"

namespace onebit::cpu {

// Tensors are contiguous, seen as [groups, group_size]; importance is null or [period, group_size]
// and repeats every `period` groups.
struct LevelsArgs {
  const void* w;
  DType dtype;  // of w, scales and biases
  Rule rule;
  int group_size;
  const float* importance;
  int64_t period;
};

struct QuantizeLevelsOut {
  uint32_t* packed;  // [groups, group_size / 32]
  void* scales;      // [groups]
  void* biases;      // [groups]
};

// Scale and bias are free parameters: w_hat = scale * bit + bias, bit = (w - bias) > scale / 2.
struct AffineArgs {
  const void* w;       // [groups, group_size]
  DType dtype;         // of w
  const void* scales;  // [groups]
  const void* biases;  // [groups]
  DType level_dtype;   // of scales, biases and their gradients
  int group_size;
};

// Passes over the columns of rows, at most `sweeps`; a row in which nothing flipped is done.
struct DescentArgs {
  bool is_double;       // else float
  bool* bits;           // [n, k]
  void* error;          // [n, k], 64-byte aligned: (w - w_hat) moments, kept so
  const void* scales;   // [n, k / group_size]
  const void* moments;  // [k, k], symmetric
  int64_t* flips;       // [n], how many
  int64_t k;
  int group_size;
  int64_t sweeps;
};

// Functions work on groups [begin, end) on the calling thread; a group's result depends on nothing
// else.
struct LevelKernels {
  void (*quantize)(const LevelsArgs&, const QuantizeLevelsOut&, int64_t begin, int64_t end);
  // out [groups, group_size] in out_dtype.
  void (*fake_quantize)(const LevelsArgs&, void* out, DType out_dtype, int64_t begin, int64_t end);
  // grad_w = grad + (d levels / d w)^T grad: straight through for the bit, exact for the levels.
  void (*fake_quantize_backward)(const LevelsArgs&,
                                 const void* grad,
                                 DType grad_dtype,
                                 void* grad_w,  // in args.dtype
                                 int64_t begin,
                                 int64_t end);
  void (*fake_quantize_affine)(
      const AffineArgs&, void* out, DType out_dtype, int64_t begin, int64_t end);
  void (*fake_quantize_affine_backward)(const AffineArgs&,
                                        const void* grad,
                                        DType grad_dtype,
                                        void* grad_scales,
                                        void* grad_biases,
                                        int64_t begin,
                                        int64_t end);
  // Of rows [begin, end).
  void (*descend)(const DescentArgs&, int64_t begin, int64_t end);
};

// For the machine every binary must run on: SSE2 on x86-64, NEON on arm64.
extern const LevelKernels kGenericLevelKernels;

}  // namespace onebit::cpu

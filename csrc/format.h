// The 1-bit affine format: one bit per weight, a scale and a bias per group. docs/format.md is the
// prose.
//
//   w_hat[r, j] = scales[r, j / group_size] * bit(r, j) + biases[r, j / group_size]
//   bit(r, j)   = packed[r, j / 32] >> (j % 32) & 1
//
// Compiled by the host compilers and included by the Metal shaders: no standard header, no std::.
#pragma once

// Metal wants an address space on every constant of a program.
#if defined(__METAL_VERSION__)
#define ONEBIT_CONSTANT constant constexpr
#else
#define ONEBIT_CONSTANT constexpr
#endif

namespace onebit {

// Values in one packed word; bit 0 is the first value.
ONEBIT_CONSTANT int kWordBits = 32;

// A group is 1, 2 or 4 whole words, so no word straddles two groups and no row has a tail.
#if !defined(__METAL_VERSION__)  // has no long long
constexpr bool is_group_size(long long group_size) {
  return group_size == 32 || group_size == 64 || group_size == 128;
}
#endif

// Of values, scales and biases; GPU kernels have no float64.
enum class DType : unsigned char { kFloat, kHalf, kBFloat16, kDouble };

// How two levels are chosen for real-valued weights: csrc/cpu/kernels/levels.h has the formulae.
enum class Rule : unsigned char { kMinMax, kSign, kMean, kOptimal };

// Smallest scale quantize writes: constant groups keep bits 0 and decode to their bias.
ONEBIT_CONSTANT float kMinScale = 1e-7f;

}  // namespace onebit

// Shared by the kernels: function constants, levels of a group, blocks of x, matrices of a batch.
#pragma once
#include <metal_simdgroup>
#include <metal_simdgroup_matrix>
#include <metal_stdlib>

// A product is rounded before it is added, as on the CPU; what is fused says fma.
#pragma METAL fp contract(off)

#include "../csrc/mps/params.h"

using namespace metal;
using namespace onebit;

#define ONEBIT_CONSTANT_OF(type, name, index) constant type k##name [[function_constant(index)]];
ONEBIT_FUNCTION_CONSTANTS(ONEBIT_CONSTANT_OF)

// kLevelType and kOtherType are numbers of a DType, kRule is that of a Rule.
inline bool rule_is(Rule rule) { return kRule == uint(rule); }

// Before a loop that indexes registers: what is not unrolled goes to memory (tile-ai/tilelang
// #3195: 333 to 56 ms). Not before a loop over words, whose instructions would no longer fit their
// cache.
#define ONEBIT_UNROLL _Pragma("clang loop unroll(full)")

// Writes the signature of a kernel once.
#define ONEBIT_INSTANTIATE(name, ...) \
  template [[host_name(name)]] [[kernel]] decltype(__VA_ARGS__) __VA_ARGS__;

inline float read_as(uint type, const device void* values, uint i) {
  if (type == uint(DType::kHalf)) return float(((const device half*)values)[i]);
  if (type == uint(DType::kBFloat16)) return float(((const device bfloat*)values)[i]);
  return ((const device float*)values)[i];
}
inline float read_level(const device void* values, uint i) {
  return read_as(kLevelType, values, i);
}

inline void write_as(uint type, device void* values, uint i, float value) {
  if (type == uint(DType::kHalf)) {
    ((device half*)values)[i] = half(value);
  } else if (type == uint(DType::kBFloat16)) {
    ((device bfloat*)values)[i] = bfloat(value);
  } else {
    ((device float*)values)[i] = value;
  }
}

// A weight of the group is scale * bit + bias.
struct Levels {
  float scale;
  float bias;
};

inline Levels read_levels(const device void* scales, const device void* biases, uint i) {
  Levels levels;
  levels.scale = read_level(scales, i);
  levels.bias = kHasBiases ? read_level(biases, i) : -0.5f * levels.scale;
  return levels;
}

inline bool bit_of(uint bits, uint i) { return ((bits >> i) & 1u) != 0; }

// The host keeps x aligned for this: its byte offset is a multiple of four elements.
template <typename T>
inline vec<float, 4> read_four(const device T* x) {
  return vec<float, 4>(*(const device vec<T, 4>*)x);
}

inline long matrix_of(const device long* index, uint repeat, uint matrices, uint b) {
  return repeat != 0 ? long(b / repeat % matrices) : index[b];
}

// Which matrices of x and w meet in output matrix b. An index outside its range has no matrix: the
// kernel then writes NaN, for raising an error would make every call wait for the GPU.
struct Matrices {
  uint x, w;
  bool valid;
};

inline Matrices find_matrices(const device long* x_index,
                              const device long* w_index,
                              constant QmmParams& p,
                              uint b) {
  Matrices found = {0, 0, true};
  if (kIndexed) {
    const long x = matrix_of(x_index, p.x_repeat, p.x_matrices, b);
    const long w = matrix_of(w_index, p.w_repeat, p.w_matrices, b);
    found.valid = x >= 0 && x < long(p.x_matrices) && w >= 0 && w < long(p.w_matrices);
    found.x = found.valid ? uint(x) : 0;
    found.w = found.valid ? uint(w) : 0;
  }
  return found;
}

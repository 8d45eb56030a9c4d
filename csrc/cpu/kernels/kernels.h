// The CPU kernels as one table of functions per instruction set. No torch in here: a kernel file
// compiles alone, and can be fuzzed, sanitised and cross-compiled alone.
#pragma once

#include <cstdint>

#include "../../format.h"

namespace onebit::cpu {

constexpr int64_t element_size(DType dtype) {
  return dtype == DType::kDouble ? 8 : dtype == DType::kFloat ? 4 : 2;
}
template <DType kType>
struct TypeTag {
  static constexpr DType value = kType;
};

// Matrix of 1-bit weights, contiguous. Groups run along a row.
struct Weights {
  const uint32_t* packed;  // [rows, columns / 32]
  const void* scales;      // [rows, columns / group_size]
  const void* biases;      // [rows, columns / group_size], or null: -scales / 2
  DType dtype;             // of scales and biases
  int64_t rows;
  int64_t columns;
  int group_size;
};

// y = x . dequantize(w)^T when w is [n, k] (transpose), y = x . dequantize(w) when w is [k, n].
struct QmmArgs {
  const void* x;  // [m, k]
  void* y;        // [m, n]
  DType dtype;    // of x and y; sums are float (double for kDouble)
  int64_t m, n, k;
  Weights w;
  // Row i of the product is row x_rows[i] of x and y_rows[i] of y; null: row i. Lets gather_qmm
  // give all rows of one expert in one call without copying them.
  const int64_t* x_rows = nullptr;
  const int64_t* y_rows = nullptr;
};

// A handful of outputs has too few roundings to average out: the scalar kernel, which sums in
// double, is as fast there and keeps each of them within the accuracy rule.
inline bool is_tiny(const QmmArgs& a) { return a.m * a.n <= 16 && a.m * a.n * a.k <= 16384; }

// Float64 and tiny products have no other kernels.
inline bool needs_scalar(const QmmArgs& a) {
  return a.dtype == DType::kDouble || a.w.dtype == DType::kDouble || is_tiny(a);
}

// grad_scales[r, g] += sum over the group of dW[r, j] * bit(r, j);  grad_biases: the same without
// bit. dW = y_grad^T . x when w is [n, k] (transpose), x^T . y_grad when w is [k, n].
struct AffineGradArgs {
  const void* grad;   // [m, n]
  const void* x;      // [m, k]
  DType dtype;        // of grad and x
  void* grad_scales;  // as scales; float (double for kDouble)
  void* grad_biases;  // as biases; the same
  int64_t m, n, k;
  const uint32_t* packed;
  int group_size;
};

// Half-open block of the output.
struct Block {
  int64_t m_begin, m_end;
  int64_t n_begin, n_end;
};

struct LevelKernels;

// Every function works on the calling thread and computes an output element in an order of
// operations that depends on neither the block nor the thread it came with, as long as blocks start
// at multiples of the tile sizes below.
struct Kernels {
  const char* name;
  bool (*supported)();  // by the machine this runs on
  int64_t m_tile, n_tile;

  void (*qmm_t)(const QmmArgs&, const Block&);
  void (*qmm_n)(const QmmArgs&, const Block&);
  // Rows [begin, end) of the packed matrix.
  void (*affine_grad_t)(const AffineGradArgs&, int64_t begin, int64_t end);
  void (*affine_grad_n)(const AffineGradArgs&, int64_t begin, int64_t end);

  // Groups [begin, end) of a contiguous tensor: w [groups, group_size] in dtype.
  void (*quantize)(const void* w,
                   DType dtype,
                   int group_size,
                   uint32_t* packed,
                   void* scales,
                   void* biases,
                   int64_t begin,
                   int64_t end);
  // out[(g - begin), group_size] for groups g in [begin, end) of w, rounded as w.dtype rounds.
  void (*dequantize)(const Weights& w, void* out, int64_t begin, int64_t end);

  const LevelKernels* levels;  // levels.h

  // The product (transpose=True) with weights in the form of prepacked.h; a.w has their sizes and
  // no tensors but, as a sign that there are any, biases. Not for what needs_scalar; null where an
  // instruction set has no such kernel.
  void (*qmm_prepacked)(const QmmArgs& a, const char* prepacked, const Block&) = nullptr;
};

// The reference, one value at a time; other tables give it what they have no fast form of.
extern const Kernels kScalarKernels;

// Tables this binary has and this machine can run, best first; the scalar one is always last.
// ONEBIT_CPU_ISA=<name> forces one; `select_kernels` is for the tests.
const Kernels* const* available_kernels(int* count);
const Kernels& kernels();
bool select_kernels(const char* name);

}  // namespace onebit::cpu

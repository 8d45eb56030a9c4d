// What weights to bits and back read. dequantize and embedding are forms of one decoding: each
// layer is one function of Coded.
#pragma once

#include "../dispatch.h"

namespace onebit {

using Quantized = std::tuple<Tensor, Tensor, Tensor>;  // packed, scales, biases

struct Quantize {
  static constexpr const char* kName = "onebit::quantize";
  using Result = Quantized;
  const Tensor& w;
  int64_t group_size;
  auto fields() const { return std::tie(w, group_size); }
};

struct Coded {
  const Tensor& packed;
  const Tensor& scales;
  const OptionalTensor& biases;
  int64_t group_size;
  const Tensor* indices = nullptr;  // of rows of packed; all of it without
};

struct Dequantize {
  static constexpr const char* kName = "onebit::dequantize";
  using Result = Tensor;
  const Tensor& packed;
  const Tensor& scales;
  const OptionalTensor& biases;
  int64_t group_size;
  auto fields() const { return std::tie(packed, scales, biases, group_size); }
  operator Coded() const { return {packed, scales, biases, group_size}; }
};

struct Embedding {
  static constexpr const char* kName = "onebit::embedding";
  using Result = Tensor;
  const Tensor& indices;
  const Tensor& packed;
  const Tensor& scales;
  const OptionalTensor& biases;
  int64_t group_size;
  auto fields() const { return std::tie(indices, packed, scales, biases, group_size); }
  operator Coded() const { return {packed, scales, biases, group_size, &indices}; }
};

}  // namespace onebit

// What the operators of levels read.
#pragma once

#include "../dispatch.h"

namespace onebit {

using OptionalType = std::optional<at::ScalarType>;
using QuantizedLevels = std::tuple<Tensor, Tensor, Tensor>;
using GradLevels = std::tuple<Tensor, Tensor>;  // of scales, of biases

// w as two levels per group: chosen by a rule, or given. What an operator does not take is null.
struct LevelOperands {
  const Tensor& w;
  int64_t group_size;
  c10::string_view rule = {};
  const Tensor* scales = nullptr;  // given, as are biases
  const Tensor* biases = nullptr;
  const Tensor* importance = nullptr;
  OptionalType dtype = std::nullopt;  // of what fake_quantize returns
  const Tensor* grad = nullptr;       // of what it returned

  bool given() const { return scales != nullptr; }
  at::ScalarType result_type() const { return dtype.value_or(w.scalar_type()); }
};

struct QuantizeLevels {
  static constexpr const char* kName = "onebit::quantize_levels";
  using Result = QuantizedLevels;
  const Tensor& w;
  c10::string_view rule;
  int64_t group_size;
  const OptionalTensor& importance;
  auto fields() const { return std::tie(w, rule, group_size, importance); }
  operator LevelOperands() const {
    return {w, group_size, rule, nullptr, nullptr, importance ? &*importance : nullptr};
  }
};

struct FakeQuantize {
  static constexpr const char* kName = "onebit::fake_quantize";
  using Result = Tensor;
  const Tensor& w;
  c10::string_view rule;
  int64_t group_size;
  OptionalType dtype;
  auto fields() const { return std::tie(w, rule, group_size, dtype); }
  operator LevelOperands() const { return {w, group_size, rule, nullptr, nullptr, nullptr, dtype}; }
};

struct FakeQuantizeBackward {
  static constexpr const char* kName = "onebit::fake_quantize_backward";
  using Result = Tensor;
  const Tensor& grad;
  const Tensor& w;
  c10::string_view rule;
  int64_t group_size;
  auto fields() const { return std::tie(grad, w, rule, group_size); }
  operator LevelOperands() const {
    return {w, group_size, rule, nullptr, nullptr, nullptr, std::nullopt, &grad};
  }
};

struct FakeQuantizeAffine {
  static constexpr const char* kName = "onebit::fake_quantize_affine";
  using Result = Tensor;
  const Tensor& w;
  const Tensor& scales;
  const Tensor& biases;
  int64_t group_size;
  OptionalType dtype;
  auto fields() const { return std::tie(w, scales, biases, group_size, dtype); }
  operator LevelOperands() const { return {w, group_size, {}, &scales, &biases, nullptr, dtype}; }
};

struct FakeQuantizeAffineBackward {
  static constexpr const char* kName = "onebit::fake_quantize_affine_backward";
  using Result = GradLevels;
  const Tensor& grad;
  const Tensor& w;
  const Tensor& scales;
  const Tensor& biases;
  int64_t group_size;
  auto fields() const { return std::tie(grad, w, scales, biases, group_size); }
  operator LevelOperands() const {
    return {w, group_size, {}, &scales, &biases, nullptr, std::nullopt, &grad};
  }
};

struct FlipBits {
  static constexpr const char* kName = "onebit::flip_bits_";
  using Result = Tensor;
  Tensor& bits;           // [n, k]
  const Tensor& error;    // [n, k]
  const Tensor& scales;   // [n, k / group_size]
  const Tensor& moments;  // [k, k]
  int64_t begin, end;     // columns
  int64_t group_size;
  auto fields() const { return std::tie(bits, error, scales, moments, begin, end, group_size); }
};

struct Descend {
  static constexpr const char* kName = "onebit::descend_";
  using Result = Tensor;
  Tensor& bits;  // these as of FlipBits
  const Tensor& error;
  const Tensor& scales;
  const Tensor& moments;
  int64_t sweeps;
  int64_t group_size;
  auto fields() const { return std::tie(bits, error, scales, moments, sweeps, group_size); }
};

}  // namespace onebit

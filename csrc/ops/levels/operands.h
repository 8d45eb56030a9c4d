// What the operators of levels read.
#pragma once

#include <tuple>

#include "../dispatch.h"
#include "../rules.h"

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
  using Signature = QuantizedLevels(const Tensor&,
                                    c10::string_view,
                                    int64_t,
                                    const OptionalTensor&);
  static LevelOperands operands(const Tensor& w,
                                c10::string_view rule,
                                int64_t group_size,
                                const OptionalTensor& importance) {
    return {w, group_size, rule, nullptr, nullptr, importance ? &*importance : nullptr};
  }
};

struct FakeQuantize {
  static constexpr const char* kName = "onebit::fake_quantize";
  using Signature = Tensor(const Tensor&, c10::string_view, int64_t, OptionalType);
  static LevelOperands operands(const Tensor& w,
                                c10::string_view rule,
                                int64_t group_size,
                                OptionalType dtype) {
    return {w, group_size, rule, nullptr, nullptr, nullptr, dtype};
  }
};

struct FakeQuantizeBackward {
  static constexpr const char* kName = "onebit::fake_quantize_backward";
  using Signature = Tensor(const Tensor&, const Tensor&, c10::string_view, int64_t);
  static LevelOperands operands(const Tensor& grad,
                                const Tensor& w,
                                c10::string_view rule,
                                int64_t group_size) {
    return {w, group_size, rule, nullptr, nullptr, nullptr, std::nullopt, &grad};
  }
};

struct FakeQuantizeAffine {
  static constexpr const char* kName = "onebit::fake_quantize_affine";
  using Signature = Tensor(const Tensor&, const Tensor&, const Tensor&, int64_t, OptionalType);
  static LevelOperands operands(const Tensor& w,
                                const Tensor& scales,
                                const Tensor& biases,
                                int64_t group_size,
                                OptionalType dtype) {
    return {w, group_size, {}, &scales, &biases, nullptr, dtype};
  }
};

struct FakeQuantizeAffineBackward {
  static constexpr const char* kName = "onebit::fake_quantize_affine_backward";
  using Signature = GradLevels(const Tensor&, const Tensor&, const Tensor&, const Tensor&, int64_t);
  static LevelOperands operands(const Tensor& grad,
                                const Tensor& w,
                                const Tensor& scales,
                                const Tensor& biases,
                                int64_t group_size) {
    return {w, group_size, {}, &scales, &biases, nullptr, std::nullopt, &grad};
  }
};

// bits, error [n, k], scales [n, k / group_size], moments [k, k].
struct FlipOperands {
  Tensor& bits;
  const Tensor& error;
  const Tensor& scales;
  const Tensor& moments;
  int64_t begin, end;  // columns
  int64_t group_size;
};

struct FlipBits {
  static constexpr const char* kName = "onebit::flip_bits_";
  using Signature =
      Tensor(Tensor&, const Tensor&, const Tensor&, const Tensor&, int64_t, int64_t, int64_t);
  static FlipOperands operands(Tensor& bits,
                               const Tensor& error,
                               const Tensor& scales,
                               const Tensor& moments,
                               int64_t begin,
                               int64_t end,
                               int64_t group_size) {
    return {bits, error, scales, moments, begin, end, group_size};
  }
};

// bits, error [n, k], scales [n, k / group_size], moments [k, k].
struct DescentOperands {
  Tensor& bits;
  const Tensor& error;
  const Tensor& scales;
  const Tensor& moments;
  int64_t sweeps;
  int64_t group_size;
};

struct Descend {
  static constexpr const char* kName = "onebit::descend_";
  using Signature = Tensor(Tensor&, const Tensor&, const Tensor&, const Tensor&, int64_t, int64_t);
  static DescentOperands operands(Tensor& bits,
                                  const Tensor& error,
                                  const Tensor& scales,
                                  const Tensor& moments,
                                  int64_t sweeps,
                                  int64_t group_size) {
    return {bits, error, scales, moments, sweeps, group_size};
  }
};

}  // namespace onebit

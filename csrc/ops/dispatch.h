// An operator said once. Its room has a struct of its name, its signature, and the operands that
// the arguments are; a layer of it (Meta, autograd, a backend, the composite) is a function of the
// operands:
//
//   struct Dequantize {
//     static constexpr const char* kName = "onebit::dequantize";
//     using Signature = Tensor(const Tensor& packed, ...);
//     static Coded operands(const Tensor& packed, ...) { return {packed, ...}; }
//   };
//   TORCH_LIBRARY_IMPL(onebit, Meta, m) { define<Dequantize, decode_meta>(m); }
#pragma once

#include <ATen/core/LegacyTypeDispatch.h>
#include <ATen/core/dispatch/Dispatcher.h>
#include <c10/util/FunctionRef.h>
#include <torch/library.h>

namespace onebit {

// Look an operator up once: `static const auto op = find_op<Signature>("onebit::name");`
template <class Signature>
c10::TypedOperatorHandle<Signature> find_op(const char* name) {
  return c10::Dispatcher::singleton().findSchemaOrThrow(name, "").typed<Signature>();
}

template <class Op>
const auto& handle() {
  static const auto op = find_op<typename Op::Signature>(Op::kName);
  return op;
}

// The operator, through the dispatcher, as Python calls it.
template <class Op, class... Args>
auto call(Args&&... args) {
  return handle<Op>().call(args...);
}

// The same call in the layers below the one that runs.
template <class Result>
using Below = c10::function_ref<Result()>;

template <class Op, auto layer, class Signature = typename Op::Signature>
struct Layer;

template <class Op, auto layer, class Result, class... Args>
struct Layer<Op, layer, Result(Args...)> {
  static Result run(Args... args) { return layer(Op::operands(args...)); }

  static Result run_above_composite(Args... args) {
    return layer(Op::operands(args...),
                 [&] { return handle<Op>().redispatch(c10::DispatchKeySet(), args...); });
  }

  template <const c10::DispatchKeySet& mask>
  static Result run_above(c10::DispatchKeySet keys, Args... args) {
    return layer(Op::operands(args...), [&] {
      at::AutoDispatchBelowADInplaceOrView guard;
      return handle<Op>().redispatch(keys & mask, args...);
    });
  }
};

template <class Op, auto layer>
void define(torch::Library& m) {
  m.impl(Op::kName, &Layer<Op, layer>::run);
}

// A backend that leaves some calls to the composite: layer(operands, below).
template <class Op, auto layer>
void define_above_composite(torch::Library& m) {
  m.impl(Op::kName, &Layer<Op, layer>::run_above_composite);
}

// Autograd and ADInplaceOrView: layer(operands, below).
template <class Op, auto layer>
void define_autograd(torch::Library& m) {
  m.impl(Op::kName, &Layer<Op, layer>::template run_above<c10::after_autograd_keyset>);
}
template <class Op, auto layer>
void define_inplace(torch::Library& m) {
  m.impl(Op::kName, &Layer<Op, layer>::template run_above<c10::after_ADInplaceOrView_keyset>);
}

}  // namespace onebit

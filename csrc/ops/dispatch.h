// An operator said once: a struct of its arguments, in the order of its schema. A layer (Meta,
// autograd, a backend, the composite) is a function of the struct, or of what it converts to where
// several operators are forms of one:
//
//   struct Dequantize {
//     static constexpr const char* kName = "onebit::dequantize";
//     using Result = Tensor;
//     const Tensor& packed;
//     ...
//     auto fields() const { return std::tie(packed, ...); }
//   };
//   TORCH_LIBRARY_IMPL(onebit, Meta, m) { define<Dequantize, decode_meta>(m); }
//   call(Dequantize{packed, ...})
#pragma once

#include <ATen/core/LegacyTypeDispatch.h>
#include <ATen/core/dispatch/Dispatcher.h>
#include <c10/util/FunctionRef.h>
#include <torch/library.h>

#include <tuple>

#include "rules.h"

namespace onebit {

// The same call in the layers below the one that runs.
template <class Result>
using Below = c10::function_ref<Result()>;

// How the dispatcher passes a field: tensors by reference, numbers by value.
template <class Field, class Value = std::decay_t<Field>>
using Argument =
    std::conditional_t<std::is_same_v<Value, Tensor> || std::is_same_v<Value, OptionalTensor>,
                       Field,
                       Value>;

template <class Op, class Fields = decltype(std::declval<const Op&>().fields())>
struct Operator;

template <class Op, class... Fields>
struct Operator<Op, std::tuple<Fields...>> {
  using Result = typename Op::Result;

  static const auto& handle() {
    static const auto op = c10::Dispatcher::singleton()
                               .findSchemaOrThrow(Op::kName, "")
                               .template typed<Result(Argument<Fields>...)>();
    return op;
  }

  template <auto layer>
  static Result run(Argument<Fields>... args) {
    return layer(Op{args...});
  }

  template <auto layer>
  static Result run_above_composite(Argument<Fields>... args) {
    return layer(Op{args...}, [&] { return handle().redispatch(c10::DispatchKeySet(), args...); });
  }

  template <auto layer>
  static Result run_autograd(c10::DispatchKeySet keys, Argument<Fields>... args) {
    return layer(Op{args...}, [&] {
      at::AutoDispatchBelowADInplaceOrView guard;
      return handle().redispatch(keys & c10::after_autograd_keyset, args...);
    });
  }

  // Autograd looks at versions to tell whether what it saved is still what it was.
  static Result run_counted(c10::DispatchKeySet keys, Argument<Fields>... args) {
    const auto below = [&] {
      at::AutoDispatchBelowADInplaceOrView guard;
      return handle().redispatch(keys & c10::after_ADInplaceOrView_keyset, args...);
    };
    const auto count = [&] {
      std::get<0>(std::tie(args...)).unsafeGetTensorImpl()->bump_version();
    };
    if constexpr (std::is_void_v<Result>) {
      below();
      count();
    } else {
      auto result = below();
      count();
      return result;
    }
  }
};

// The operator, through the dispatcher, as Python calls it.
template <class Op>
auto call(const Op& o) {
  return std::apply([](auto&... args) { return Operator<Op>::handle().call(args...); }, o.fields());
}

// The same call of another x, which is the first argument.
template <class Op>
auto with_x(const Op& o, const Tensor& x) {
  return std::apply([&](auto&, auto&... others) { return Op{x, others...}; }, o.fields());
}

template <class Op, auto layer>
void define(torch::Library& m) {
  m.impl(Op::kName, &Operator<Op>::template run<layer>);
}

// A backend that leaves some calls to the composite: layer(operands, below).
template <class Op, auto layer>
void define_above_composite(torch::Library& m) {
  m.impl(Op::kName, &Operator<Op>::template run_above_composite<layer>);
}

// layer(operands, below)
template <class Op, auto layer>
void define_autograd(torch::Library& m) {
  m.impl(Op::kName, &Operator<Op>::template run_autograd<layer>);
}

// For ADInplaceOrView, of an operator that changes its first argument.
template <class Op>
void define_inplace(torch::Library& m) {
  m.impl(Op::kName, &Operator<Op>::run_counted);
}

}  // namespace onebit

// Calling an operator from C++ through the dispatcher, as Python would.
#pragma once

#include <ATen/core/dispatch/Dispatcher.h>

namespace onebit {

// Look an operator up once: `static const auto op = find_op<Signature>("onebit::name");`
template <class Signature>
c10::TypedOperatorHandle<Signature> find_op(const char* name) {
  return c10::Dispatcher::singleton().findSchemaOrThrow(name, "").typed<Signature>();
}

}  // namespace onebit

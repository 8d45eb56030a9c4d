// What the gradients of autograd.cpp and levels_autograd.cpp are built with.
#pragma once

#include <ATen/core/Tensor.h>
#include <torch/csrc/autograd/function.h>
#include <torch/csrc/autograd/functions/utils.h>
#include <torch/csrc/autograd/saved_variable.h>
#include <torch/library.h>

#include <utility>

#include "shape.h"

namespace onebit {

namespace autograd = torch::autograd;
using autograd::SavedVariable;
using autograd::variable_list;

// torch 2.13 counts references to a node in the node itself, older versions beside it.
#if __has_include(<torch/csrc/autograd/node.h>)
template <class N, class... Args>
c10::intrusive_ptr<N> make_node(Args&&... args) {
  return c10::make_intrusive<N>(std::forward<Args>(args)...);
}
#else
template <class N, class... Args>
std::shared_ptr<N> make_node(Args&&... args) {
  return std::shared_ptr<N>(new N(std::forward<Args>(args)...), autograd::deleteNode);
}
#endif

template <class Op, class... Args>
auto below_autograd(const Op& op, c10::DispatchKeySet keys, Args&&... args) {
  at::AutoDispatchBelowADInplaceOrView guard;
  return op.redispatch(keys & c10::after_autograd_keyset, std::forward<Args>(args)...);
}

// PyTorch has one level of forward mode here; torch.func nests by wrapping tensors.
constexpr int64_t kForwardLevel = 0;

inline bool has_tangent(const Tensor& t) { return t._fw_grad(kForwardLevel).defined(); }
inline bool has_tangent(const OptionalTensor& t) { return t && has_tangent(*t); }

}  // namespace onebit

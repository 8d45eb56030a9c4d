// What gradients are written with. A backward is a function of saved tensors and numbers; the node
// around it is of the kind PyTorch generates for its own operators, not torch::autograd::Function:
// half the call overhead when nothing requires grad, and torch.func and compiled autograd can go
// through it.
#pragma once

#include <ATen/TensorOperators.h>
#include <ATen/core/Tensor.h>
#include <ATen/ops/zeros_like.h>
#include <torch/csrc/autograd/function.h>
#include <torch/csrc/autograd/functions/utils.h>
#include <torch/csrc/autograd/saved_variable.h>
#include <torch/csrc/dynamo/compiled_autograd.h>
#include <torch/library.h>

#include <string>
#include <utility>
#include <vector>

#include "rules.h"

namespace onebit {

namespace autograd = torch::autograd;
using autograd::variable_list;

// What a backward keeps of the forward pass. Tensors may be undefined; one that was changed in
// place since is refused.
struct Saved {
  variable_list tensors;
  std::vector<c10::SymInt> sizes;
  std::vector<int64_t> numbers;
  std::string text;
};

using Needed = std::vector<bool>;  // by input of the operator: whether its gradient is asked for

struct Backward {
  const char* name;
  // The gradients of the inputs, undefined where none is needed; at least one of grads is defined.
  variable_list (*gradients)(const variable_list& grads, const Saved&, const Needed&);
};

class Node : public autograd::TraceableFunction {
 public:
  Node(const Backward& backward, const Saved& saved)
      : backward_(backward), sizes_(saved.sizes), numbers_(saved.numbers), text_(saved.text) {
    for (const auto& t : saved.tensors) tensors_.emplace_back(t, /*is_output=*/false);
  }

  std::string name() const override { return backward_.name; }

  variable_list apply(variable_list&& grads) override {
    std::lock_guard<std::mutex> lock(mutex_);
    return run(backward_, grads, {unpack(), sizes_, numbers_, text_}, needed());
  }

  void release_variables() override {
    std::lock_guard<std::mutex> lock(mutex_);
    for (auto& t : tensors_) t.reset_data();
  }

  // Compiled autograd: what of this node a compiled graph is specialized on or takes as inputs, and
  // a call of the backward that it can record.
  void compiled_args(torch::dynamo::autograd::CompiledNodeArgs& args) const override {
    args.collect(std::string(backward_.name));
    args.collect(tensors_, /*is_output=*/false);
    args.collect(sizes_);
    args.collect(numbers_);
    args.collect(text_);
  }

  variable_list apply_with_saved(const variable_list& grads,
                                 torch::dynamo::autograd::SwapSavedVariables& swapped) override {
    namespace compiled = torch::dynamo::autograd;
    swapped.before(tensors_);
    swapped.before(sizes_);
    variable_list defined;
    Needed is_defined;
    for (const auto& t : unpack()) {
      is_defined.push_back(t.defined());
      if (t.defined()) defined.push_back(t);
    }
    compiled::PackedArgs packed;
    packed.pack(defined);
    packed.pack(is_defined);
    packed.pack(sizes_);
    packed.pack(numbers_);
    packed.pack(text_);
    packed.pack(needed());
    const auto arguments = std::move(packed).vec();
    std::vector<at::TypePtr> schema;
    for (const auto& value : arguments) {
      schema.push_back(value.isTensor() ? at::TypePtr(at::TensorType::get()) : value.type());
    }
    const auto call = [backward = backward_](const variable_list& grads,
                                             const std::vector<c10::IValue>& arguments) {
      compiled::PackedArgs packed(arguments);
      const auto defined = packed.unpack<variable_list>();
      Saved saved;
      size_t next = 0;
      for (const bool is : packed.unpack<Needed>()) {
        saved.tensors.push_back(is ? defined[next++] : Tensor());
      }
      saved.sizes = packed.unpack<std::vector<c10::SymInt>>();
      saved.numbers = packed.unpack<std::vector<int64_t>>();
      saved.text = packed.unpack<std::string>();
      return run(backward, grads, saved, packed.unpack<Needed>());
    };
    const auto& python = compiled::getPyCompilerInterface();
    const auto name = python->bind_function(swapped.get_py_compiler(), backward_.name, call, schema,
                                            /*is_custom_function=*/true, /*is_traceable=*/true);
    const auto metadata =
        compiled::IValuePacker<std::vector<std::optional<autograd::InputMetadata>>>::pack(
            compiled::get_input_metadata(next_edges()));
    auto results = python->call_function(swapped.get_py_compiler(), "apply_functional", name, grads,
                                         arguments, metadata);
    swapped.after(tensors_);
    swapped.after(sizes_);
    return results;
  }

 private:
  static variable_list run(const Backward& backward,
                           const variable_list& grads,
                           const Saved& saved,
                           const Needed& needed) {
    for (const auto& grad : grads) {
      if (grad.defined()) return backward.gradients(grads, saved, needed);
    }
    return variable_list(needed.size());
  }

  variable_list unpack() const {
    variable_list tensors;
    for (const auto& t : tensors_) tensors.push_back(t.unpack());
    return tensors;
  }

  Needed needed() const {
    Needed result;
    for (uint32_t i = 0; i < num_outputs(); ++i) result.push_back(task_should_compute_output(i));
    return result;
  }

  Backward backward_;
  std::vector<autograd::SavedVariable> tensors_;
  std::vector<c10::SymInt> sizes_;
  std::vector<int64_t> numbers_;
  std::string text_;
};

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

// Makes results, which were computed below autograd from inputs, differentiable.
template <class... Inputs>
void record(const Backward& backward,
            const Saved& saved,
            std::initializer_list<Tensor*> results,
            const Inputs&... inputs) {
  auto node = make_node<Node>(backward, saved);
  node->set_next_edges(autograd::collect_next_edges(inputs...));
  for (Tensor* result : results) autograd::set_history(*result, node);
}

inline Tensor or_undefined(const OptionalTensor& t) { return t.value_or(Tensor()); }
inline OptionalTensor or_none(const Tensor& t) {
  return t.defined() ? OptionalTensor(t) : std::nullopt;
}

// Forward mode. PyTorch has one level of it here; torch.func nests by wrapping tensors.
constexpr int64_t kForwardLevel = 0;

inline Tensor tangent(const Tensor& t) { return t._fw_grad(kForwardLevel); }
inline bool has_tangent(const Tensor& t) { return tangent(t).defined(); }
inline bool has_tangent(const OptionalTensor& t) { return t && has_tangent(*t); }
inline Tensor primal(const Tensor& t) { return t._fw_primal(kForwardLevel); }
inline OptionalTensor primal(const OptionalTensor& t) {
  return t ? OptionalTensor(primal(*t)) : std::nullopt;
}
inline void set_tangent(const Tensor& t, const Tensor& value) {
  t._set_fw_grad(value, kForwardLevel, /*is_inplace_op=*/false);
}

// Tangents of scales and biases, either of which may have none.
struct LevelTangents {
  Tensor scales;
  OptionalTensor biases;

  LevelTangents(const Tensor& s, const OptionalTensor& b) {
    const auto or_zeros = [](const Tensor& t) {
      return has_tangent(t) ? tangent(t) : at::zeros_like(primal(t));
    };
    scales = or_zeros(s);
    if (b) biases = or_zeros(*b);
  }
};

// With biases absent they are -scales / 2, so their gradient goes to scales.
inline Tensor grad_of_scales(const Tensor& grad_scales, const Tensor& grad_biases, bool biases) {
  return biases ? grad_scales : grad_scales - grad_biases.mul(0.5);
}

// The tangent of a sum of terms, of which some may have none.
inline Tensor plus(const Tensor& sum, const Tensor& term) {
  return sum.defined() ? sum + term : term;
}

}  // namespace onebit

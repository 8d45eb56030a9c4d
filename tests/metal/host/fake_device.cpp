// device="mps" on Linux: tensors whose storage is a fake MTLBuffer. The operators of torch_onebit
// run as on a Mac; every other operator runs on the CPU, on the same memory.
#include <ATen/EmptyTensor.h>
#include <ATen/core/dispatch/Dispatcher.h>
#include <ATen/detail/MPSHooksInterface.h>
#include <ATen/native/CPUFallback.h>
#include <ATen/ops/as_strided_native.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/from_blob.h>
#include <ATen/ops/view_native.h>
#include <c10/core/impl/DeviceGuardImplInterface.h>
#include <torch/library.h>

#include <utility>
#include <vector>

#include "fake_metal.h"

namespace onebit::fake {
namespace {

using at::MPSHooksRegistry, at::RegistererMPSHooksRegistry, at::Tensor;

// One device, one stream, and everything is done when the call returns.
struct Guard : c10::impl::DeviceGuardImplInterface {
  c10::DeviceType type() const override { return c10::kMPS; }
  c10::Device exchangeDevice(c10::Device) const override { return device_; }
  c10::Device getDevice() const override { return device_; }
  void setDevice(c10::Device) const override {}
  void uncheckedSetDevice(c10::Device) const noexcept override {}
  c10::Stream getStream(c10::Device) const override {
    return c10::Stream(c10::Stream::DEFAULT, device_);
  }
  c10::Stream exchangeStream(c10::Stream) const override { return getStream(device_); }
  c10::DeviceIndex deviceCount() const noexcept override { return 1; }
  void record(void**,
              const c10::Stream&,
              const c10::DeviceIndex,
              const c10::EventFlag) const override {}
  void block(void*, const c10::Stream&) const override {}
  bool queryEvent(void*) const override { return true; }
  bool queryStream(const c10::Stream&) const override { return true; }
  void synchronizeStream(const c10::Stream&) const override {}

 private:
  const c10::Device device_{c10::kMPS, 0};
};
C10_REGISTER_GUARD_IMPL(MPS, Guard)

// Tells torch that this process has the accelerator: autograd asks.
struct Hooks : at::MPSHooksInterface {
  bool hasMPS() const override { return true; }
  bool isBuilt() const override { return true; }
  bool isAvailable() const override { return true; }
  bool hasPrimaryContext(c10::DeviceIndex) const override { return true; }
  c10::DeviceIndex deviceCount() const override { return 1; }
  c10::DeviceIndex getCurrentDevice() const override { return 0; }
};
C10_REGISTER_CLASS(MPSHooksRegistry, MPSHooks, Hooks)

class Allocator : public c10::Allocator {
  c10::DataPtr allocate(size_t bytes) override {
    const c10::Device device(c10::kMPS, 0);
    if (bytes == 0) return {nullptr, nullptr, nullptr, device};
    void* buffer = new_buffer(bytes);
    return {buffer, buffer, &delete_buffer, device};
  }
  void copy_data(void*, const void*, size_t) const override {
    TORCH_CHECK(false, "a buffer is not a pointer");
  }
};
Allocator allocator;

at::ScalarType checked(std::optional<at::ScalarType> dtype) {
  const auto type = dtype.value_or(at::kFloat);
  TORCH_CHECK_TYPE(type != at::kDouble, "MPS tensors cannot be float64");  // as on a Mac
  return type;
}

Tensor empty(at::IntArrayRef size,
             std::optional<at::ScalarType> dtype,
             std::optional<at::Layout>,
             std::optional<at::Device>,
             std::optional<bool>,
             std::optional<at::MemoryFormat> format) {
  return at::detail::empty_generic(size, &allocator, c10::DispatchKeySet(c10::DispatchKey::MPS),
                                   checked(dtype), format);
}

Tensor empty_strided(at::IntArrayRef size,
                     at::IntArrayRef stride,
                     std::optional<at::ScalarType> dtype,
                     std::optional<at::Layout>,
                     std::optional<at::Device>,
                     std::optional<bool>) {
  return at::detail::empty_strided_generic(
      size, stride, &allocator, c10::DispatchKeySet(c10::DispatchKey::MPS), checked(dtype));
}

bool is_fake(const Tensor& t) { return t.defined() && t.device().is_mps(); }

// The same memory as a CPU tensor.
Tensor on_cpu(const Tensor& t) {
  const auto options = t.options().device(at::kCPU);
  if (!t.storage().data()) return at::empty(t.sizes(), options);
  void* buffer = t.storage().mutable_data();
  mark_initialised(buffer);
  char* data = buffer_contents(buffer) + t.storage_offset() * t.element_size();
  return at::from_blob(data, t.sizes(), t.strides(), options);
}

Tensor to_fake(const Tensor& result) {
  const auto cpu = result.is_non_overlapping_and_dense() ? result : result.contiguous();
  const auto copy = empty_strided(cpu.sizes(), cpu.strides(), cpu.scalar_type(), {}, {}, {});
  if (cpu.numel() > 0) on_cpu(copy).copy_(cpu);
  return copy;
}

// An out= argument that the CPU operator grew takes over the new memory.
void adopt(const Tensor& original, const Tensor& result) {
  const auto grown = to_fake(result);
  original.unsafeGetTensorImpl()->set_storage_keep_dtype(grown.storage());
  original.unsafeGetTensorImpl()->set_sizes_and_strides(grown.sizes(), grown.strides());
}

struct Alias {
  Tensor original, cpu;
  bool written;
};

c10::IValue to_cpu(const c10::IValue& value, bool written, std::vector<Alias>& aliases) {
  const auto one = [&](const Tensor& t) {
    if (!is_fake(t)) return t;
    aliases.push_back({t, on_cpu(t), written});
    return aliases.back().cpu;
  };
  if (value.isTensor()) return one(value.toTensor());
  if (value.isTensorList()) {
    std::vector<Tensor> list;
    for (const Tensor& t : value.toTensorVector()) list.push_back(one(t));
    return list;
  }
  if (value.isOptionalTensorList()) {
    c10::List<std::optional<Tensor>> list;
    for (const std::optional<Tensor>& t : value.toOptionalTensorVector()) {
      list.push_back(t ? std::optional<Tensor>(one(*t)) : std::nullopt);
    }
    return list;
  }
  if (value.isDevice() && value.toDevice().is_mps()) return c10::Device(at::kCPU);
  return value;
}

c10::IValue from_cpu(const c10::IValue& value, const std::vector<Alias>& aliases) {
  const auto one = [&](const Tensor& t) {
    if (!t.defined()) return t;
    for (const Alias& a : aliases) {
      if (a.cpu.is_same(t)) return a.original;
    }
    return to_fake(t);
  };
  if (value.isTensor()) return one(value.toTensor());
  if (value.isTensorList()) {
    std::vector<Tensor> list;
    for (const Tensor& t : value.toTensorVector()) list.push_back(one(t));
    return list;
  }
  return value;
}

// Operators of PyTorch that a Mac's GPU would run.
int64_t helpers = 0;

void run_on_cpu(const c10::OperatorHandle& op, c10::DispatchKeySet, torch::jit::Stack* stack) {
  const auto& schema = op.schema();
  // What has no Metal kernel here has none on a Mac.
  TORCH_CHECK_NOT_IMPLEMENTED(schema.name().rfind("onebit::", 0) != 0, schema.name(),
                              " has no kernel for mps");
  helpers++;
  std::vector<Alias> aliases;
  const size_t first = stack->size() - schema.arguments().size();
  for (size_t i = 0; i < schema.arguments().size(); i++) {
    const auto* alias = schema.arguments()[i].alias_info();
    (*stack)[first + i] = to_cpu((*stack)[first + i], alias && alias->isWrite(), aliases);
  }
  op.redispatchBoxed(c10::DispatchKeySet(c10::DispatchKey::CPU), stack);
  for (const Alias& a : aliases) {
    if (a.written && a.cpu.sizes() != a.original.sizes()) adopt(a.original, a.cpu);
  }
  const size_t results = stack->size() - schema.returns().size();
  for (size_t i = results; i < stack->size(); i++) {
    (*stack)[i] = from_cpu((*stack)[i], aliases);
  }
}

Tensor as_strided(const Tensor& self,
                  at::IntArrayRef size,
                  at::IntArrayRef stride,
                  std::optional<int64_t> offset) {
  return at::native::as_strided_tensorimpl(self, size, stride, offset);
}

Tensor reshape_alias(const Tensor& self, at::IntArrayRef size, at::IntArrayRef stride) {
  return at::native::as_strided_tensorimpl(self, size, stride, self.storage_offset());
}

}  // namespace

TORCH_LIBRARY_IMPL(_, MPS, m) {
  m.fallback(torch::CppFunction::makeFromBoxedFunction<&run_on_cpu>());
}

TORCH_LIBRARY_IMPL(aten, MPS, m) {
  m.impl("empty.memory_format", &empty);
  m.impl("empty_strided", &empty_strided);
  m.impl("as_strided", &as_strided);
  m.impl("_reshape_alias", &reshape_alias);
  m.impl("view", &at::native::view);
  m.impl("copy_", torch::CppFunction::makeFromBoxedFunction<&run_on_cpu>());
}

TORCH_LIBRARY(onebit_fake, m) {
  m.def("take_log() -> str", [] { return std::string(take_log()); });
  m.def("take_helpers() -> int", [] { return std::exchange(helpers, 0); });
  m.def("take_compiled() -> str", [] { return std::string(take_compiled()); });
  m.def("fail_next(str step) -> ()", [](const std::string& step) { fail_next(step.c_str()); });
}

}  // namespace onebit::fake

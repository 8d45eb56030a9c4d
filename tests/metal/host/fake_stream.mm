// What the real encoder.mm uses of PyTorch: the stream, its queue, the binding of tensors.
#include <ATen/core/TensorBase.h>
#include <ATen/mps/MPSDevice.h>
#include <ATen/mps/MPSStream.h>
#include <ATen/native/mps/MetalShaderLibrary.h>

#include <cstdio>
#include <cstdlib>
#include <exception>
#include <map>
#include <string>

#include "fake_device.h"
#include "fake_encoder.h"
#include "fake_state.h"

using namespace onebit::fake;

extern "C" void dispatch_sync(dispatch_queue_t queue, dispatch_block_t block) {
  if (on_queue) {
    fprintf(stderr, "dispatch_sync on the queue it runs on: a deadlock\n");
    abort();
  }
  on_queue = true;
  try {
    block();
  } catch (const std::exception& e) {
    fprintf(stderr, "an exception left a dispatch_sync block: %s\n", e.what());
    abort();
  }
  on_queue = false;
  // An encoder may run dispatches concurrently: nothing but a barrier orders what another operation
  // encodes after the block.
  if (unordered) report("a memory barrier must follow the last dispatch");
  unordered = false;
  raise_reports();
}

namespace at::mps {

MPSStream::MPSStream(c10::Stream stream) : _stream(stream) {}
MPSStream::~MPSStream() = default;

MTLComputeCommandEncoder_t MPSStream::commandEncoder() {
  static FakeEncoder* encoder = [FakeEncoder new];
  if (!on_queue) report("commandEncoder() must be called on the stream's queue");
  return encoder;
}

MTLDevice_t MPSStream::device() const {
  static std::map<std::string, FakeDevice*> devices;
  FakeDevice*& device = devices[fake_gpu().name];
  if (!device) device = [FakeDevice new];
  return device;
}

void MPSStream::synchronize(SyncType type) {
  if (!on_queue) report("synchronize() must be called on the stream's queue");
  if (type != SyncType::COMMIT) report("a commit must not wait for the GPU");
  log_text += "commit\n";
}

MPSStream* getCurrentMPSStream() {
  static auto* const stream =
      new MPSStream(c10::Stream(c10::Stream::UNSAFE, c10::Device(c10::kMPS, 0), 0));
  return stream;
}

MPSDevice::MPSDevice() : _mtl_device(nil) {}
MPSDevice::~MPSDevice() = default;
MPSDevice* MPSDevice::getInstance() {
  static auto* const device = new MPSDevice;
  return device;
}
unsigned MPSDevice::getCoreCount() const { return fake_gpu().cores; }

}  // namespace at::mps

namespace at::native::mps {

MetalKernelFunction::MetalKernelFunction(MTLComputePipelineState_t p, MTLFunction_t f)
    : cps(p), func(f) {}
MetalKernelFunction::~MetalKernelFunction() = default;

void MetalKernelFunction::startEncoding() {
  encoder = at::mps::getCurrentMPSStream()->commandEncoder();
  [encoder setComputePipelineState:cps];
}

void MetalKernelFunction::setArg(unsigned index, const at::TensorBase& t) {
  [encoder setBuffer:static_cast<FakeBuffer*>(buffer_of(t.storage().data()))
              offset:t.storage_offset() * t.itemsize()
             atIndex:index];
}

void MetalKernelFunction::setArg(unsigned index, const void* bytes, uint64_t size) {
  [encoder setBytes:bytes length:size atIndex:index];
}

}  // namespace at::native::mps

#include "fake_encoder.h"

#include <algorithm>
#include <cstdlib>
#include <cstring>
#include <random>
#include <string>
#include <vector>

#include "fake_metal.h"
#include "fake_state.h"

namespace onebit::fake {
namespace {

void run(const Encoded& e) {
  const std::string kernel = [e.pipeline->function_->name_ UTF8String];
  const MTLFunctionConstantValues* constants = e.pipeline->function_->constants_;
  for (int i = 0; i < 8; i++) {
    if (!constants->sizes_[i]) continue;
    if (emulator().set_function_constant(i, constants->values_[i], constants->sizes_[i]) < 0) {
      report("function constant " + std::to_string(i) + " has another size in the shader");
    }
  }
  EmulatorDispatch d = {};
  d.kernel = kernel.c_str();
  const NSUInteger group_sizes[] = {e.groups.width, e.groups.height, e.groups.depth};
  const NSUInteger thread_sizes[] = {e.threads.width, e.threads.height, e.threads.depth};
  for (int i = 0; i < 3; i++) {
    d.groups[i] = static_cast<uint32_t>(group_sizes[i]);
    d.threads[i] = static_cast<uint32_t>(thread_sizes[i]);
  }
  for (int i = 0; i < 31; i++) {
    if (e.lengths[i]) d.buffers[i] = {const_cast<char*>(e.bytes[i]), e.lengths[i], 1, 1};
    if (const FakeBuffer* b = e.buffers[i]) {
      d.buffers[i] = {b->contents_ + e.offsets[i], b->length_ - e.offsets[i], 0, b->initialised_,
                      e.offsets[i]};
    }
  }
  const char* schedule = getenv("ONEBIT_FAKE_SCHEDULE");
  d.schedule = schedule ? atoi(schedule) : 0;
  d.seed = 1;
  d.count_traffic = getenv("ONEBIT_FAKE_TRAFFIC") != nullptr;
  // A kernel that is aborted leaves memory as it is, and PyTorch does not tell.
  const bool aborted = getenv("ONEBIT_FAKE_ABORTED") != nullptr;
  char message[4096] = "";
  if (!aborted && emulator().run(&d, message, sizeof message)) report(message);
  for (int i = 0; i < 31; i++) {
    if (!e.buffers[i]) continue;
    if (!e.buffers[i]->initialised_ && d.buffers[i].unwritten) {
      report(kernel + ": " + std::to_string(d.buffers[i].unwritten) + " bytes of buffer(" +
             std::to_string(i) + ") never written");
    }
    e.buffers[i]->initialised_ = true;
  }
  log_text += kernel + " " + std::to_string(e.groups.width) + "x" +
              std::to_string(e.groups.height) + "x" + std::to_string(e.groups.depth) + " " +
              std::to_string(e.threads.width);
  const auto counts = [](const std::string& what, uint64_t a, uint64_t b) {
    log_text += " " + what + ":" + std::to_string(a) + ":" + std::to_string(b);
  };
  if (d.count_traffic) counts("banks", d.bank_cycles, d.bank_least);
  for (int i = 0; d.count_traffic && i < 31; i++) {
    const EmulatorBuffer& b = d.buffers[i];
    if (b.bytes_read) counts(std::to_string(i), b.bytes_read, b.bytes_missed);
  }
  log_text += "\n";
}

// Since the last barrier.
std::vector<Encoded>& waiting() {
  static auto* const encoded = new std::vector<Encoded>;
  return *encoded;
}

}  // namespace

bool anything_encoded() { return !waiting().empty(); }

}  // namespace onebit::fake

using namespace onebit::fake;

@implementation FakeEncoder
- (id)init {
  next_ = new Encoded;
  return self;
}
- (void)endEncoding {
}
- (void)memoryBarrierWithScope:(MTLBarrierScope)scope {
  unordered = false;
  const std::vector<Encoded> ready = std::move(waiting());
  waiting().clear();
  for (const Encoded& e : ready) run(e);
}
- (void)setComputePipelineState:(id<MTLComputePipelineState>)state {
  if (!on_queue || !state) report("a pipeline must be set on the stream's queue");
  *next_ = Encoded();
  next_->pipeline = (FakePipeline*)state;
}
- (void)setBytes:(const void*)bytes length:(NSUInteger)length atIndex:(NSUInteger)index {
  if (length == 0 || length > 4096 || index > 30) {
    report("setBytes takes 1 to 4096 bytes");
    return;
  }
  memcpy(next_->bytes[index], bytes, length);
  next_->lengths[index] = length;
}
- (void)setBuffer:(id<MTLBuffer>)buffer offset:(NSUInteger)offset atIndex:(NSUInteger)index {
  FakeBuffer* b = (FakeBuffer*)buffer;
  if (!b || [b class] != [FakeBuffer class] || offset >= b->length_) {
    report("setBuffer at " + std::to_string(index) + " must have a buffer and an offset inside it");
    return;
  }
  next_->buffers[index] = b;
  next_->offsets[index] = offset;
}
- (void)dispatchThreadgroups:(MTLSize)groups threadsPerThreadgroup:(MTLSize)threads {
  if (!on_queue || !next_->pipeline) report("a dispatch needs a pipeline and the stream's queue");
  next_->groups = groups;
  next_->threads = threads;
  if (const char* seed = getenv("ONEBIT_FAKE_CONCURRENT")) {
    waiting().push_back(*next_);
    std::shuffle(waiting().begin(), waiting().end(), std::minstd_rand(atoi(seed)));
    return;
  }
  if (unordered) report("dependent dispatches need a memory barrier between them");
  unordered = true;
  run(*next_);
}
@end

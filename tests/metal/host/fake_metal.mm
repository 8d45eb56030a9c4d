// A Metal for Linux: the encoder of the real encoder.mm ends here, and runs the real shaders in the
// emulator. It holds the caller to Metal's rules: the queue, bound buffers, sizes, alignment.
#include <ATen/core/TensorBase.h>
#include <ATen/mps/MPSDevice.h>
#include <ATen/mps/MPSStream.h>
#include <ATen/native/mps/MetalShaderLibrary.h>
#include <Foundation/Foundation.h>
#include <Metal/Metal.h>
#include <c10/util/Exception.h>
#include <dlfcn.h>

#include <cstdlib>
#include <cstring>
#include <exception>
#include <map>
#include <string>
#include <vector>

#include "fake_metal.h"

extern "C" id onebit_new_instance(Class c);

// Foundation
// ---------------------------------------------------------------------------------------

@implementation NSObject
+ (id)alloc {
  return onebit_new_instance(self);
}
+ (id)new {
  return [[self alloc] init];
}
+ (Class)class {
  return self;
}
- (id)init {
  return self;
}
- (Class)class {
  return isa;
}
@end

@interface NSAutoreleasePool : NSObject
- (void)drain;
@end
@implementation NSAutoreleasePool
- (void)drain {
}
@end

@implementation NSString
+ (instancetype)stringWithUTF8String:(const char*)text {
  NSString* string = [NSString new];
  string->text_ = strdup(text);
  return string;
}
- (const char*)UTF8String {
  return text_;
}
- (id)copyWithZone:(struct _NSZone*)zone {
  return self;
}
@end

@implementation NSError
- (NSString*)localizedDescription {
  return [NSString stringWithUTF8String:"program_source:1:1: error: made to fail"];
}
@end

@implementation NSProcessInfo
+ (NSProcessInfo*)processInfo {
  return [NSProcessInfo new];
}
- (NSString*)operatingSystemVersionString {
  return [NSString stringWithUTF8String:"Version 0 (emulated)"];
}
@end

// The emulator and the log
// ---------------------------------------------------------------------------------------

namespace onebit::fake {
namespace {

bool on_queue = false;
bool unordered = false;  // a dispatch was encoded that no barrier follows yet
std::string dispatch_log, compiled, failing_step, dispatch_error;

// ONEBIT_FAKE_GPU="9:40": of the family Apple9, with 40 cores.
struct FakeGpu {
  std::string name = "7:7";
  int family = 7;
  unsigned cores = 7;
};
FakeGpu fake_gpu() {
  FakeGpu gpu;
  if (const char* name = getenv("ONEBIT_FAKE_GPU")) gpu.name = name;
  sscanf(gpu.name.c_str(), "%d:%u", &gpu.family, &gpu.cores);
  return gpu;
}

// What a storage points to: the MTLBuffer, as in torch up to 2.14, or its contents, as after it.
bool storage_holds_contents() {
  static const bool contents = getenv("ONEBIT_FAKE_STORAGE_HOLDS_CONTENTS") != nullptr;
  return contents;
}
std::map<const void*, void*>& buffers_by_contents() {
  static auto* const buffers = new std::map<const void*, void*>;
  return *buffers;
}

bool fails(const char* step) {
  const bool failing = failing_step == step;
  if (failing) failing_step.clear();
  return failing;
}

// Raised when the block is done: inside it an exception would end a real process.
void report(const std::string& message) {
  if (dispatch_error.empty()) dispatch_error = message;
}

// An encoder may run dispatches concurrently: nothing but a barrier orders what another operation
// encodes after the block.
void check_ordered() {
  if (unordered) report("a memory barrier must follow the last dispatch");
  unordered = false;
}

void log_step(const std::string& step) { dispatch_log += step + "\n"; }

}  // namespace

const Emulator& emulator() {
  static std::string loaded;  // tests of broken shaders change the library
  static Emulator e;
  const char* path = getenv("ONEBIT_EMULATOR");
  if (path && loaded == path) return e;
  void* library = path ? dlopen(path, RTLD_NOW | RTLD_LOCAL) : nullptr;
  TORCH_CHECK(library, "ONEBIT_EMULATOR must name the emulated kernels, got ", path ? path : "");
  e.kernel_name = reinterpret_cast<decltype(e.kernel_name)>(dlsym(library, "emu_kernel_name"));
  e.set_function_constant = reinterpret_cast<decltype(e.set_function_constant)>(
      dlsym(library, "emu_set_function_constant"));
  e.run = reinterpret_cast<decltype(e.run)>(dlsym(library, "emu_run"));
  loaded = path;
  return e;
}

const char* take_log() {
  static std::string taken;
  taken = dispatch_log;
  dispatch_log.clear();
  return taken.c_str();
}

const char* take_compiled() {
  static std::string taken;
  taken = compiled;
  compiled.clear();
  return taken.c_str();
}

void fail_next(const char* step) { failing_step = step; }

}  // namespace onebit::fake

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
  check_ordered();
  const std::string error = std::move(dispatch_error);
  dispatch_error.clear();
  TORCH_CHECK(error.empty(), error);
}

// Metal
// ---------------------------------------------------------------------------------------

@interface FakeBuffer : NSObject <MTLBuffer> {
 @public
  char* contents_;
  size_t length_;
  bool initialised_;
}
@end
@implementation FakeBuffer
- (NSUInteger)length {
  return length_;
}
- (void*)contents {
  return contents_;
}
@end

namespace onebit::fake {

void* buffer_of(const void* data) {
  return storage_holds_contents() ? buffers_by_contents().at(data) : const_cast<void*>(data);
}

namespace {
// With ONEBIT_FAKE_RECYCLED_MEMORY a buffer gets the memory of the last one of its size, as it is.
std::map<size_t, std::vector<char*>> recycled;

char* new_memory(size_t bytes) {
  if (std::vector<char*>& known = recycled[bytes]; !known.empty()) {
    char* memory = known.back();
    known.pop_back();
    return memory;
  }
  char* memory = static_cast<char*>(malloc(bytes));
  memset(memory, 0xFF, bytes);
  return memory;
}
}  // namespace

void* new_buffer(size_t bytes) {
  FakeBuffer* buffer = [FakeBuffer new];
  buffer->contents_ = new_memory(bytes);
  buffer->length_ = bytes;
  if (!storage_holds_contents()) return buffer;
  buffers_by_contents()[buffer->contents_] = buffer;
  return buffer->contents_;
}
void delete_buffer(void* data) {
  FakeBuffer* buffer = static_cast<FakeBuffer*>(buffer_of(data));
  buffers_by_contents().erase(data);
  if (getenv("ONEBIT_FAKE_RECYCLED_MEMORY")) {
    recycled[buffer->length_].push_back(buffer->contents_);
  } else {
    free(buffer->contents_);
  }
  free(buffer);
}
char* buffer_contents(void* data) { return static_cast<FakeBuffer*>(buffer_of(data))->contents_; }
void mark_initialised(void* data) {
  unordered = true;  // PyTorch's operation, on an encoder that may run dispatches concurrently
  static_cast<FakeBuffer*>(buffer_of(data))->initialised_ = true;
}

}  // namespace onebit::fake

@implementation MTLCompileOptions
- (BOOL)fastMathEnabled {
  return math_mode_ == MTLMathModeFast;
}
- (void)setFastMathEnabled:(BOOL)on {
  math_mode_ = on ? MTLMathModeFast : MTLMathModeSafe;
}
- (MTLMathMode)mathMode {
  return math_mode_;
}
- (void)setMathMode:(MTLMathMode)mode {
  math_mode_ = mode;
}
- (MTLMathFloatingPointFunctions)mathFloatingPointFunctions {
  return math_functions_;
}
- (void)setMathFloatingPointFunctions:(MTLMathFloatingPointFunctions)functions {
  math_functions_ = functions;
}
- (MTLLanguageVersion)languageVersion {
  return language_version_;
}
- (void)setLanguageVersion:(MTLLanguageVersion)version {
  language_version_ = version;
}
- (id)init {
  math_mode_ = MTLMathModeFast;
  return self;
}
- (id)copyWithZone:(struct _NSZone*)zone {
  return self;
}
@end

@implementation MTLFunctionConstantValues
- (void)setConstantValue:(const void*)value type:(MTLDataType)type atIndex:(NSUInteger)index {
  sizes_[index] = type == MTLDataTypeBool ? 1 : 4;
  memcpy(values_[index], value, sizes_[index]);
}
- (id)copyWithZone:(struct _NSZone*)zone {
  return self;
}
@end

@interface FakeFunction : NSObject <MTLFunction> {
 @public
  NSString* name_;
  MTLFunctionConstantValues* constants_;
}
@end
@implementation FakeFunction
- (NSString*)name {
  return name_;
}
@end

@interface FakePipeline : NSObject <MTLComputePipelineState> {
 @public
  FakeFunction* function_;
}
@end
@implementation FakePipeline
- (NSUInteger)maxTotalThreadsPerThreadgroup {
  return 1024;
}
- (NSUInteger)threadExecutionWidth {
  return 32;
}
@end

@interface FakeLibrary : NSObject <MTLLibrary>
@end
@implementation FakeLibrary
- (id<MTLFunction>)newFunctionWithName:(NSString*)name
                        constantValues:(MTLFunctionConstantValues*)values
                                 error:(NSError**)error {
  *error = [NSError new];
  if (fails("function")) return nil;
  for (int i = 0; emulator().kernel_name(i); i++) {
    if (strcmp(emulator().kernel_name(i), [name UTF8String])) continue;
    FakeFunction* function = [FakeFunction new];
    function->name_ = name;
    function->constants_ = values;
    return function;
  }
  return nil;
}
@end

@interface FakeDevice : NSObject <MTLDevice>
@end
@implementation FakeDevice
- (NSString*)name {
  return [NSString stringWithUTF8String:"Apple M1"];
}
- (BOOL)supportsFamily:(MTLGPUFamily)family {
  return family <= 1000 + fake_gpu().family;
}
- (id<MTLLibrary>)newLibraryWithSource:(NSString*)source
                               options:(MTLCompileOptions*)options
                                 error:(NSError**)error {
  *error = [NSError new];
  const bool metal4 = strstr([source UTF8String], "<metal_tensor>");
  const size_t wanted = metal4 ? 4 << 16 : MTLLanguageVersion3_1;
  TORCH_CHECK(options && [options languageVersion] == wanted,
              metal4 ? "tensors need 4.0" : "bfloat needs 3.1, and 4.0 a newer system");
  TORCH_CHECK([options mathMode] == MTLMathModeSafe, "quantize needs safe math");
  TORCH_CHECK([options mathFloatingPointFunctions] == MTLMathFloatingPointFunctionsPrecise,
              "what is the CPU's bit for bit needs precise functions");
  for (const char* c = [source UTF8String]; *c; c++) {
    TORCH_CHECK((*c >= 32 && *c < 127) || *c == '\n', "the shader source must be ASCII");
  }
  TORCH_CHECK(!strstr([source UTF8String], "#include \""), "the shader source must be one text");
  if (fails(metal4 ? "compile 4.0" : "compile")) return nil;
  compiled += std::string([source UTF8String], 24) + "\n";
  return [FakeLibrary new];
}
- (id<MTLComputePipelineState>)newComputePipelineStateWithFunction:(id<MTLFunction>)function
                                                             error:(NSError**)error {
  *error = [NSError new];
  if (fails("pipeline")) return nil;
  FakePipeline* pipeline = [FakePipeline new];
  pipeline->function_ = (FakeFunction*)function;
  return pipeline;
}
@end

@interface FakeEncoder : NSObject <MTLComputeCommandEncoder> {
 @public
  FakePipeline* pipeline_;
  FakeBuffer* buffers_[31];
  size_t offsets_[31];
  char bytes_[31][4096];
  size_t lengths_[31];
}
@end
@implementation FakeEncoder
- (void)endEncoding {
}
- (void)memoryBarrierWithScope:(MTLBarrierScope)scope {
  unordered = false;
}
- (void)setComputePipelineState:(id<MTLComputePipelineState>)state {
  if (!on_queue || !state) report("a pipeline must be set on the stream's queue");
  pipeline_ = (FakePipeline*)state;
  memset(buffers_, 0, sizeof buffers_);
  memset(lengths_, 0, sizeof lengths_);
}
- (void)setBytes:(const void*)bytes length:(NSUInteger)length atIndex:(NSUInteger)index {
  if (length == 0 || length > 4096 || index > 30) {
    report("setBytes takes 1 to 4096 bytes");
    return;
  }
  memcpy(bytes_[index], bytes, length);
  lengths_[index] = length;
}
- (void)setBuffer:(id<MTLBuffer>)buffer offset:(NSUInteger)offset atIndex:(NSUInteger)index {
  FakeBuffer* b = (FakeBuffer*)buffer;
  if (!b || [b class] != [FakeBuffer class] || offset >= b->length_) {
    report("setBuffer at " + std::to_string(index) + " must have a buffer and an offset inside it");
    return;
  }
  buffers_[index] = b;
  offsets_[index] = offset;
}
- (void)dispatchThreadgroups:(MTLSize)groups threadsPerThreadgroup:(MTLSize)threads {
  if (!on_queue || !pipeline_) report("a dispatch needs a pipeline and the stream's queue");
  if (unordered) report("dependent dispatches need a memory barrier between them");
  unordered = true;
  const std::string kernel = [pipeline_->function_->name_ UTF8String];
  const MTLFunctionConstantValues* constants = pipeline_->function_->constants_;
  for (int i = 0; i < 8; i++) {
    if (!constants->sizes_[i]) continue;
    if (emulator().set_function_constant(i, constants->values_[i], constants->sizes_[i]) < 0) {
      report("function constant " + std::to_string(i) + " has another size in the shader");
    }
  }
  EmulatorDispatch d = {};
  d.kernel = kernel.c_str();
  const NSUInteger group_sizes[] = {groups.width, groups.height, groups.depth};
  const NSUInteger thread_sizes[] = {threads.width, threads.height, threads.depth};
  for (int i = 0; i < 3; i++) {
    d.groups[i] = static_cast<uint32_t>(group_sizes[i]);
    d.threads[i] = static_cast<uint32_t>(thread_sizes[i]);
  }
  for (int i = 0; i < 31; i++) {
    if (lengths_[i]) d.buffers[i] = {bytes_[i], lengths_[i], 1, 1};
    if (const FakeBuffer* b = buffers_[i]) {
      d.buffers[i] = {b->contents_ + offsets_[i], b->length_ - offsets_[i], 0, b->initialised_,
                      offsets_[i]};
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
    if (!buffers_[i]) continue;
    if (!buffers_[i]->initialised_ && d.buffers[i].unwritten) {
      report(kernel + ": " + std::to_string(d.buffers[i].unwritten) + " bytes of buffer(" +
             std::to_string(i) + ") never written");
    }
    buffers_[i]->initialised_ = true;
  }
  dispatch_log += kernel + " " + std::to_string(groups.width) + "x" +
                  std::to_string(groups.height) + "x" + std::to_string(groups.depth) + " " +
                  std::to_string(threads.width);
  const auto counts = [](const std::string& what, uint64_t a, uint64_t b) {
    dispatch_log += " " + what + ":" + std::to_string(a) + ":" + std::to_string(b);
  };
  if (d.count_traffic) counts("banks", d.bank_cycles, d.bank_least);
  for (int i = 0; d.count_traffic && i < 31; i++) {
    const EmulatorBuffer& b = d.buffers[i];
    if (b.bytes_read) counts(std::to_string(i), b.bytes_read, b.bytes_missed);
  }
  dispatch_log += "\n";
}
@end

// PyTorch
// ---------------------------------------------------------------------------------------

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
  log_step("commit");
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

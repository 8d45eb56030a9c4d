// Objective-C++: compiles the embedded shaders once, keeps pipelines, binds buffers and dispatches.
// It takes no decision: what runs and on which grid comes from launch_plan.h.
#include "encoder.h"

#include <ATen/mps/MPSDevice.h>
#include <ATen/mps/MPSStream.h>
#include <ATen/native/mps/MetalShaderLibrary.h>
#include <Foundation/Foundation.h>
#include <Metal/Metal.h>
#include <c10/util/Exception.h>

#include <memory>
#include <mutex>
#include <string>
#include <unordered_map>
#include <vector>

#include "shader_source.h"

// The Linux tests run this file without ARC, on a fake Metal that never frees.
#if !__has_feature(objc_arc) && !defined(ONEBIT_EMULATED_METAL)
#error "compile with -fobjc-arc"
#endif

namespace onebit::mps {
namespace {

std::string text(NSString* string) { return string ? [string UTF8String] : ""; }
std::string text(NSError* error) {
  return error ? text([error localizedDescription]) : "no reason";
}

std::string machine(id<MTLDevice> device) {
  return text([device name]) + ", macOS " +
         text([[NSProcessInfo processInfo] operatingSystemVersionString]);
}

std::string function_name(const Pipeline& p) {
  std::string name = std::string(kernel_name(p.kernel)) + "_" + type_name(p.type);
  if (p.rows) name += "_" + std::to_string(p.rows);
  // float sums are what a float product writes anyway
  if (p.partial && p.type != DType::kFloat) name += "_partial";
  return name;
}

const char* source_of(const std::string& library) {
  for (const ShaderSource& source : kShaderSources) {
    if (library == source.name) return source.text;
  }
  TORCH_INTERNAL_ASSERT(false, "no metal/", library, ".metal");
}

// MTLLanguageVersion4_0, which has a name in the SDK of macOS 26 and later only.
constexpr auto kMetal4 = static_cast<MTLLanguageVersion>(4 << 16);

// macOS 26.2 is the first system that MLX trusts with them.
bool has_tensor_ops(int family) {
  if (@available(macOS 26.2, *)) return family >= kFirstTensorFamily;
  return false;
}

id<MTLLibrary> compile(id<MTLDevice> device, const std::string& name, bool metal4) {
  MTLCompileOptions* options = [MTLCompileOptions new];
  options.languageVersion = metal4 ? kMetal4 : MTLLanguageVersion3_1;  // the first with bfloat
  // Fast math, the default, drops NaN and infinities, and quantize is exact.
#if __MAC_OS_X_VERSION_MAX_ALLOWED >= 150000  // older SDKs have no mathMode
  if (@available(macOS 15.0, *)) {
    options.mathMode = MTLMathModeSafe;
    options.mathFloatingPointFunctions = MTLMathFloatingPointFunctionsPrecise;
  } else
#endif
  {
#pragma clang diagnostic push
#pragma clang diagnostic ignored "-Wdeprecated-declarations"
    options.fastMathEnabled = NO;
#pragma clang diagnostic pop
  }
  NSError* error = nil;
  id<MTLLibrary> library =
      [device newLibraryWithSource:[NSString stringWithUTF8String:source_of(name)]
                           options:options
                             error:&error];
  TORCH_CHECK(library, "metal/", name, ".metal of torch_onebit does not compile on ",
              machine(device), ": ", text(error));
  return library;
}

// A compiled kernel. PyTorch's own class binds its arguments: what an MPS storage points to is the
// MTLBuffer up to torch 2.14 and the buffer's contents after it (pytorch #190373), and only torch
// knows which.
struct CompiledKernel {
  id<MTLComputePipelineState> pipeline;
  id<MTLFunction> function;
  at::native::mps::MetalKernelFunction arguments;

  CompiledKernel(id<MTLComputePipelineState> p, id<MTLFunction> f)
      : pipeline(p), function(f), arguments(p, f) {}
};

class CompiledKernels {
 public:
  CompiledKernel& find(id<MTLDevice> device, const Launch& launch) {
    std::lock_guard<std::mutex> lock(mutex_);
    auto& kernel = kernels_[launch.pipeline.key()];
    if (!kernel) {
      const std::string name = library_name(launch.pipeline.kernel);
      auto& library = libraries_[name];
      if (!library) library = compile(device, name, needs_metal4(launch.pipeline.kernel));
      kernel = create(device, library, launch);
    }
    return *kernel;
  }

 private:
  std::unique_ptr<CompiledKernel> create(id<MTLDevice> device,
                                         id<MTLLibrary> library,
                                         const Launch& launch) {
    const Pipeline& p = launch.pipeline;
    const uint32_t levels = static_cast<uint32_t>(p.levels);
    const uint32_t other = static_cast<uint32_t>(p.other);
    const uint32_t group_words = p.group_words, rule = static_cast<uint32_t>(p.rule);
    MTLFunctionConstantValues* constants = [MTLFunctionConstantValues new];
    [constants setConstantValue:&levels type:MTLDataTypeUInt atIndex:kLevelTypeConstant];
    [constants setConstantValue:&p.has_biases type:MTLDataTypeBool atIndex:kHasBiasesConstant];
    [constants setConstantValue:&p.indexed type:MTLDataTypeBool atIndex:kIndexedConstant];
    [constants setConstantValue:&group_words type:MTLDataTypeUInt atIndex:kGroupWordsConstant];
    [constants setConstantValue:&other type:MTLDataTypeUInt atIndex:kOtherTypeConstant];
    [constants setConstantValue:&rule type:MTLDataTypeUInt atIndex:kRuleConstant];
    [constants setConstantValue:&p.has_importance
                           type:MTLDataTypeBool
                        atIndex:kHasImportanceConstant];

    const std::string name = function_name(p);
    NSError* error = nil;
    id<MTLFunction> function =
        [library newFunctionWithName:[NSString stringWithUTF8String:name.c_str()]
                      constantValues:constants
                               error:&error];
    TORCH_CHECK(function, "the Metal kernel ", name, " is missing on ", machine(device), ": ",
                text(error));
    id<MTLComputePipelineState> pipeline = [device newComputePipelineStateWithFunction:function
                                                                                 error:&error];
    TORCH_CHECK(pipeline, "the Metal kernel ", name, " has no pipeline on ", machine(device), ": ",
                text(error));
    TORCH_CHECK([pipeline threadExecutionWidth] == kLanes, "the Metal kernel ", name,
                " must run in simdgroups of ", kLanes, ", got ",
                static_cast<size_t>([pipeline threadExecutionWidth]), " on ", machine(device));
    TORCH_CHECK([pipeline maxTotalThreadsPerThreadgroup] >= launch.threads, "the Metal kernel ",
                name, " must run in threadgroups of ", launch.threads, ", got at most ",
                static_cast<size_t>([pipeline maxTotalThreadsPerThreadgroup]), " on ",
                machine(device));
    return std::make_unique<CompiledKernel>(pipeline, function);
  }

  std::mutex mutex_;
  std::unordered_map<std::string, id<MTLLibrary>> libraries_;
  std::unordered_map<uint32_t, std::unique_ptr<CompiledKernel>> kernels_;
};

// Never destroyed: at exit the Metal runtime may be gone before static destructors run.
CompiledKernels& compiled_kernels() {
  static auto* const instance = new CompiledKernels;
  return *instance;
}

void bind(CompiledKernel& kernel, const Work& work) {
  for (size_t i = 0; i < work.buffers.size(); i++) {
    // Metal's API validation wants a buffer for every argument that a kernel declares, read or not
    // (ggml-org/whisper.cpp #1607): an absent one gets the first, which no kernel writes.
    const at::Tensor& t = work.buffers[i].defined() ? work.buffers[i] : work.buffers[0];
    kernel.arguments.setArg(static_cast<unsigned>(i), t);
  }
  kernel.arguments.setArg(static_cast<unsigned>(work.buffers.size()), work.params,
                          work.params_size);
}

// Launches since the last commit. Touched on the stream's serial queue only.
uint32_t launches = 0;

}  // namespace

void encode(at::ArrayRef<Work> works) {
  @autoreleasepool {
    at::mps::MPSStream* stream = at::mps::getCurrentMPSStream();
    // Everything that can throw comes before the block: an exception that leaves it ends the
    // process.
    std::vector<CompiledKernel*> kernels;
    for (const Work& work : works)
      kernels.push_back(&compiled_kernels().find(stream->device(), work.launch));
    const auto* const ready = &kernels;
    dispatch_sync(stream->queue(), ^{
      id<MTLComputeCommandEncoder> encoder = stream->commandEncoder();
      for (size_t i = 0; i < works.size(); i++) {
        const Launch& launch = works[i].launch;
        // Before the first too, and after the last: an encoder that runs dispatches concurrently
        // orders nothing by itself.
        [encoder memoryBarrierWithScope:MTLBarrierScopeBuffers];
        (*ready)[i]->arguments.startEncoding();
        bind(*(*ready)[i], works[i]);
        [encoder dispatchThreadgroups:MTLSizeMake(launch.groups.x, launch.groups.y, launch.groups.z)
                threadsPerThreadgroup:MTLSizeMake(launch.threads, 1, 1)];
      }
      [encoder memoryBarrierWithScope:MTLBarrierScopeBuffers];
      launches += static_cast<uint32_t>(works.size());
      if (launches >= kCommitLaunches) {
        launches = 0;
        stream->synchronize(at::mps::SyncType::COMMIT);
      }
    });
  }
}

Gpu current_gpu() {
  @autoreleasepool {
    // Asking for the cores searches the registry of devices: once per device.
    static std::mutex mutex;
    static auto* const known = new std::unordered_map<const void*, Gpu>;
    id<MTLDevice> device = at::mps::getCurrentMPSStream()->device();
    std::lock_guard<std::mutex> lock(mutex);
    const auto [entry, added] = known->try_emplace((__bridge const void*)device);
    if (added) {
      int family = kFirstFamily;
      while ([device
          supportsFamily:static_cast<MTLGPUFamily>(MTLGPUFamilyApple7 + family + 1 - kFirstFamily)])
        family++;
      entry->second = {family, at::mps::MPSDevice::getInstance()->getCoreCount(),
                       has_tensor_ops(family)};
    }
    return entry->second;
  }
}

}  // namespace onebit::mps

// A Metal for Linux: the real encoder.mm compiles the real shaders here, which the emulator runs.
// It holds the caller to Metal's rules: versions of the language, precise functions, one text.
#include <c10/util/Exception.h>

#include <cstring>
#include <map>
#include <string>

#include "fake_device.h"
#include "fake_metal.h"
#include "fake_pipeline.h"
#include "fake_state.h"

using namespace onebit::fake;

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

@implementation FakeFunction
- (NSString*)name {
  return name_;
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

// A kernel of the emulator with the values of its function constants.
#pragma once
#include <Metal/Metal.h>

@interface FakeFunction : NSObject <MTLFunction> {
 @public
  NSString* name_;
  MTLFunctionConstantValues* constants_;
}
@end

@interface FakePipeline : NSObject <MTLComputePipelineState> {
 @public
  FakeFunction* function_;
}
@end

// A command encoder. It runs dispatches at once and reports where a barrier is missing; or, with
// ONEBIT_FAKE_CONCURRENT, late and in another order, as a concurrent encoder may.
#pragma once
#include "fake_buffer.h"
#include "fake_pipeline.h"

namespace onebit::fake {

// A dispatch and its arguments.
struct Encoded {
  FakePipeline* pipeline = nullptr;
  FakeBuffer* buffers[31] = {};
  size_t offsets[31] = {};
  char bytes[31][4096];
  size_t lengths[31] = {};
  MTLSize groups, threads;
};
// Are there dispatches that no barrier made run yet?
bool anything_encoded();

}  // namespace onebit::fake

@interface FakeEncoder : NSObject <MTLComputeCommandEncoder> {
 @public
  onebit::fake::Encoded* next_;
}
@end

// MTLBuffers in the memory of the CPU.
#pragma once
#include <Metal/Metal.h>

#include <cstddef>

@interface FakeBuffer : NSObject <MTLBuffer> {
 @public
  char* contents_;
  size_t length_;
  bool initialised_;
}
@end

namespace onebit::fake {

// The FakeBuffer of what a storage points to.
void* buffer_of(const void* data);

}  // namespace onebit::fake

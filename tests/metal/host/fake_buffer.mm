#include "fake_buffer.h"

#include <cstdlib>
#include <cstring>
#include <map>
#include <vector>

#include "fake_encoder.h"
#include "fake_metal.h"
#include "fake_state.h"

@implementation FakeBuffer
- (NSUInteger)length {
  return length_;
}
- (void*)contents {
  return contents_;
}
@end

namespace onebit::fake {
namespace {

// What a storage points to: the MTLBuffer, as in torch up to 2.14, or its contents, as after it.
bool storage_holds_contents() {
  static const bool contents = getenv("ONEBIT_FAKE_STORAGE_HOLDS_CONTENTS") != nullptr;
  return contents;
}
std::map<const void*, void*>& buffers_by_contents() {
  static auto* const buffers = new std::map<const void*, void*>;
  return *buffers;
}

}  // namespace

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
  if (anything_encoded()) return;  // a command buffer keeps what it reads and writes
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

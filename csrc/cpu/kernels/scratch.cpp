#include "scratch.h"

#include <new>

namespace onebit::cpu {
namespace {

constexpr std::align_val_t kAlignment{64};

struct Buffer {
  void* data = nullptr;
  int64_t bytes = 0;
  ~Buffer() { ::operator delete(data, kAlignment); }
};

}  // namespace

void* thread_scratch(int64_t bytes) {
  static thread_local Buffer buffer;
  if (bytes > buffer.bytes) {
    ::operator delete(buffer.data, kAlignment);
    buffer = {};
    buffer.data = ::operator new(static_cast<std::size_t>(bytes), kAlignment);
    buffer.bytes = bytes;
  }
  return buffer.data;
}

}  // namespace onebit::cpu

// What translated kernels may call, and the tables they export. The scheduler implements it.
#pragma once
#include <cstddef>
#include <cstdint>

// Too large for a fiber's stack.
#define EMU_SCRATCH static

namespace emu {

struct Size3 {
  uint32_t x, y, z;
};

// One per dispatch. `threads_here` differs from `threads` only in the partial threadgroups of
// dispatchThreads.
struct Dispatch {
  char* buffer[32];
  uint64_t length[32];
  char* threadgroup_argument[8];
  Size3 group;         // position of the running threadgroup
  Size3 groups;        // threadgroups in the grid
  Size3 threads;       // per threadgroup, as dispatched
  Size3 threads_here;  // of the running threadgroup
  Size3 grid;          // threads in the grid
};

struct Thread {
  Size3 position;  // in the threadgroup
  uint32_t index, lane, simdgroup;
};

const Dispatch& dispatch();
const Thread& thread_state();

[[noreturn]] void fail(const char* format, ...) __attribute__((format(printf, 1, 2)));

enum BarrierFlags : unsigned { kDeviceMemory = 1, kThreadgroupMemory = 2 };
void threadgroup_barrier(unsigned flags, int line, const char* file);
void simdgroup_barrier(unsigned flags, int line, const char* file);

// Every lane of the simdgroup meets here and deposits at most 64 bytes. Returns 32 slots of 64
// bytes, one per lane; `operation` must be the same in all lanes.
constexpr size_t kSlotBytes = 64;
const unsigned char* simd_exchange(const void* value,
                                   size_t size,
                                   uint32_t operation,
                                   int line,
                                   const char* file,
                                   uint32_t* active);

// Returns when done(what) holds; it must only change by what other threads do, or a deferred
// action.
void wait_until(bool (*done)(const void* what), const void* what, int line, const char* file);
// Of the first `threads` threads, while others go on.
void partial_barrier(int threads, int line, const char* file);
// This thread has waited for the launch before: it may read what that one wrote.
void previous_ended();
// What hardware beside the threads does at some time: as late as possible, or at random.
void defer(void (*action)(void* what), void* what);

// What the hooks do, for code without them. `pc` is that of the access.
void check_access(const void* p, size_t size, bool is_write, void* pc);
// Threadgroup memory as garbage that nobody may read, and the bytes that then replace it.
void memory_spoil(void* p, size_t size, void* pc);
void memory_deliver(void* p, const void* bytes, size_t size);

// Memory of a `threadgroup` variable; `key` identifies the declaration.
void* threadgroup_variable(const void* key, size_t size, size_t alignment, const char* name);

using Entry = void (*)();
struct KernelEntry {
  const char* name;
  Entry run;
  uint32_t buffers;                  // bit i: the kernel declares [[buffer(i)]]
  size_t threadgroup_bytes = 32768;  // what every Apple GPU since the M1 offers
};
struct FunctionConstant {
  int index;
  void* value;
  size_t size;
};

}  // namespace emu

// Written by the translator at the end of every library; a null name or a negative index ends them.
extern "C" const emu::KernelEntry emu_kernels[];
extern "C" const emu::FunctionConstant emu_function_constants[];

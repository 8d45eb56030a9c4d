// The C interface the tests and the fake Metal call: kernels by name, one dispatch at a time.
#include <signal.h>

#include <algorithm>
#include <cstdio>
#include <cstring>
#if defined(__SSE__)
#include <xmmintrin.h>
#endif

#include "machine.h"

using emu::machine;
using emu::Size3;

// Mirrored in emulator.py and fake_metal.h.
extern "C" {
struct EmuBuffer {
  char* host;  // null: not bound
  uint64_t length;
  int32_t read_only;
  int32_t initialised;
  uint64_t offset;  // of its first byte, modulo 256: a kernel sees the alignment of the real one
  uint64_t bytes_read, bytes_missed;  // out, when traffic is counted: by the lanes, by the L1
  int64_t unwritten;                  // out
};
struct EmuDispatch {
  const char* kernel;
  uint32_t groups[3];   // threadgroups
  uint32_t threads[3];  // per threadgroup
  EmuBuffer buffers[31];
  int32_t schedule;
  uint64_t seed;
  int32_t count_traffic;
  int32_t flush_denormals;
  uint64_t bank_cycles, bank_least;  // out, when traffic is counted
};
}

namespace {

void on_signal(int number) {
  if (machine.current >= 0) {
    emu::fail(number == SIGFPE ? "integer division by zero" : "memory fault outside every buffer");
  }
  signal(number, SIG_DFL);
  raise(number);
}

// Catches what the arena cannot see: a wild pointer, a division by zero.
class SignalGuard {
 public:
  SignalGuard() {
    struct sigaction action = {};
    action.sa_handler = on_signal;
    action.sa_flags = SA_NODEFER;
    sigaction(SIGFPE, &action, &old_fpe_);
    sigaction(SIGSEGV, &action, &old_segv_);
  }
  ~SignalGuard() {
    sigaction(SIGFPE, &old_fpe_, nullptr);
    sigaction(SIGSEGV, &old_segv_, nullptr);
  }

 private:
  struct sigaction old_fpe_, old_segv_;
};

// Apple GPUs may flush subnormal floats; x86 can do the same.
class DenormalMode {
 public:
  explicit DenormalMode(bool flush) {
#if defined(__SSE__)
    old_ = _mm_getcsr();
    if (flush) _mm_setcsr(old_ | 0x8040);
#endif
  }
  ~DenormalMode() {
#if defined(__SSE__)
    _mm_setcsr(old_);
#endif
  }

 private:
  unsigned old_ = 0;
};

const emu::KernelEntry* find_kernel(const char* name) {
  for (const emu::KernelEntry* k = emu_kernels; k->name; k++) {
    if (!strcmp(k->name, name)) return k;
  }
  return nullptr;
}

// Metal's API validation ends the process for a declared argument without a buffer, read or not.
int missing_buffer(const emu::KernelEntry& kernel, const EmuDispatch& d) {
  for (int i = 0; i < 31; i++) {
    if (kernel.buffers >> i & 1 && !d.buffers[i].host) return i;
  }
  return -1;
}

void bind_buffers(const EmuDispatch& d) {
  for (int i = 0; i < 31; i++) {
    const EmuBuffer& b = d.buffers[i];
    if (!b.host) continue;
    char* memory =
        emu::memory_allocate(b.length, 256, b.offset % 256,
                             b.read_only ? emu::Region::kReadOnly : emu::Region::kReadWrite,
                             "buffer(" + std::to_string(i) + ")", b.initialised);
    memcpy(memory, b.host, b.length);
    machine.dispatch.buffer[i] = memory;
    machine.dispatch.length[i] = b.length;
  }
}

void collect_buffers(EmuDispatch* d) {
  for (int i = 0; i < 31; i++) {
    EmuBuffer& b = d->buffers[i];
    if (!b.host) continue;
    const char* memory = machine.dispatch.buffer[i];
    if (!b.read_only) memcpy(b.host, memory, b.length);
    const emu::Reads reads = emu::memory_traffic(memory);
    b.bytes_read = reads.all;
    b.bytes_missed = reads.missed;
    b.unwritten = emu::memory_unwritten(memory, b.length);
  }
}

}  // namespace

#define EMU_EXPORT extern "C" __attribute__((visibility("default")))

EMU_EXPORT const char* emu_kernel_name(int index) { return emu_kernels[index].name; }

// Returns how many constants of that index were set, or -1 when the size is wrong.
EMU_EXPORT int emu_set_function_constant(int index, const void* value, uint64_t size) {
  int found = 0;
  for (const emu::FunctionConstant* c = emu_function_constants; c->index >= 0; c++) {
    if (c->index != index) continue;
    if (c->size != size) return -1;
    memcpy(c->value, value, size);
    found++;
  }
  return found;
}

// Returns 0, or 1 with a message.
EMU_EXPORT int emu_run(EmuDispatch* d, char* message, uint64_t message_size) {
  const emu::KernelEntry* kernel = find_kernel(d->kernel);
  const uint32_t threads = d->threads[0] * d->threads[1] * d->threads[2];
  if (!kernel || threads == 0 || threads > 1024) {
    snprintf(message, message_size, "%s: %s", d->kernel,
             kernel ? "a threadgroup must have 1 to 1024 threads" : "no such kernel");
    return 1;
  }
  if (const int missing = missing_buffer(*kernel, *d); missing >= 0) {
    snprintf(message, message_size, "%s: missing buffer binding at index %d", d->kernel, missing);
    return 1;
  }
  emu::memory_reset();
  emu::traffic_reset(d->count_traffic);
  machine.dispatch = {};
  machine.error.clear();
  machine.entry = kernel->run;
  machine.kernel_name = kernel->name;
  machine.threadgroup_bytes = kernel->threadgroup_bytes;
  machine.schedule = static_cast<emu::Schedule>(d->schedule);
  machine.random = d->seed * 0x9E3779B97F4A7C15ull + 0x1234567;
  bind_buffers(*d);

  const Size3 groups = {d->groups[0], d->groups[1], d->groups[2]};
  machine.dispatch.groups = groups;
  machine.dispatch.threads = {d->threads[0], d->threads[1], d->threads[2]};
  machine.dispatch.threads_here = machine.dispatch.threads;
  machine.dispatch.grid = {groups.x * d->threads[0], groups.y * d->threads[1],
                           groups.z * d->threads[2]};
  std::vector<uint32_t> order(groups.x * groups.y * groups.z);
  for (size_t i = 0; i < order.size(); i++) order[i] = static_cast<uint32_t>(i);
  if (machine.schedule == emu::Schedule::kReverse) std::reverse(order.begin(), order.end());
  if (machine.schedule == emu::Schedule::kRandom) {
    for (size_t i = order.size(); i > 1; i--)
      std::swap(order[i - 1], order[machine.next_random() % i]);
  }

  {
    SignalGuard signals;
    DenormalMode denormals(d->flush_denormals);
    for (uint32_t i : order) {
      machine.group_index = i;
      machine.dispatch.group = {i % groups.x, i / groups.x % groups.y, i / (groups.x * groups.y)};
      if (!emu::run_threadgroup()) {
        snprintf(message, message_size, "%s", machine.error.c_str());
        return 1;
      }
      emu::traffic_end_threadgroup();
    }
  }
  collect_buffers(d);
  d->bank_cycles = emu::traffic_banks().cycles;
  d->bank_least = emu::traffic_banks().least;
  return 0;
}

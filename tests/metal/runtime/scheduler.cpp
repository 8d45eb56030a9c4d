// Fibers, barriers and simdgroup operations; reports divergence.
#include <signal.h>
#include <sys/mman.h>

#include <algorithm>
#include <cstdarg>
#include <cstdio>
#include <cstdlib>
#include <cstring>

#include "machine.h"

extern "C" void emu_switch(void** save_stack_pointer, void* load_stack_pointer);

#if defined(__x86_64__)
asm(R"(
.text
.globl emu_switch
.hidden emu_switch
.type emu_switch,@function
emu_switch:
  pushq %rbp; pushq %rbx; pushq %r12; pushq %r13; pushq %r14; pushq %r15
  movq %rsp,(%rdi)
  movq %rsi,%rsp
  popq %r15; popq %r14; popq %r13; popq %r12; popq %rbx; popq %rbp
  ret
.size emu_switch,.-emu_switch
)");
static void* new_stack(char* top, void (*entry)()) {
  void** sp = reinterpret_cast<void**>(reinterpret_cast<uintptr_t>(top) & ~uintptr_t{15});
  *--sp = nullptr;  // keeps rsp % 16 == 8 at entry, as after a call
  *--sp = reinterpret_cast<void*>(entry);
  for (int i = 0; i < 6; i++) *--sp = nullptr;
  return sp;
}
#elif defined(__aarch64__)
asm(R"(
.text
.globl emu_switch
.hidden emu_switch
emu_switch:
  sub sp,sp,#160
  stp x19,x20,[sp,#0];  stp x21,x22,[sp,#16]; stp x23,x24,[sp,#32]; stp x25,x26,[sp,#48]
  stp x27,x28,[sp,#64]; stp x29,x30,[sp,#80]; stp d8,d9,[sp,#96];   stp d10,d11,[sp,#112]
  stp d12,d13,[sp,#128]; stp d14,d15,[sp,#144]
  mov x9,sp
  str x9,[x0]
  mov sp,x1
  ldp x19,x20,[sp,#0];  ldp x21,x22,[sp,#16]; ldp x23,x24,[sp,#32]; ldp x25,x26,[sp,#48]
  ldp x27,x28,[sp,#64]; ldp x29,x30,[sp,#80]; ldp d8,d9,[sp,#96];   ldp d10,d11,[sp,#112]
  ldp d12,d13,[sp,#128]; ldp d14,d15,[sp,#144]
  add sp,sp,#160
  ret
)");
static void* new_stack(char* top, void (*entry)()) {
  char* sp = reinterpret_cast<char*>(reinterpret_cast<uintptr_t>(top) & ~uintptr_t{15}) - 160;
  memset(sp, 0, 160);
  reinterpret_cast<void**>(sp)[11] = reinterpret_cast<void*>(entry);
  return sp;
}
#else
#error "the emulator runs on x86-64 and arm64"
#endif

namespace emu {

Machine machine;

namespace {

constexpr size_t kStackBytes = 64 << 10;
char* stacks = nullptr;
size_t stack_count = 0;
void* scheduler_stack = nullptr;

void yield() { emu_switch(&machine.fibers[machine.current].stack_pointer, scheduler_stack); }

void fiber_main() {
  machine.entry();
  machine.fibers[machine.current].state = State::kReturned;
  machine.returned++;
  yield();
  abort();
}

const unsigned char* meet(const void* value,
                          size_t size,
                          uint32_t operation,
                          unsigned flags,
                          int line,
                          const char* file,
                          uint32_t* active) {
  Fiber& f = machine.fibers[machine.current];
  Simdgroup& s = machine.simdgroups[f.thread.simdgroup];
  const uint32_t half = s.phase & 1;
  if (size > kSlotBytes) fail("simdgroup operation on %zu bytes", size);
  if (size) memcpy(s.slots[half][f.thread.lane], value, size);
  f.operation = operation;
  f.flags = flags;
  f.line = line;
  f.file = file;
  f.state = State::kAtSimdOperation;
  s.arrived++;
  yield();
  if (active) *active = s.active[half];
  return &s.slots[half][0][0];
}

bool same_place(const Fiber& a, const Fiber& b) {
  return a.operation == b.operation && a.line == b.line && a.file == b.file && a.flags == b.flags;
}

// Every lane that started must arrive, at one place: lanes that returned or took another branch
// make the result of a simdgroup operation undefined in MSL.
bool complete_if_met(Simdgroup& s) {
  if (s.arrived != s.size) return false;
  Fiber* lanes = &machine.fibers[s.first_thread];
  for (int i = 1; i < s.size; i++) {
    if (!same_place(lanes[i], lanes[0])) return false;
  }
  for (int i = 0; i < s.size; i++) lanes[i].state = State::kReady;
  for (int memory = 0; memory < 2; memory++) {
    if (lanes[0].flags & (1u << memory)) s.epoch[memory]++;
  }
  s.active[s.phase & 1] = s.size == kLanes ? ~0u : (1u << s.size) - 1;
  s.phase++;
  s.arrived = 0;
  return true;
}

bool complete_barrier() {
  if (machine.waiting != machine.threads) return false;
  const Fiber& first = machine.fibers[0];
  for (const Fiber& f : machine.fibers) {
    if (f.line != first.line || f.file != first.file || f.flags != first.flags) return false;
  }
  for (int memory = 0; memory < 2; memory++) {
    if (!(first.flags & (1u << memory))) continue;
    machine.epoch[memory]++;
    for (Simdgroup& s : machine.simdgroups) s.epoch[memory]++;
  }
  machine.waiting = 0;
  for (Fiber& f : machine.fibers) f.state = State::kReady;
  return true;
}

void report_divergence() {
  std::vector<std::pair<std::string, int>> places;
  for (const Fiber& f : machine.fibers) {
    char place[300] = "returned";
    if (f.state != State::kReturned) {
      const char* what = f.state == State::kAtBarrier     ? "threadgroup_barrier"
                         : f.state == State::kAtCondition ? "wait"
                                                          : "simdgroup operation";
      snprintf(place, sizeof place, "at %s at %s:%d", what, f.file, f.line);
    }
    auto known =
        std::find_if(places.begin(), places.end(), [&](const auto& p) { return p.first == place; });
    if (known == places.end()) {
      places.push_back({place, 1});
    } else {
      known->second++;
    }
  }
  machine.error = std::string("kernel ") + machine.kernel_name + ": divergence:";
  for (const auto& [place, count] : places) {
    machine.error += " " + std::to_string(count) + " thread(s) " + place + ";";
  }
}

bool end_waits() {
  bool progress = false;
  for (Fiber& f : machine.fibers) {
    if (f.state != State::kAtCondition || !f.done(f.what)) continue;
    f.state = State::kReady;
    progress = true;
  }
  return progress;
}

bool run_deferred() {
  if (machine.deferred.empty()) return false;
  const bool random = machine.schedule == Schedule::kRandom;
  const auto chosen =
      machine.deferred.begin() + (random ? machine.next_random() % machine.deferred.size() : 0);
  const Deferred d = *chosen;
  machine.deferred.erase(chosen);
  d.action(d.what);
  return true;
}

bool complete_something() {
  bool progress = end_waits();
  for (Simdgroup& s : machine.simdgroups) progress |= complete_if_met(s);
  return progress || complete_barrier();
}

void start_fibers() {
  const Size3& size = machine.dispatch.threads_here;
  machine.threads = static_cast<int>(size.x * size.y * size.z);
  const size_t count = machine.threads;
  if (count > stack_count) {
    if (stacks) munmap(stacks, stack_count * kStackBytes);
    stack_count = count;
    stacks = static_cast<char*>(mmap(nullptr, count * kStackBytes, PROT_READ | PROT_WRITE,
                                     MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0));
  }
  machine.fibers.resize(count);
  machine.simdgroups.resize((count + kLanes - 1) / kLanes);
  for (size_t g = 0; g < machine.simdgroups.size(); g++) {
    Simdgroup& s = machine.simdgroups[g];
    s.first_thread = static_cast<int>(g) * kLanes;
    s.size = std::min(kLanes, machine.threads - s.first_thread);
    s.arrived = 0;
    s.phase = 0;
    s.epoch[0] = s.epoch[1] = 0;
    memset(s.slots, 0xFF, sizeof s.slots);
  }
  machine.epoch[0] = machine.epoch[1] = 0;
  machine.waiting = machine.returned = machine.partial_arrived = 0;
  machine.deferred.clear();
  for (uint32_t i = 0; i < count; i++) {
    Fiber& f = machine.fibers[i];
    f.thread = {
        {i % size.x, i / size.x % size.y, i / (size.x * size.y)}, i, i % kLanes, i / kLanes};
    f.state = State::kReady;
    f.waited = false;
    f.stack_pointer = new_stack(stacks + (i + 1) * kStackBytes, fiber_main);
  }
}

// Lanes of a simdgroup stay neighbours: a GPU runs them in lockstep, but in which order simdgroups
// advance is free.
void order_threads(std::vector<int>& order) {
  order.resize(machine.threads);
  std::vector<int> groups(machine.simdgroups.size());
  for (size_t g = 0; g < groups.size(); g++) groups[g] = static_cast<int>(g);
  if (machine.schedule == Schedule::kRandom) {
    for (size_t i = groups.size(); i > 1; i--) {
      std::swap(groups[i - 1], groups[machine.next_random() % i]);
    }
  }
  int next = 0;
  for (int g : groups) {
    const Simdgroup& s = machine.simdgroups[g];
    const int start = machine.schedule == Schedule::kRandom ? machine.next_random() % s.size : 0;
    for (int i = 0; i < s.size; i++) order[next++] = s.first_thread + (start + i) % s.size;
  }
  if (machine.schedule == Schedule::kReverse) std::reverse(order.begin(), order.end());
}

}  // namespace

const Dispatch& dispatch() { return machine.dispatch; }
const Thread& thread_state() { return machine.fibers[machine.current].thread; }

void fail(const char* format, ...) {
  char message[1024];
  va_list arguments;
  va_start(arguments, format);
  vsnprintf(message, sizeof message, format, arguments);
  va_end(arguments);
  if (machine.error.empty()) {
    const Thread& t = thread_state();
    const Size3& g = machine.dispatch.group;
    char head[300];
    snprintf(head, sizeof head,
             "kernel %s: threadgroup (%u,%u,%u) simdgroup %u lane %u: ", machine.kernel_name, g.x,
             g.y, g.z, t.simdgroup, t.lane);
    machine.error = std::string(head) + message;
  }
  yield();  // never resumed once machine.error is set
  abort();
}

void threadgroup_barrier(unsigned flags, int line, const char* file) {
  Fiber& f = machine.fibers[machine.current];
  f.state = State::kAtBarrier;
  f.flags = flags;
  f.line = line;
  f.file = file;
  machine.waiting++;
  yield();
}

void simdgroup_barrier(unsigned flags, int line, const char* file) {
  meet(nullptr, 0, ~0u, flags, line, file, nullptr);
}

const unsigned char* simd_exchange(const void* value,
                                   size_t size,
                                   uint32_t operation,
                                   int line,
                                   const char* file,
                                   uint32_t* active) {
  return meet(value, size, operation, 0, line, file, active);
}

void wait_until(bool (*done)(const void*), const void* what, int line, const char* file) {
  if (done(what)) return;
  Fiber& f = machine.fibers[machine.current];
  f.state = State::kAtCondition;
  f.done = done;
  f.what = what;
  f.line = line;
  f.file = file;
  yield();
}

void partial_barrier(int threads, int line, const char* file) {
  const uint32_t before = machine.partial_phase;
  if (++machine.partial_arrived == threads) {
    machine.partial_arrived = 0;
    machine.partial_phase++;
    for (int memory = 0; memory < 2; memory++) {
      machine.epoch[memory]++;
      for (Simdgroup& s : machine.simdgroups) s.epoch[memory]++;
    }
  }
  const auto passed = [](const void* phase) {
    return *static_cast<const uint32_t*>(phase) != machine.partial_phase;
  };
  wait_until(passed, &before, line, file);
}

void previous_ended() { machine.fibers[machine.current].waited = true; }

void defer(void (*action)(void*), void* what) { machine.deferred.push_back({action, what}); }

bool run_threadgroup() {
  start_fibers();
  memory_begin_threadgroup();
  traffic_begin_threadgroup();
  std::vector<int> order;
  while (machine.returned < machine.threads) {
    order_threads(order);
    bool ran = false;
    for (int i : order) {
      if (machine.fibers[i].state != State::kReady) continue;
      ran = true;
      machine.current = i;
      emu_switch(&scheduler_stack, machine.fibers[i].stack_pointer);
      machine.current = -1;
      if (!machine.error.empty()) return false;
      // Let a simdgroup run ahead of the others now and then.
      if (machine.schedule == Schedule::kRandom && machine.next_random() % 16 == 0) {
        for (Simdgroup& s : machine.simdgroups) complete_if_met(s);
      }
    }
    if (machine.returned == machine.threads) break;
    const bool random_turn = machine.schedule == Schedule::kRandom && !machine.deferred.empty() &&
                             machine.next_random() % 16 == 0;
    if (random_turn) run_deferred();
    if (!complete_something() && !ran && !run_deferred()) {
      report_divergence();
      return false;
    }
  }
  if (machine.deferred.empty()) return true;
  machine.error = std::string("kernel ") + machine.kernel_name + ": returned before its copies end";
  return false;
}

}  // namespace emu

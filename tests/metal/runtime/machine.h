// The emulated GPU, shared by scheduler.cpp, memory.cpp and dispatch.cpp. Compiled without
// instrumentation: only the kernels call the __tsan_* hooks.
//
// A thread is a fiber with its own stack. Fibers run until they meet the others at a barrier or a
// simdgroup operation, so a threadgroup executes deterministically under a chosen schedule.
#pragma once
#include <string>
#include <vector>

#include "kernel_abi.h"

namespace emu {

constexpr int kLanes = 32;

enum class State : uint8_t { kReady, kAtBarrier, kAtSimdOperation, kAtCondition, kReturned };

struct Fiber {
  void* stack_pointer;
  Thread thread;
  State state;
  uint32_t operation;
  unsigned flags;
  int line;
  const char* file;
  bool waited;                // for the launch before this one
  bool (*done)(const void*);  // of kAtCondition
  const void* what;
};

struct Deferred {
  void (*action)(void*);
  void* what;
};

struct Simdgroup {
  int first_thread, size;
  int arrived;
  uint32_t phase;     // exchanges completed; slots are double-buffered by its lowest bit
  uint32_t epoch[2];  // barriers passed that order [0] device, [1] threadgroup memory
  uint32_t active[2];
  alignas(64) unsigned char slots[2][kLanes][kSlotBytes];
};

enum class Schedule : int32_t { kForward, kReverse, kRandom };

struct Machine {
  Dispatch dispatch;
  Entry entry;
  const char* kernel_name;
  size_t threadgroup_bytes;  // that a threadgroup may have
  std::vector<Fiber> fibers;
  std::vector<Simdgroup> simdgroups;
  int current = -1;  // running fiber, -1 in the scheduler
  int threads, waiting, returned;
  uint32_t group_index;
  uint32_t epoch[2];  // threadgroup barriers passed, as in Simdgroup
  std::vector<Deferred> deferred;
  int partial_arrived;
  uint32_t partial_phase;
  Schedule schedule;
  uint64_t random;
  std::string error;

  uint32_t next_random() {
    random ^= random << 13;
    random ^= random >> 7;
    random ^= random << 17;
    return static_cast<uint32_t>(random >> 16);
  }
};
extern Machine machine;

// Runs one threadgroup to its end; false when machine.error was set.
bool run_threadgroup();

// memory.cpp: one arena holds every buffer and threadgroup variable between red zones.
constexpr int kLate = 2;  // by the launch before this one: written for threads that waited
enum class Region : uint8_t { kRedZone, kReadWrite, kReadOnly, kThreadgroup };
void memory_reset();
char* memory_allocate(size_t size,
                      size_t alignment,
                      size_t offset,
                      Region kind,
                      const std::string& name,
                      int written);  // 0, 1, or kLate
void memory_begin_threadgroup();
int64_t memory_unwritten(const char* begin, size_t size);
// Device bytes read from an allocation since memory_reset, and those that the L1 did not have.
struct Reads {
  uint64_t all, missed;
};
Reads memory_traffic(const char* begin);
void memory_count(size_t offset, uint64_t all, uint64_t missed);

// traffic.cpp: what the accesses of a dispatch cost.
struct BankUse {
  uint64_t cycles, least;  // of accesses to threadgroup memory; what they took without conflicts
};
void traffic_reset(bool count);
void traffic_begin_threadgroup();
void traffic_record(size_t offset, size_t size, bool threadgroup_memory, void* pc);
void traffic_end_threadgroup();
BankUse traffic_banks();

}  // namespace emu

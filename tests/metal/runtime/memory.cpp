// The arena and its checks: bounds, read-only buffers, uninitialised reads, alignment, races.
#include <sys/mman.h>

#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <unordered_map>

#include "machine.h"

namespace emu {
namespace {

constexpr size_t kArenaBytes = size_t{512} << 20;
constexpr size_t kRedZone = 256;
constexpr uint32_t kManySimdgroups = 0xFFFFFFFF;
constexpr uint32_t kManyLanes = 0x80000000;  // | simdgroup

// Who touched a byte last. Ids are one more than the index, so that zero is nobody.
struct Access {
  uint32_t group, thread, epoch, simd_epoch;
};
struct Shadow {
  Access write, read;
};
struct Allocation {
  size_t offset, size;
  std::string name;
  Region kind;
  Reads reads;
};

char* arena = nullptr;
size_t arena_top;
Shadow* shadow;
Region* region;
uint8_t* written;
std::vector<Allocation> allocations;
std::unordered_map<const void*, char*> variables;
size_t threadgroup_bytes;

template <typename T>
T* map_memory(size_t count) {
  void* p = mmap(nullptr, count * sizeof(T), PROT_READ | PROT_WRITE,
                 MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  if (p == MAP_FAILED) abort();
  return static_cast<T*>(p);
}

Allocation* find(size_t offset) {
  Allocation* best = nullptr;
  size_t best_distance = ~size_t{0};
  for (Allocation& a : allocations) {
    const size_t end = a.offset + a.size;
    const size_t distance =
        offset < a.offset ? a.offset - offset : (offset >= end ? offset - end + 1 : 0);
    if (distance < best_distance) {
      best = &a;
      best_distance = distance;
    }
  }
  return best;
}

std::string describe(size_t offset) {
  const Allocation* a = find(offset);
  if (!a) return "unknown memory";
  char text[200];
  snprintf(text, sizeof text, "%s (%zu bytes) at byte %lld", a->name.c_str(), a->size,
           static_cast<long long>(offset) - static_cast<long long>(a->offset));
  return text;
}

// Two accesses are ordered by program order, or by a barrier between them that names the memory.
bool unordered(const Access& before, const Access& now, uint32_t simdgroup) {
  if (!before.group) return false;
  if (before.group != now.group) return true;  // threadgroups of a dispatch are never ordered
  if (before.thread == kManySimdgroups) return before.epoch == now.epoch;
  uint32_t other = before.thread & ~kManyLanes;
  if (!(before.thread & kManyLanes)) {
    if (before.thread == now.thread) return false;
    other = (before.thread - 1) / kLanes;
  }
  return other == simdgroup ? before.simd_epoch == now.simd_epoch : before.epoch == now.epoch;
}

// Keeps one record for all readers since the last barrier: a lane, a simdgroup or several.
void remember_read(Access& last, const Access& now, uint32_t simdgroup) {
  if (last.group != now.group || last.epoch != now.epoch) {
    last = now;
  } else if (last.thread == now.thread) {
    last.simd_epoch = now.simd_epoch;
  } else if (last.thread != kManySimdgroups) {
    const uint32_t other =
        last.thread & kManyLanes ? last.thread & ~kManyLanes : (last.thread - 1) / kLanes;
    if (other != simdgroup) {
      last.thread = kManySimdgroups;
    } else if (last.simd_epoch != now.simd_epoch) {
      last = now;
    } else {
      last.thread = kManyLanes | simdgroup;
    }
  }
}

void check_race(size_t offset, bool is_write, bool threadgroup_memory, void* pc) {
  const Thread& t = thread_state();
  const Simdgroup& s = machine.simdgroups[t.simdgroup];
  const Access now = {machine.group_index + 1, t.index + 1, machine.epoch[threadgroup_memory] + 1,
                      s.epoch[threadgroup_memory] + 1};
  Shadow& cell = shadow[offset];
  const bool with_write = unordered(cell.write, now, t.simdgroup);
  if (with_write || (is_write && unordered(cell.read, now, t.simdgroup))) {
    const Access& other = with_write ? cell.write : cell.read;
    fail("data race: %s of %s and %s by threadgroup %u are not ordered by a barrier pc=%p",
         is_write ? "write" : "read", describe(offset).c_str(), with_write ? "write" : "read",
         other.group - 1, pc);
  }
  if (is_write) {
    cell.write = now;
  } else {
    remember_read(cell.read, now, t.simdgroup);
  }
}

void access(uintptr_t address, size_t size, bool is_write, size_t alignment, void* pc) {
  const size_t begin = address - reinterpret_cast<uintptr_t>(arena);
  if (begin >= kArenaBytes || machine.current < 0) return;  // a stack, or the scheduler itself
  const char* verb = is_write ? "write" : "read";
  if (alignment && address % alignment) {
    fail("misaligned %zu-byte %s of %s pc=%p", size, verb, describe(begin).c_str(), pc);
  }
  for (size_t i = begin; i < begin + size; i++) {
    const Region kind = region[i];
    if (kind == Region::kRedZone) {
      fail("out-of-bounds %zu-byte %s: %s pc=%p", size, verb, describe(i).c_str(), pc);
    }
    if (is_write && kind == Region::kReadOnly) {
      fail("write to read-only %s pc=%p", describe(i).c_str(), pc);
    }
    const bool late = written[i] == kLate && !machine.fibers[machine.current].waited;
    if (!is_write && (!written[i] || late)) {
      fail("read of uninitialised %s pc=%p", describe(i).c_str(), pc);
    }
    if (is_write) written[i] = 1;
    if (kind != Region::kReadOnly) check_race(i, is_write, kind == Region::kThreadgroup, pc);
  }
  const bool in_threadgroup = region[begin] == Region::kThreadgroup;
  if (in_threadgroup || !is_write) traffic_record(begin, size, in_threadgroup, pc);
}

}  // namespace

void memory_reset() {
  if (!arena) {
    arena = map_memory<char>(kArenaBytes);
    shadow = map_memory<Shadow>(kArenaBytes);
    region = map_memory<Region>(kArenaBytes);
    written = map_memory<uint8_t>(kArenaBytes);
  } else {
    const size_t used = (arena_top + 65535) & ~size_t{65535};
    madvise(arena, used, MADV_DONTNEED);
    madvise(shadow, used * sizeof(Shadow), MADV_DONTNEED);
    madvise(region, used, MADV_DONTNEED);
    madvise(written, used, MADV_DONTNEED);
  }
  arena_top = 4096;
  allocations.clear();
  variables.clear();
  threadgroup_bytes = 0;
}

char* memory_allocate(
    size_t size, size_t alignment, size_t offset, Region kind, const std::string& name, int init) {
  const size_t begin = ((arena_top + kRedZone + alignment - 1) & ~(alignment - 1)) + offset;
  if (begin + size + 2 * kRedZone > kArenaBytes) {
    fprintf(stderr, "the emulated buffers exceed %zu bytes\n", kArenaBytes);
    abort();
  }
  arena_top = begin + size + kRedZone;
  memset(region + begin, static_cast<int>(kind), size);
  memset(written + begin, init, size);
  allocations.push_back({begin, size, name, kind, {}});
  return arena + begin;
}

// Threadgroup memory holds garbage when a threadgroup starts.
void memory_begin_threadgroup() {
  for (const Allocation& a : allocations) {
    if (a.kind != Region::kThreadgroup) continue;
    memset(written + a.offset, 0, a.size);
    memset(shadow + a.offset, 0, a.size * sizeof(Shadow));
    memset(arena + a.offset, 0xFF, a.size);
  }
}

void* threadgroup_variable(const void* key, size_t size, size_t alignment, const char* name) {
  char*& memory = variables[key];
  if (!memory) {
    threadgroup_bytes = ((threadgroup_bytes + alignment - 1) & ~(alignment - 1)) + size;
    if (threadgroup_bytes > machine.threadgroup_bytes) {
      fail("threadgroup memory of %zu bytes exceeds %zu", threadgroup_bytes,
           machine.threadgroup_bytes);
    }
    memory = memory_allocate(size, alignment < 16 ? 16 : alignment, 0, Region::kThreadgroup,
                             std::string("threadgroup ") + name, false);
    memset(memory, 0xFF, size);
  }
  return memory;
}

void check_access(const void* p, size_t size, bool is_write, void* pc) {
  access(reinterpret_cast<uintptr_t>(p), size, is_write, 0, pc);
}

void memory_spoil(void* p, size_t size, void* pc) {
  const size_t begin = static_cast<char*>(p) - arena;
  for (size_t i = begin; i < begin + size; i++) {
    if (i < kArenaBytes && region[i] == Region::kThreadgroup) continue;
    fail("out-of-bounds %zu-byte copy: %s pc=%p", size, describe(i).c_str(), pc);
  }
  memset(p, 0xFF, size);
  memset(written + begin, 0, size);
}

void memory_deliver(void* p, const void* bytes, size_t size) {
  const size_t begin = static_cast<char*>(p) - arena;
  memcpy(p, bytes, size);
  memset(written + begin, 1, size);
  memset(static_cast<void*>(shadow + begin), 0, size * sizeof(Shadow));
}

int64_t memory_unwritten(const char* begin, size_t size) {
  int64_t n = 0;
  for (size_t i = begin - arena; size > 0; i++, size--) n += !written[i];
  return n;
}

Reads memory_traffic(const char* begin) {
  const Allocation* a = find(begin - arena);
  return a ? a->reads : Reads{};
}

void memory_count(size_t offset, uint64_t all, uint64_t missed) {
  Reads& reads = find(offset)->reads;
  reads.all += all;
  reads.missed += missed;
}

}  // namespace emu

// Called by code compiled with -fsanitize=thread. PC is one past the access, inside its line.
#define EMU_HOOK extern "C" __attribute__((visibility("default")))
#define EMU_PC __builtin_return_address(0)
#define EMU_ACCESS(p, size, is_write, alignment) \
  emu::access(reinterpret_cast<uintptr_t>(p), size, is_write, alignment, EMU_PC)
#define EMU_HOOKS(N)                                                              \
  EMU_HOOK void __tsan_read##N(void* p) { EMU_ACCESS(p, N, false, N); }           \
  EMU_HOOK void __tsan_write##N(void* p) { EMU_ACCESS(p, N, true, N); }           \
  EMU_HOOK void __tsan_unaligned_read##N(void* p) { EMU_ACCESS(p, N, false, 0); } \
  EMU_HOOK void __tsan_unaligned_write##N(void* p) { EMU_ACCESS(p, N, true, 0); }
EMU_HOOKS(1)
EMU_HOOKS(2)
EMU_HOOKS(4)
EMU_HOOKS(8)
EMU_HOOKS(16)
EMU_HOOK void __tsan_init() {}
EMU_HOOK void __tsan_func_entry(void*) {}
EMU_HOOK void __tsan_func_exit() {}
EMU_HOOK void __tsan_read_range(void* p, size_t n) { EMU_ACCESS(p, n, false, 0); }
EMU_HOOK void __tsan_write_range(void* p, size_t n) { EMU_ACCESS(p, n, true, 0); }
EMU_HOOK void* __tsan_memcpy(void* to, const void* from, size_t n) {
  EMU_ACCESS(from, n, false, 0);
  EMU_ACCESS(to, n, true, 0);
  return memcpy(to, from, n);
}
EMU_HOOK void* __tsan_memset(void* to, int value, size_t n) {
  EMU_ACCESS(to, n, true, 0);
  return memset(to, value, n);
}

// Copies that go on beside the threads, and the barriers that count them. Between its start and the
// moment it is waited for, what a copy writes is garbage.
#include <cstring>
#include <deque>
#include <unordered_map>
#include <vector>

#include "hardware.h"

namespace emu {

void wgmma_start_thread();

namespace {

struct Copy {
  char* to;
  unsigned char bytes[16];
};
struct Copies {
  std::vector<Copy> open;
  std::deque<std::vector<Copy>> committed;
};
Copies copies[1024];
Copies& mine() { return copies[thread_state().index]; }

struct Barrier {
  uint32_t count, pending, phase;
  int64_t bytes;  // still to come
};
std::unordered_map<const void*, Barrier> barriers;

char* window = nullptr;

Barrier& find(const uint64_t* barrier) {
  const auto found = barriers.find(barrier);
  if (found == barriers.end()) fail("a barrier that was never initialised");
  return found->second;
}

void end_phase_if_done(Barrier& b) {
  if (b.pending != 0 || b.bytes != 0) return;
  b.phase++;
  b.pending = b.count;
}

}  // namespace

void start_thread() {
  wgmma_start_thread();
  mine() = {};
}

void use_window(void* dynamic) {
  window = reinterpret_cast<char*>(reinterpret_cast<uintptr_t>(dynamic) & ~uintptr_t{1023});
}
uint32_t shared_address(const void* p) {
  return static_cast<uint32_t>(static_cast<const char*>(p) - window);
}
char* shared_pointer(uint32_t address) { return window + static_cast<int32_t>(address); }

void copy(uint32_t to, const void* from, bool inside, void* pc) {
  Copy c = {shared_pointer(to), {}};
  if (reinterpret_cast<uintptr_t>(from) % 16 || to % 16) fail("misaligned copy pc=%p", pc);
  if (inside) {
    check_access(from, 16, false, pc);
    memcpy(c.bytes, from, 16);
  }
  check_access(c.to, 16, true, pc);
  memory_spoil(c.to, 16, pc);
  mine().open.push_back(c);
}
void commit_copies() {
  mine().committed.push_back(std::move(mine().open));
  mine().open.clear();
}
void wait_for_copies(int pending, void* pc) {
  Copies& all = mine();
  while (all.committed.size() > static_cast<size_t>(pending)) {
    for (const Copy& c : all.committed.front()) {
      check_access(c.to, 16, true, pc);
      memcpy(c.to, c.bytes, 16);
    }
    all.committed.pop_front();
  }
}

void barrier_init(uint64_t* barrier, uint32_t count) {
  check_access(barrier, sizeof *barrier, true, __builtin_return_address(0));
  barriers[barrier] = {count, count, 0, 0};
}
void barrier_arrive(uint64_t* barrier, uint32_t bytes) {
  check_access(barrier, sizeof *barrier, false, __builtin_return_address(0));
  Barrier& b = find(barrier);
  if (b.pending == 0) fail("more arrivals at a barrier than it counts");
  b.bytes += bytes;
  b.pending--;
  end_phase_if_done(b);
}
void barrier_wait(uint64_t* barrier, uint32_t parity, int line, const char* file) {
  check_access(barrier, sizeof *barrier, false, __builtin_return_address(0));
  struct Waiting {
    Barrier* barrier;
    uint32_t parity;
  } const waiting = {&find(barrier), parity};
  const auto passed = [](const void* what) {
    const auto& w = *static_cast<const Waiting*>(what);
    return (w.barrier->phase & 1) != w.parity;
  };
  wait_until(passed, &waiting, line, file);
}

// --- The copy engine ---

namespace {

struct Arrival {
  struct Part {
    char* to;
    char bytes[16];
    uint32_t size;
  };
  std::vector<Part> parts;
  Barrier* barrier;
  int64_t bytes;
};

void arrive(void* what) {
  auto* arrival = static_cast<Arrival*>(what);
  for (const Arrival::Part& p : arrival->parts) memory_deliver(p.to, p.bytes, p.size);
  arrival->barrier->bytes -= arrival->bytes;
  end_phase_if_done(*arrival->barrier);
  delete arrival;
}

}  // namespace

void copy_box(void* to, const Map& map, uint64_t* full, const int (&first)[4], void* pc) {
  const uint32_t line = map.box[0] * map.element, part = line < 16 ? line : 16;
  const uint32_t base = shared_address(to);
  if (base % (map.swizzle ? 1024 : 128)) fail("a box at byte %u of shared memory", base);
  auto* arrival = new Arrival{{}, &find(full), 0};
  uint64_t lines = 1, box[4] = {1, 1, 1, 1};
  for (uint64_t i = 0; i < map.rank; i++) box[i] = map.box[i];
  lines = box[1] * box[2] * box[3];
  for (uint64_t l = 0; l < lines; l++) {
    const uint64_t in_box[3] = {l % box[1], l / box[1] % box[2], l / (box[1] * box[2])};
    const char* row = map.data;
    bool inside = true;
    for (uint64_t i = 1; i < map.rank; i++) {
      const uint64_t at = first[i] + in_box[i - 1];
      inside = inside && at < map.sizes[i];
      row += at * map.strides[i - 1];
    }
    for (uint32_t byte = 0; byte < line; byte += part) {
      const uint64_t column = first[0] + byte / map.element;
      uint32_t address = base + static_cast<uint32_t>(l * line + byte);
      if (map.swizzle == 128) address ^= (address >> 7 & 7) << 4;
      if (map.swizzle == 64) address ^= (address >> 7 & 3) << 4;
      Arrival::Part p = {shared_pointer(address), {}, part};
      if (inside && column < map.sizes[0]) {
        const char* from = row + column * map.element;
        check_access(from, part, false, pc);
        memcpy(p.bytes, from, part);
      }
      memory_spoil(p.to, part, pc);
      arrival->parts.push_back(p);
    }
  }
  arrival->bytes = lines * line;
  defer(arrive, arrival);
}

}  // namespace emu

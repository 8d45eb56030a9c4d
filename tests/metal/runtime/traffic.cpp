// What accesses cost a GPU. Fibers run one after the other, so what lanes do together is put
// together afterwards: the same instruction, executed as often before. Device reads go through an
// L1 of 8 KB that simdgroups of a threadgroup take turns at; accesses to threadgroup memory wait
// for 32 banks.
#include <algorithm>
#include <list>
#include <set>
#include <unordered_map>

#include "machine.h"

namespace emu {
namespace {

constexpr size_t kLine = 128, kLines = (8 << 10) / kLine;
constexpr size_t kBanks = 32, kWord = 4;

struct Access {
  size_t offset, size;
  bool threadgroup_memory;
};
// What the lanes of a simdgroup do at once.
struct Operation {
  std::vector<Access> accesses;
};
struct Trace {
  std::vector<Operation> operations;
  std::unordered_map<uint64_t, size_t> known;  // by instruction and how often it was executed
};

bool counting;
BankUse bank_use;
std::vector<Trace> traces;                          // by simdgroup
std::unordered_map<uint64_t, uint32_t> executions;  // by thread and instruction

uint64_t mix(uint64_t h, uint64_t value) {
  h = (h ^ value) * 0x9E3779B97F4A7C15ull;
  return h ^ (h >> 29);
}

class Cache {
 public:
  // Was it there?
  bool touch(size_t line) {
    const auto known = std::find(lines_.begin(), lines_.end(), line);
    const bool hit = known != lines_.end();
    if (hit) lines_.erase(known);
    lines_.push_front(line);
    if (lines_.size() > kLines) lines_.pop_back();
    return hit;
  }

 private:
  std::list<size_t> lines_;  // the last used first
};

// Each bank gives a word a cycle, to all lanes that want it.
void count_banks(const Operation& operation) {
  std::set<size_t> words;
  for (const Access& a : operation.accesses) {
    for (size_t w = a.offset / kWord; w <= (a.offset + a.size - 1) / kWord; w++) words.insert(w);
  }
  size_t in_bank[kBanks] = {};
  for (const size_t w : words) in_bank[w % kBanks]++;
  bank_use.cycles += *std::max_element(in_bank, in_bank + kBanks);
  bank_use.least += (words.size() + kBanks - 1) / kBanks;
}

void count_reads(const Operation& operation, Cache& cache) {
  std::set<size_t> addresses, lines;
  for (const Access& a : operation.accesses) {
    if (addresses.insert(a.offset).second) memory_count(a.offset, a.size, 0);
    for (size_t l = a.offset / kLine; l <= (a.offset + a.size - 1) / kLine; l++) {
      if (lines.insert(l).second && !cache.touch(l)) memory_count(a.offset, 0, kLine);
    }
  }
}

}  // namespace

void traffic_reset(bool count) {
  counting = count;
  bank_use = {};
}

void traffic_begin_threadgroup() {
  traces.assign(machine.simdgroups.size(), {});
  executions.clear();
}

void traffic_record(size_t offset, size_t size, bool threadgroup_memory, void* pc) {
  if (!counting) return;
  const Thread& t = thread_state();
  const uint64_t instruction = reinterpret_cast<uint64_t>(pc);
  const uint32_t nth = executions[mix(mix(1, t.index), instruction)]++;
  Trace& trace = traces[t.simdgroup];
  const auto [entry, is_new] =
      trace.known.try_emplace(mix(mix(2, instruction), nth), trace.operations.size());
  if (is_new) trace.operations.push_back({});
  trace.operations[entry->second].accesses.push_back({offset, size, threadgroup_memory});
}

void traffic_end_threadgroup() {
  if (!counting) return;
  Cache cache;
  size_t longest = 0;
  for (const Trace& t : traces) longest = std::max(longest, t.operations.size());
  for (size_t i = 0; i < longest; i++) {
    for (const Trace& t : traces) {
      if (i >= t.operations.size()) continue;
      const Operation& operation = t.operations[i];
      if (operation.accesses[0].threadgroup_memory) {
        count_banks(operation);
      } else {
        count_reads(operation, cache);
      }
    }
  }
}

BankUse traffic_banks() { return bank_use; }

}  // namespace emu

// Which table of kernels runs: the best the machine has, or the one ONEBIT_CPU_ISA names.
#include "kernels.h"

#include <atomic>
#include <cstdlib>
#include <cstring>
#include <stdexcept>
#include <string>
#include <vector>

namespace onebit::cpu {

extern const Kernels kAmxKernels;
extern const Kernels kAvx512Kernels;
extern const Kernels kAvx2Kernels;
extern const Kernels kNeonKernels;

namespace {

// Best first.
const Kernels* const kCompiled[] = {
#if defined(__x86_64__) && defined(__linux__)
    &kAmxKernels,
#endif
#if defined(__x86_64__)
    &kAvx512Kernels,
    &kAvx2Kernels,
#elif defined(__aarch64__)
    &kNeonKernels,
#endif
    &kScalarKernels,
};

const std::vector<const Kernels*>& available() {
  static const auto tables = [] {
    std::vector<const Kernels*> found;
    for (const Kernels* table : kCompiled) {
      if (table->supported()) found.push_back(table);
    }
    return found;
  }();
  return tables;
}

const Kernels* find(const char* name) {
  for (const Kernels* table : available()) {
    if (std::strcmp(table->name, name) == 0) return table;
  }
  return nullptr;
}

// A name that is asked for and not there is an error: silence would hide a slower table.
const Kernels* choose() {
  const char* name = std::getenv("ONEBIT_CPU_ISA");
  if (!name || !*name) return available().front();
  if (const Kernels* table = find(name)) return table;
  std::string names;
  for (const Kernels* table : available())
    names += std::string(names.empty() ? "" : ", ") + table->name;
  throw std::runtime_error("ONEBIT_CPU_ISA must be one of " + names + ", got " + name);
}

std::atomic<const Kernels*> selected{nullptr};

}  // namespace

const Kernels& kernels() {
  const Kernels* table = selected.load(std::memory_order_relaxed);
  if (!table) selected.store(table = choose(), std::memory_order_relaxed);
  return *table;
}

bool select_kernels(const char* name) {
  const Kernels* table = find(name);
  if (table) selected.store(table, std::memory_order_relaxed);
  return table != nullptr;
}

const Kernels* const* available_kernels(int* count) {
  *count = int(available().size());
  return available().data();
}

}  // namespace onebit::cpu

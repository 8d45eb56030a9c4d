// The CPU kernel tables as seen from Python: what there is, what runs, and a switch for tests.
#include <c10/util/Exception.h>
#include <torch/library.h>

#include <string>
#include <vector>

#include "kernels/kernels.h"

namespace onebit::cpu {
namespace {

std::vector<std::string> cpu_isas() {
  int count = 0;
  const Kernels* const* tables = available_kernels(&count);
  std::vector<std::string> names;
  for (int i = 0; i < count; ++i) names.emplace_back(tables[i]->name);
  return names;
}

std::string cpu_isa() { return kernels().name; }

void set_cpu_isa(const std::string& name) {
  TORCH_CHECK_VALUE(select_kernels(name.c_str()), "name must be one of ", cpu_isas(), ", got ",
                    name);
}

}  // namespace

TORCH_LIBRARY_FRAGMENT(onebit, m) {
  m.def("cpu_isas() -> str[]", &cpu_isas);
  m.def("cpu_isa() -> str", &cpu_isa);
  m.def("can_prepack() -> bool", [] { return kernels().qmm_prepacked != nullptr; });
  m.def("set_cpu_isa(str name) -> ()", &set_cpu_isa);
}

}  // namespace onebit::cpu

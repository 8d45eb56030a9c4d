#include "fake_state.h"

#include <c10/util/Exception.h>
#include <dlfcn.h>

#include <cstdlib>

#include "fake_metal.h"

namespace onebit::fake {

bool on_queue = false, unordered = false;
std::string log_text, compiled;

namespace {
std::string failing_step, reported;
}

FakeGpu fake_gpu() {
  FakeGpu gpu;
  if (const char* name = getenv("ONEBIT_FAKE_GPU")) gpu.name = name;
  sscanf(gpu.name.c_str(), "%d:%u", &gpu.family, &gpu.cores);
  return gpu;
}

bool fails(const char* step) {
  const bool failing = failing_step == step;
  if (failing) failing_step.clear();
  return failing;
}
void fail_next(const char* step) { failing_step = step; }

void report(const std::string& message) {
  if (reported.empty()) reported = message;
}
void raise_reports() {
  const std::string error = std::move(reported);
  reported.clear();
  TORCH_CHECK(error.empty(), error);
}

const Emulator& emulator() {
  static std::string loaded;  // tests of broken shaders change the library
  static Emulator e;
  const char* path = getenv("ONEBIT_EMULATOR");
  if (path && loaded == path) return e;
  void* library = path ? dlopen(path, RTLD_NOW | RTLD_LOCAL) : nullptr;
  TORCH_CHECK(library, "ONEBIT_EMULATOR must name the emulated kernels, got ", path ? path : "");
  e.kernel_name = reinterpret_cast<decltype(e.kernel_name)>(dlsym(library, "emu_kernel_name"));
  e.set_function_constant = reinterpret_cast<decltype(e.set_function_constant)>(
      dlsym(library, "emu_set_function_constant"));
  e.run = reinterpret_cast<decltype(e.run)>(dlsym(library, "emu_run"));
  loaded = path;
  return e;
}

const char* take_log() {
  static std::string taken;
  taken = log_text;
  log_text.clear();
  return taken.c_str();
}

const char* take_compiled() {
  static std::string taken;
  taken = compiled;
  compiled.clear();
  return taken.c_str();
}

}  // namespace onebit::fake

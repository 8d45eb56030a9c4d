// Stands before the emulator as ONEBIT_EMULATOR and writes every dispatch down, with what its
// buffers held before and after, so that another machine can repeat it. The emulator proper is
// ONEBIT_RECORDED, the file ONEBIT_RECORD; a kernel with the same constants and sizes is kept once.
#include <dlfcn.h>

#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <map>
#include <set>
#include <string>

#include "../host/fake_metal.h"

namespace {

using onebit::fake::EmulatorBuffer;
using onebit::fake::EmulatorDispatch;

template <class F>
F real(const char* name) {
  static void* const library = dlopen(getenv("ONEBIT_RECORDED"), RTLD_NOW | RTLD_LOCAL);
  if (!library) {
    fprintf(stderr, "ONEBIT_RECORDED must be the emulator, got: %s\n", dlerror());
    abort();
  }
  return reinterpret_cast<F>(dlsym(library, name));
}

std::map<int, std::string> constants;  // by index, in hexadecimal

std::string numbers(const uint32_t (&three)[3]) {
  return "[" + std::to_string(three[0]) + "," + std::to_string(three[1]) + "," +
         std::to_string(three[2]) + "]";
}

// JSON of a dispatch. In the file follow its buffers before, and of each whether it changed (a
// byte), and then to what.
std::string describe(const EmulatorDispatch& d) {
  std::string text = std::string("{\"kernel\":\"") + d.kernel +
                     "\",\"groups\":" + numbers(d.groups) + ",\"threads\":" + numbers(d.threads) +
                     ",\"constants\":{";
  const char* comma = "";
  for (const auto& [index, hex] : constants) {
    text += comma + ("\"" + std::to_string(index)) + "\":\"" + hex + "\"";
    comma = ",";
  }
  text += "},\"buffers\":[";
  comma = "";
  for (int i = 0; i < 31; i++) {
    const EmulatorBuffer& b = d.buffers[i];
    if (!b.host) continue;
    text += comma + ("[" + std::to_string(i)) + "," + std::to_string(b.length) + "," +
            std::to_string(b.read_only) + "," + std::to_string(b.initialised) + "," +
            std::to_string(b.offset) + "]";
    comma = ",";
  }
  return text + "]}";
}

}  // namespace

#define EXPORT extern "C" __attribute__((visibility("default")))

EXPORT const char* emu_kernel_name(int index) {
  return real<const char* (*)(int)>("emu_kernel_name")(index);
}

EXPORT int emu_set_function_constant(int index, const void* value, uint64_t size) {
  std::string& hex = constants[index];
  hex.clear();
  for (uint64_t i = 0; i < size; i++) {
    char two[3];
    snprintf(two, sizeof two, "%02x", static_cast<const unsigned char*>(value)[i]);
    hex += two;
  }
  return real<int (*)(int, const void*, uint64_t)>("emu_set_function_constant")(index, value, size);
}

EXPORT int emu_run(EmulatorDispatch* d, char* message, uint64_t size) {
  static FILE* const file = fopen(getenv("ONEBIT_RECORD"), "wb");
  static std::set<std::string> seen;
  const std::string text = describe(*d);
  const bool keep = seen.insert(text).second;
  std::string before[31];
  if (keep) {
    const uint64_t length = text.size();
    fwrite(&length, sizeof length, 1, file);
    fwrite(text.data(), 1, length, file);
    for (int i = 0; i < 31; i++) {
      const EmulatorBuffer& b = d->buffers[i];
      if (b.host) before[i].assign(b.host, b.length);
      fwrite(before[i].data(), 1, before[i].size(), file);
    }
  }
  const int failed = real<int (*)(EmulatorDispatch*, char*, uint64_t)>("emu_run")(d, message, size);
  for (int i = 0; keep && i < 31; i++) {
    const EmulatorBuffer& b = d->buffers[i];
    if (!b.host) continue;
    const bool changed = memcmp(b.host, before[i].data(), b.length) != 0;
    fputc(changed, file);
    if (changed) fwrite(b.host, 1, b.length, file);
  }
  fflush(file);
  return failed;
}

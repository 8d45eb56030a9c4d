// The fake Metal and the fake MPS device, as they see each other.
#pragma once
#include <cstddef>
#include <cstdint>

namespace onebit::fake {

// A new MTLBuffer; returns what the storage of an MPS tensor points to, which the others take.
void* new_buffer(size_t bytes);
void delete_buffer(void* data);
char* buffer_contents(void* data);
// Somebody else than a kernel wrote to it.
void mark_initialised(void* data);

// The emulated library of kernels, from ONEBIT_EMULATOR.
struct EmulatorBuffer {
  char* host;
  uint64_t length;
  int32_t read_only;
  int32_t initialised;
  uint64_t offset;
  uint64_t bytes_read, bytes_missed;
  int64_t unwritten;
};
struct EmulatorDispatch {
  const char* kernel;
  uint32_t groups[3];
  uint32_t threads[3];
  EmulatorBuffer buffers[31];
  int32_t schedule;
  uint64_t seed;
  int32_t count_traffic;
  int32_t flush_denormals;
  uint64_t bank_cycles, bank_least;
};
struct Emulator {
  const char* (*kernel_name)(int);
  int (*set_function_constant)(int, const void*, uint64_t);
  int (*run)(EmulatorDispatch*, char*, uint64_t);
};
const Emulator& emulator();

// What happened since the last call: "kernel groups threads" of every dispatch, or "commit", one a
// line; with ONEBIT_FAKE_TRAFFIC set, " banks:cycles:least" and " index:bytes:missed" for every
// buffer that was read.
const char* take_log();

// How the sources that were compiled since the last call begin, one a line.
const char* take_compiled();

// Makes the next step that can fail do so: "compile", "compile 4.0", "function" or "pipeline".
void fail_next(const char* step);

}  // namespace onebit::fake

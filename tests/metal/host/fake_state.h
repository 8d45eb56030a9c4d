// What the parts of the fake Metal share: where calls come from, what happened, what is to fail.
#pragma once
#include <string>

namespace onebit::fake {

extern bool on_queue;                   // inside a block of the stream's queue
extern bool unordered;                  // a dispatch was encoded that no barrier follows yet
extern std::string log_text, compiled;  // of take_log() and take_compiled()

// ONEBIT_FAKE_GPU="9:40": of the family Apple9, with 40 cores.
struct FakeGpu {
  std::string name = "7:7";
  int family = 7;
  unsigned cores = 7;
};
FakeGpu fake_gpu();

// Is this the step that fail_next() asked for?
bool fails(const char* step);

// Raised when the block is done: inside it an exception would end a real process.
void report(const std::string& message);
void raise_reports();

}  // namespace onebit::fake

// Memory a kernel needs while it runs: one buffer per thread, grown once and kept.
#pragma once

#include <cstdint>

namespace onebit::cpu {

// 64-byte aligned, undefined contents, valid until the thread's next call. Kernels bound what they
// ask for by their block sizes (at most 4 MiB), never by the size of the problem.
void* thread_scratch(int64_t bytes);

}  // namespace onebit::cpu

// Threads that share the chunks of one product. The caller takes chunks like every worker and waits
// only for chunks that a worker is at: a worker that the system gives no core to holds nothing up
// unless it has a chunk. No torch in here.
#pragma once

#include <cstdint>

namespace onebit::cpu {

// Calls f(chunk) for every chunk in [0, chunks), on the calling thread and at most `threads` - 1
// others; returns when all have returned, and throws what one of them threw. Which thread computes
// what is left to chance. A call within f, or while another thread's call has the workers, is done
// by its caller alone. Workers sleep between calls, live as long as the process and start anew in a
// forked child.
template <class F>
void run_chunks(int64_t chunks, int64_t threads, const F& f);

// The same for a plain function.
using ChunkFunction = void (*)(const void* context, int64_t chunk);
void run_chunks(int64_t chunks, int64_t threads, ChunkFunction f, const void* context);

template <class F>
void run_chunks(int64_t chunks, int64_t threads, const F& f) {
  run_chunks(
      chunks, threads,
      [](const void* context, int64_t chunk) { (*static_cast<const F*>(context))(chunk); }, &f);
}

}  // namespace onebit::cpu

// How much work is worth a second thread.
#pragma once

#include <cstdint>

namespace onebit::cpu {

// Multiply-adds below which a second thread costs more than it saves: fork and join take up to 50
// us when the other threads sleep, and a fast table does this many in 20.
constexpr int64_t kMacsPerTask = 1 << 21;

inline int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

}  // namespace onebit::cpu

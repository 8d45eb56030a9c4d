// Memory that is read from its first byte to its last for every product: in large pages.
#pragma once

#include <ATen/core/Tensor.h>

#include <cstdint>

namespace onebit::cpu {

// Zeros [bytes] of uint8. On Linux tensors share blocks of large pages, where the system has any:
// with small ones a product waits for the table of pages as long as for memory. A tensor's memory
// goes back to the system with it.
at::Tensor zeros_in_large_pages(int64_t bytes);

}  // namespace onebit::cpu

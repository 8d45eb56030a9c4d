// The tests of the threads, for the one main() there is.
#pragma once

namespace onebit::cpu {

// Counts what it finds in `failures`.
void test_pool();

}  // namespace onebit::cpu

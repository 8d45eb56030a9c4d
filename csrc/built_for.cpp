// Which torch this was compiled against, as text that torch_onebit/_load.py finds in the file
// before it loads it: torch's C++ ABI changes between minor versions, and a mismatched extension
// may crash the process where it ought to fail to load.
#include <torch/version.h>

extern "C" {
extern __attribute__((visibility("default"))) const char onebit_built_for[];
__attribute__((used)) const char onebit_built_for[] = "onebit was built for torch " TORCH_VERSION;
}

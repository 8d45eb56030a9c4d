// Decodes greedily with a package of package_decoder.py, without Python:
//   ./decode <torch_onebit>/_C.abi3.so decoder.pt2
// For each line "token position count" of its input: the milliseconds of a token, and the tokens.
#include <ATen/ops/argmax.h>
#include <ATen/ops/full.h>
#include <c10/core/InferenceMode.h>
#include <dlfcn.h>
#include <torch/csrc/inductor/aoti_package/model_package_loader.h>

#include <chrono>
#include <iostream>

int main(int argc, char** argv) {
  if (argc != 3) {
    std::cerr << "usage: " << argv[0] << " <torch_onebit>/_C.abi3.so decoder.pt2\n";
    return 2;
  }
  if (!dlopen(argv[1], RTLD_NOW | RTLD_GLOBAL)) {
    std::cerr << dlerror() << "\n";
    return 1;
  }
  const c10::InferenceMode inference;
  torch::inductor::AOTIModelPackageLoader step(argv[2]);
  int64_t token, position, count;
  while (std::cin >> token >> position >> count) {
    std::string tokens;
    const auto start = std::chrono::steady_clock::now();
    for (int64_t i = 0; i < count; ++i) {
      const auto number = [](int64_t n) { return at::full({1, 1}, n, at::kLong); };
      const at::Tensor logits = step.run({number(token), number(position + i)})[0];
      token = at::argmax(logits).item<int64_t>();
      tokens += " " + std::to_string(token);
    }
    const std::chrono::duration<double, std::milli> time = std::chrono::steady_clock::now() - start;
    std::cout << time.count() / double(count) << tokens << std::endl;
  }
}

// Runs a packaged 1-bit model without Python: ./main <torch_onebit>/_C.abi3.so model.pt2
#include <ATen/ops/arange.h>
#include <c10/core/InferenceMode.h>
#include <dlfcn.h>
#include <torch/csrc/inductor/aoti_package/model_package_loader.h>

#include <cstdio>

int main(int argc, char** argv) {
  if (argc != 3) {
    std::fprintf(stderr, "usage: %s <torch_onebit>/_C.abi3.so model.pt2\n", argv[0]);
    return 2;
  }
  // Registers torch.ops.onebit, which the package calls: before the package is loaded.
  if (!dlopen(argv[1], RTLD_NOW | RTLD_GLOBAL)) {
    std::fprintf(stderr, "%s\n", dlerror());
    return 1;
  }
  const c10::InferenceMode inference;
  torch::inductor::AOTIModelPackageLoader model(argv[2]);
  const at::Tensor y = model.run({at::arange(6, at::kLong).reshape({3, 2})})[0].reshape({6, 4});
  for (int64_t token = 0; token < y.size(0); ++token) {
    for (int64_t i = 0; i < y.size(1); ++i) {
      std::printf("%s%.4f", i ? " " : "", y[token][i].item<float>());
    }
    std::printf("\n");
  }
}

#include "tensor_tiles.h"

#include <ATen/ops/empty.h>
#include <ATen/ops/equal.h>
#include <ATen/ops/full.h>
#include <ATen/ops/tensor.h>

#include <cmath>
#include <mutex>
#include <string>
#include <unordered_set>
#include <vector>

#include "../ops/rules.h"
#include "product.h"

namespace onebit::mps {
namespace {

using at::Tensor;

// Small integers, whose products and sums are exact in float whatever their order: results must
// have the same bits. Not from torch's generators, whose state is the user's.
class Integers {
 public:
  // Between low and high.
  Tensor floats(at::IntArrayRef shape, int low, int high, DType type) {
    Tensor t = at::empty(shape, at::kFloat);
    float* values = t.mutable_data_ptr<float>();
    for (int64_t i = 0; i < t.numel(); i++) {
      values[i] = static_cast<float>(low + static_cast<int>(next() % (high - low + 1)));
    }
    return t.to(at::kMPS, scalar_type(type));
  }
  // Nearly all bits of a word are set or nearly none, so that sums grow and shrink again: what sums
  // in fewer bits than float does shows.
  Tensor words(at::IntArrayRef shape) {
    Tensor t = at::empty(shape, at::kInt);
    int32_t* values = t.mutable_data_ptr<int32_t>();
    for (int64_t i = 0; i < t.numel(); i++) {
      const uint32_t some = word() & word() & word();
      values[i] = static_cast<int32_t>(next() & 1 ? some : ~some);
    }
    return t.to(at::kMPS);
  }
  static at::ScalarType scalar_type(DType type) {
    return type == DType::kHalf ? at::kHalf : type == DType::kBFloat16 ? at::kBFloat16 : at::kFloat;
  }

 private:
  uint32_t word() { return next() << 16 ^ next(); }
  uint32_t next() { return (state_ = state_ * 1664525u + 1013904223u) >> 16; }
  uint32_t state_ = 1;
};

// The kernel of simdgroup matrices that computes the same.
Kernel older(Kernel kernel) {
  if (kernel == Kernel::kQmmSortedTensor) return Kernel::kQmmSorted;
  return kernel == Kernel::kQmmNTensor ? Kernel::kQmmN : Kernel::kQmm;
}

// A product with edges that the rules compute by this pipeline on the GPU that comes with it.
std::pair<Product, Gpu> example(const Pipeline& pipeline, const Gpu& gpu) {
  const uint32_t rows = pipeline.rows;
  const bool sorted = pipeline.kernel == Kernel::kQmmSortedTensor;
  Product p = {};
  p.transpose = pipeline.kernel != Kernel::kQmmNTensor;
  p.m = sorted ? 1 : rows == tensor_rows(rows + 5) ? rows + 5 : rows - 5;
  p.n = kTensorN + 9;
  p.k = pipeline.partial ? 2 * kMinSplitK : 256;
  p.group_size = 64;
  if (!p.transpose) {  // groups run along n, and k ends where it likes
    p.n = kTensorN + 32;
    p.k += 5;
    p.group_size = 32;
  }
  p.indexed = pipeline.indexed;
  p.sorted = sorted;
  p.batches = sorted ? kTileM + 9 : p.indexed ? 3 : 1;
  p.x_matrices = p.w_matrices = p.indexed ? 2 : 1;
  p.type = pipeline.type;
  p.levels = pipeline.levels;
  p.has_biases = pipeline.has_biases;
  return {p, {gpu.family, pipeline.partial ? 1000u : 1u, true}};
}

Tensor compute(const ProductPlan& plan, const ProductTensors& tensors, const Product& p) {
  // A kernel that is aborted leaves memory as it is, and PyTorch does not tell: NaN equals nothing.
  const Tensor y = at::full({p.batches, p.m, p.n}, NAN, tensors.x.options());
  encode_product(plan, tensors, y);
  return y.cpu();
}

// "" when the pipeline agrees, else why it does not.
std::string disagreement(const Pipeline& pipeline, const Gpu& real) {
  const auto [p, gpu] = example(pipeline, real);
  const ProductPlan plan = plan_product(p, gpu, pipeline.kernel);
  TORCH_INTERNAL_ASSERT(plan.product.pipeline.key() == pipeline.key(), "another pipeline is tried");
  Integers integers;
  const int64_t rows = p.transpose ? p.n : p.k, columns = p.transpose ? p.k : p.n;
  const int64_t words = columns / kWordBits, groups = columns / p.group_size;
  ProductTensors t = {integers.floats({p.x_matrices, p.m, p.k}, 0, 31, p.type),
                      integers.words({p.w_matrices, rows, words}),
                      integers.floats({p.w_matrices, rows, groups}, 1, 3, p.levels)};
  // Without biases they are minus half of the scales: integers of those too.
  if (!p.has_biases) t.scales.mul_(2);
  if (p.has_biases) t.biases = integers.floats({p.w_matrices, rows, groups}, -4, 1, p.levels);
  if (p.indexed) {
    std::vector<int64_t> of_x(p.batches), of_w(p.batches);
    for (uint32_t b = 0; b < p.batches; b++) {
      of_x[b] = b % 3 ? 1 : 0;
      of_w[b] = p.sorted ? b >= kTileM / 2 : b != 1;
    }
    t.x_index = at::tensor(of_x, at::kLong).to(at::kMPS);
    t.w_index = at::tensor(of_w, at::kLong).to(at::kMPS);
  }
  const Tensor expected = compute(plan_product(p, gpu, older(pipeline.kernel)), t, p);
  try {
    return at::equal(compute(plan, t, p), expected) ? ""
                                                    : "they compute other products than simdgroup "
                                                      "matrices do";
  } catch (const c10::Error& error) {
    return error.what_without_backtrace();
  }
}

}  // namespace

bool tensor_tiles_agree(const Pipeline& pipeline, const Gpu& gpu) {
  static auto* const mutex = new std::mutex;
  static auto* const agreed = new std::unordered_set<uint32_t>;
  static bool refused = false;
  std::lock_guard<std::mutex> lock(*mutex);
  if (refused || agreed->count(pipeline.key())) return !refused;
  const std::string reason = disagreement(pipeline, gpu);
  if (reason.empty()) {
    agreed->insert(pipeline.key());
    return true;
  }
  refused = true;
  TORCH_WARN("Metal's tensor operations are not used on this machine: ", reason,
             ". Simdgroup matrices take their place.");
  return false;
}

}  // namespace onebit::mps

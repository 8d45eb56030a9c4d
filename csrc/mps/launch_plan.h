// Which Metal kernel runs, on which grid: decided here, in pure C++ that every platform compiles
// and tests; encoder.mm only carries it out.
#pragma once

#include <cstdint>

#include "params.h"

namespace onebit::mps {

// Kernels and what they are called with
// ---------------------------------------------------------------------------------------

enum class Kernel : uint8_t {
  kQuantize,
  kDecode,
  kQmv,
  kQmvWide,
  kQmm,
  kQmmSorted,
  kQmmN,
  kQmmTensor,
  kQmmSortedTensor,
  kQmmNTensor,
  kQvm,
  kSumPartials,
  kAffineGrad,
  kQuantizeLevels,
  kFakeQuantize,
  kFakeQuantizeBackward,
  kFakeQuantizeAffine,
  kFakeQuantizeAffineBackward,
  kFlipBits,
};

constexpr const char* kernel_name(Kernel kernel) {
  constexpr const char* names[] = {"quantize",
                                   "decode",
                                   "qmv",
                                   "qmv_wide",
                                   "qmm",
                                   "qmm_sorted",
                                   "qmm_n",
                                   "qmm_tensor",
                                   "qmm_sorted_tensor",
                                   "qmm_n_tensor",
                                   "qvm",
                                   "sum_partials",
                                   "affine_grad",
                                   "quantize_levels",
                                   "fake_quantize",
                                   "fake_quantize_backward",
                                   "fake_quantize_affine",
                                   "fake_quantize_affine_backward",
                                   "flip_bits"};
  return names[static_cast<int>(kernel)];
}

// Metal 4, whose language the others must not ask for: older systems do not know it.
constexpr bool needs_metal4(Kernel kernel) {
  return kernel == Kernel::kQmmTensor || kernel == Kernel::kQmmSortedTensor ||
         kernel == Kernel::kQmmNTensor;
}

// The metal/<name>.metal that has it: a library of its own, compiled at the first use of one of its
// kernels.
constexpr const char* library_name(Kernel kernel) {
  switch (kernel) {
    case Kernel::kQmmSorted:
      return "qmm";
    case Kernel::kQuantizeLevels:
    case Kernel::kFakeQuantize:
    case Kernel::kFakeQuantizeBackward:
      return "levels";
    case Kernel::kFakeQuantizeAffineBackward:
      return "fake_quantize_affine";
    default:
      return kernel_name(kernel);
  }
}

constexpr const char* type_name(DType type) {
  constexpr const char* names[] = {"float", "half", "bfloat"};
  return names[static_cast<int>(type)];
}

// A compiled kernel: its instance and the values of its function constants.
struct Pipeline {
  Kernel kernel;
  DType type;    // of x and y; of w and its levels in quantize and decode
  uint8_t rows;  // instance of qmv_wide; the rows of a tile of 16 bits; else 0
  bool partial;  // writes float sums that sum_partials adds up
  DType levels;  // of scales and biases
  bool has_biases;
  bool indexed;
  // Of the kernels that own a group of real weights; 0 and float for the others.
  uint8_t group_words = 0;
  Rule rule = Rule::kMinMax;
  DType other = DType::kFloat;  // of fake-quantized weights and their gradient
  bool has_importance = false;

  constexpr uint32_t key() const {
    return static_cast<uint32_t>(kernel) | static_cast<uint32_t>(type) << 5 |
           static_cast<uint32_t>(levels) << 7 | static_cast<uint32_t>(partial) << 9 |
           static_cast<uint32_t>(has_biases) << 10 | static_cast<uint32_t>(indexed) << 11 |
           static_cast<uint32_t>(group_words) << 12 | static_cast<uint32_t>(rule) << 15 |
           static_cast<uint32_t>(other) << 17 | static_cast<uint32_t>(has_importance) << 19 |
           static_cast<uint32_t>(rows) << 20;
  }
};

struct Grid {
  uint32_t x = 1, y = 1, z = 1;
};

struct Launch {
  Pipeline pipeline;
  Grid groups;       // threadgroups
  uint32_t threads;  // per threadgroup
};

constexpr uint32_t ceil_div(uint32_t a, uint32_t b) { return (a + b - 1) / b; }
constexpr uint32_t smaller(uint32_t a, uint32_t b) { return a < b ? a : b; }

// 1, 2 or 4 words in a group.
constexpr uint32_t group_shift(int64_t group_size) {
  return group_size == 32 ? 0 : group_size == 64 ? 1 : 2;
}

// The GPU
// ---------------------------------------------------------------------------------------

// As Metal and PyTorch describe it. Families, not names, tell generations apart: "Apple A18 Pro" is
// a Mac's GPU too.
struct Gpu {
  int family;  // MTLGPUFamilyApple<n>: 7 M1, 8 M2, 9 M3 and M4, 10 M5
  uint32_t cores;
  bool tensor_ops = false;  // Metal 4's, on units of their own: the M5 and later, macOS 26.2
};
constexpr int kFirstFamily = 7;  // of a Mac
constexpr int kFirstTensorFamily = 10;

// Nothing is committed to the GPU until PyTorch synchronises, so it would idle while Python encodes
// a token (pytorch/executorch #17671: 125 to 85 ms a token with commits in between; MLX commits
// every 20 to 50 operations) *.
constexpr uint32_t kCommitLaunches = 32;

struct Product {
  uint32_t m, n, k;
  int64_t group_size;
  bool transpose;
  uint32_t batches, x_matrices, w_matrices;
  bool indexed;  // w_index and x_index say which matrices meet; else there is one of each
  bool sorted;   // w_index ascends
  DType type;    // of x and y
  DType levels;  // of scales and biases
  bool has_biases;
  uint32_t x_repeat = 0, w_repeat = 0;  // as in QmmParams
};

// Selection: rows of data, the first that fits. Numbers marked * are reasoned, not measured: no run
// on Apple hardware has checked them yet.
// ---------------------------------------------------------------------------------------

struct ProductRule {
  bool transpose;
  int min_family;
  uint32_t max_m;  // rows of x in one product
  Kernel kernel;
};

constexpr uint32_t kAnyM = ~0u;

constexpr ProductRule kProductRules[] = {
    // One row: bound by the memory that holds w, which qmv reads once in full lines.
    {true, kFirstFamily, 1, Kernel::kQmv},
    // A weight costs 3 operations to decode and M to multiply; in qmm, whose tile always has 32
    // rows,
    // 32 and its way through threadgroup memory. 8 rows are what the registers hold: 16 sums
    // and 32 values of x take 48 of 128 *.
    {true, kFirstFamily, kWideMaxM, Kernel::kQmvWide},
    // Above, a second pass over w would cost more than the idle rows of a tile *.
    {true, kFirstTensorFamily, kAnyM, Kernel::kQmmTensor},
    {true, kFirstFamily, kAnyM, Kernel::kQmm},
    {false, kFirstFamily, 1, Kernel::kQvm},
    {false, kFirstTensorFamily, kAnyM, Kernel::kQmmNTensor},
    // 2 to 8 rows of x against w [k, n] come from training steps on tiny batches only: no kernel of
    // their own. w is read once all the same.
    {false, kFirstFamily, kAnyM, Kernel::kQmmN},
};

// Can a kernel compute this product at all? Fast or not: the rules decide among those that can.
constexpr bool fits(Kernel kernel, const Product& p, const Gpu& gpu) {
  // The units round float32 to fewer bits.
  if (needs_metal4(kernel) && (!gpu.tensor_ops || p.type == DType::kFloat)) return false;
  switch (kernel) {
    case Kernel::kQmv:
      return p.transpose && p.m == 1;
    case Kernel::kQmvWide:
      return p.transpose && p.m <= kWideMaxM;
    case Kernel::kQmm:
    case Kernel::kQmmTensor:
      return p.transpose;
    case Kernel::kQmmSorted:
    case Kernel::kQmmSortedTensor:
      return p.transpose && p.m == 1 && p.indexed && p.sorted;
    case Kernel::kQvm:
      return !p.transpose && p.m == 1;
    case Kernel::kQmmN:
    case Kernel::kQmmNTensor:
      return !p.transpose;
    default:
      return false;
  }
}

// Rows that one matrix of w must get on average for qmm_sorted to beat a qmv for each row: a tile
// of 32 rows multiplies all of them whatever it is given *.
constexpr uint32_t kSortedRowsPerMatrix = 8;
constexpr Kernel kSortedKernels[] = {Kernel::kQmmSortedTensor, Kernel::kQmmSorted};

constexpr Kernel product_kernel(const Product& p, const Gpu& gpu) {
  for (const Kernel kernel : kSortedKernels) {
    if (fits(kernel, p, gpu) && p.batches / p.w_matrices >= kSortedRowsPerMatrix) return kernel;
  }
  for (const ProductRule& rule : kProductRules) {
    if (rule.transpose == p.transpose && gpu.family >= rule.min_family && p.m <= rule.max_m &&
        fits(rule.kernel, p, gpu)) {
      return rule.kernel;
    }
  }
  return Kernel::kQmm;  // not reached: the rules end with any m
}

// simdgroup matrices of bfloat: GPUs before the M3 emulate them, so that tiles of float are faster
// there *.
constexpr int kBFloatMatrixFamily = 9;

// Rows of a tile of 16 bits, 0 for tiles of float. 64 rows read w half as often as 32, of which up
// to 32 rows of x would leave half idle.
constexpr uint8_t tile_rows(DType type, uint32_t m, const Gpu& gpu) {
  if (type == DType::kFloat) return 0;
  if (type == DType::kBFloat16 && gpu.family < kBFloatMatrixFamily) return 0;
  return m <= kTileM ? kTileM : 2 * kTileM;
}

// Rows of a tile of qmm_tensor. More rows decode w less often; the cost of idle ones is small *.
constexpr uint8_t tensor_rows(uint32_t m) {
  return m <= kTileM ? kTileM : m <= 2 * kTileM ? 2 * kTileM : 4 * kTileM;
}

// How many threadgroups of 128 or 256 threads keep one core busy *: a core of the M1 and M2 holds
// 24 simdgroups of kernels this size; M3 and later give registers out dynamically and hold more.
struct FillRule {
  int min_family;
  uint32_t groups_per_core;
};
constexpr FillRule kFillRules[] = {{9, 8}, {kFirstFamily, 4}};

constexpr uint32_t groups_to_fill(const Gpu& gpu) {
  for (const FillRule& rule : kFillRules) {
    if (gpu.family >= rule.min_family) return rule.groups_per_core * gpu.cores;
  }
  return gpu.cores;
}

// Rows of k below which a split costs more in partial sums than it wins: of qvm, 8 bytes written
// and read per output against 512 / 8 bytes of w, one eighth.
constexpr uint32_t kMinSplitK = 512;
// A split starts at a whole group.
constexpr uint32_t kSplitAlign = 128;

// Terms of k in one split, such that `tiles` times the splits fill the GPU; k for no split.
constexpr uint32_t split_k(uint32_t k, uint32_t tiles, const Gpu& gpu) {
  const uint32_t wanted = groups_to_fill(gpu);
  if (tiles * 2 > wanted || k < 2 * kMinSplitK) return k;
  const uint32_t splits = smaller(ceil_div(wanted, tiles), k / kMinSplitK);
  return ceil_div(ceil_div(k, splits), kSplitAlign) * kSplitAlign;
}

// Products: qmm, gather_qmm
// ---------------------------------------------------------------------------------------

struct ProductPlan {
  Launch product;
  QmmParams params;
  uint32_t splits;  // above 1, `sum` follows
  Launch sum;
  SumParams sum_params;
};

// Instances of qmv_wide.
constexpr uint8_t kWideInstances[] = {2, 3, 4, 6, 8};

constexpr uint8_t wide_rows(uint32_t m) {
  for (const uint8_t rows : kWideInstances) {
    if (m <= rows) return rows;
  }
  return kWideMaxM;
}

// With one of the kernels that fit.
constexpr ProductPlan plan_product(const Product& p, const Gpu& gpu, Kernel kernel) {
  ProductPlan plan = {};
  plan.params = {p.m,          p.n,          p.k,       group_shift(p.group_size),
                 p.x_matrices, p.w_matrices, p.batches, p.k,
                 p.x_repeat,   p.w_repeat};
  plan.splits = 1;
  Launch& launch = plan.product;
  launch.pipeline = {kernel, p.type, 0, false, p.levels, p.has_biases, p.indexed};
  uint32_t tiles = 0;  // of kernels that can split k
  switch (launch.pipeline.kernel) {
    case Kernel::kQmv:
      launch.groups = {ceil_div(p.n, kQmvRows * kQmvSimdgroups), 1, p.batches};
      launch.threads = kQmvSimdgroups * kLanes;
      break;
    case Kernel::kQmvWide:
      launch.pipeline.rows = wide_rows(p.m);
      launch.groups = {ceil_div(p.n, wide_outputs(launch.pipeline.rows) * kWideSimdgroups), 1,
                       p.batches};
      launch.threads = kWideSimdgroups * kLanes;
      break;
    case Kernel::kQmmSorted:
      launch.pipeline.rows = tile_rows(p.type, 1, gpu);
      launch.groups = {ceil_div(p.n, kTileN), ceil_div(p.batches, kTileM), 1};
      launch.threads = kTileThreads;
      break;
    case Kernel::kQmmSortedTensor:
      launch.pipeline.rows = kTileM;
      launch.groups = {ceil_div(p.n, kTensorN), ceil_div(p.batches, kTileM), 1};
      launch.threads = kTensorSimdgroups * kLanes;
      break;
    case Kernel::kQmmTensor:
    case Kernel::kQmmNTensor: {
      const uint8_t rows = tensor_rows(p.m);
      launch.pipeline.rows = rows;
      launch.groups = {ceil_div(p.n, kTensorN), ceil_div(p.m, rows), p.batches};
      launch.threads = kTensorSimdgroups * kLanes;
      tiles = launch.groups.x * launch.groups.y * p.batches;
      break;
    }
    case Kernel::kQvm:
      launch.groups = {ceil_div(p.n, kWordBits * kLanes), 1, p.batches};
      launch.threads = kQvmSimdgroups * kLanes;
      tiles = launch.groups.x * p.batches;
      break;
    case Kernel::kQmmN:
      launch.groups = {ceil_div(p.n, kTileWideN), ceil_div(p.m, kTileM), p.batches};
      launch.threads = kTileWideThreads;
      tiles = launch.groups.x * launch.groups.y * p.batches;
      break;
    default: {
      const uint8_t rows = tile_rows(p.type, p.m, gpu);
      launch.pipeline.rows = rows;
      launch.groups = {ceil_div(p.n, kTileN), ceil_div(p.m, rows ? rows : kTileM), p.batches};
      launch.threads = kTileThreads;
      tiles = launch.groups.x * launch.groups.y * p.batches;
      break;
    }
  }
  if (tiles > 0) {
    plan.params.split_k = split_k(p.k, tiles, gpu);
    plan.splits = ceil_div(p.k, plan.params.split_k);
  }
  if (plan.splits > 1) {
    launch.groups.z *= plan.splits;
    launch.pipeline.partial = true;
    plan.sum_params = {p.batches * p.m * p.n, plan.splits};
    plan.sum.pipeline = {Kernel::kSumPartials, p.type, 0, false, p.levels, false, false};
    plan.sum.groups = {ceil_div(plan.sum_params.count, kSumThreads), 1, 1};
    plan.sum.threads = kSumThreads;
  }
  return plan;
}

constexpr ProductPlan plan_product(const Product& p, const Gpu& gpu) {
  return plan_product(p, gpu, product_kernel(p, gpu));
}

// quantize, fake_quantize and flip_bits_; dequantize, embedding, affine_grad
// ---------------------------------------------------------------------------------------

// What a kernel that owns a group is compiled for, besides the dtype of w.
struct GroupOptions {
  int64_t group_size;
  Rule rule = Rule::kMinMax;
  DType other = DType::kFloat;
  DType levels = DType::kFloat;
  bool has_importance = false;
};

constexpr Launch plan_groups(Kernel kernel,
                             const GroupParams& p,
                             DType type,
                             const GroupOptions& options) {
  return {{kernel, type, 0, false, options.levels, false, false,
           static_cast<uint8_t>(options.group_size / kWordBits), options.rule, options.other,
           options.has_importance},
          {ceil_div(p.groups, kGroupSimdgroups), 1, 1},
          kGroupSimdgroups * kLanes};
}

constexpr Launch plan_flip_bits(const FlipParams& p, int64_t group_size) {
  return {{Kernel::kFlipBits, DType::kFloat, 0, false, DType::kFloat, false, false,
           static_cast<uint8_t>(group_size / kWordBits)},
          {ceil_div(p.rows, kFlipSimdgroups), 1, 1},
          kFlipSimdgroups * kLanes};
}

// `rows` of the result: of embedding, the number of indices; of dequantize, one.
constexpr Launch plan_decode(
    const DecodeParams& p, uint32_t rows, DType type, bool has_biases, bool indexed) {
  return {{Kernel::kDecode, type, 0, false, type, has_biases, indexed},
          {ceil_div(p.words * 4, kDecodeThreads), rows, 1},
          kDecodeThreads};
}

constexpr Launch plan_affine_grad(const AffineGradParams& p, DType type, bool indexed) {
  return {{Kernel::kAffineGrad, type, 0, false, DType::kFloat, false, indexed},
          {ceil_div(p.columns, kWordBits * kLanes), ceil_div(p.rows, kGradRows * kGradSimdgroups),
           p.w_matrices},
          kGradSimdgroups * kLanes};
}

// What the shaders rely on
// ---------------------------------------------------------------------------------------

static_assert(kSplitAlign % 128 == 0 && kSplitAlign % kTileK == 0, "a split is whole groups");
static_assert(kTileM * 4 == kTileThreads && kTileK * 8 == kTileWideThreads && kTileK == 32,
              "threads to a row");
static_assert(kQvmSimdgroups == 8, "qvm reduces 8 of a lane's sums at a time");
static_assert(static_cast<int>(Kernel::kFlipBits) < 32, "5 bits of a key");
static_assert(4 * kTileM < 256, "8 bits of a key");
static_assert(kTensorSimdgroups * kLanes == 2 * kTensorN && kTensorN == 2 * kWordBits &&
                  kTensorSimdgroups * kLanes == kTileThreads,
              "threads to a row");
static_assert(sizeof(QmmParams) == 40 && sizeof(AffineGradParams) == 40, "no padding");

}  // namespace onebit::mps

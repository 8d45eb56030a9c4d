// Which CUDA kernel runs, compiled how, on which grid: decided here, in pure C++ that every
// platform compiles and tests; launcher.cpp only carries it out.
#pragma once

#include "params.h"

namespace onebit::cuda {

// Kernels and what they are compiled for
// ---------------------------------------------------------------------------------------

enum class Source : uint8_t {
  kRows,
  kB1,
  kHmma,
  kWgmma,
  kTiles,
  kGatherN,
  kAffineGrad,
  kLevels,
  kFlipBits
};

constexpr const char* source_name(Source source) {
  constexpr const char* names[] = {"rows",     "b1",          "hmma",   "wgmma",    "tiles",
                                   "gather_n", "affine_grad", "levels", "flip_bits"};
  return names[static_cast<int>(source)];
}

// Products and sums may be fused to multiply-adds, except where levels and bits are to be the
// CPU's.
constexpr bool contracts(Source source) {
  return source != Source::kLevels && source != Source::kFlipBits && source != Source::kRows;
}

enum class Kernel : uint8_t {
  kQuantize,
  kDecode,
  kSplit,
  kSumPartials,
  kPlanes,
  kB1,
  kHmma,
  kWgmma,
  kTiles,
  kGatherN,
  kAffineGrad,
  kQuantizeLevels,
  kFakeQuantize,
  kFakeQuantizeBackward,
  kFakeQuantizeAffine,
  kFakeQuantizeAffineBackward,
  kFlipBits,
};

struct KernelInfo {
  const char* name;
  Source source;
};
constexpr KernelInfo kKernels[] = {
    {"quantize", Source::kRows},
    {"decode", Source::kRows},
    {"split", Source::kRows},
    {"sum_partials", Source::kRows},
    {"planes", Source::kB1},
    {"b1", Source::kB1},
    {"hmma", Source::kHmma},
    {"wgmma", Source::kWgmma},
    {"tiles", Source::kTiles},
    {"gather_n", Source::kGatherN},
    {"affine_grad", Source::kAffineGrad},
    {"quantize_levels", Source::kLevels},
    {"fake_quantize", Source::kLevels},
    {"fake_quantize_backward", Source::kLevels},
    {"fake_quantize_affine", Source::kLevels},
    {"fake_quantize_affine_backward", Source::kLevels},
    {"flip_bits", Source::kFlipBits},
};
constexpr const KernelInfo& info_of(Kernel kernel) { return kKernels[static_cast<int>(kernel)]; }

constexpr const char* type_name(DType type) {
  constexpr const char* names[] = {"Float", "Half", "BFloat"};
  return names[static_cast<int>(type)];
}

// What a source is compiled for; common.cuh says what the macros mean, and each kernel its own.
struct Variant {
  DType x = DType::kFloat, levels = DType::kFloat, out = DType::kFloat;
  uint8_t group_words = 4;
  bool has_biases = true;
  // of products
  uint8_t m = 0;  // rows of x that b1 is written for
  uint8_t warps = 0, row_tiles = 0, column_tiles = 0;
  bool whole = false;
  uint16_t rows = 0;
  uint8_t consumers = 0, stages = 0, steps = 0;
  bool partial = false;
  // of levels
  Rule rule = Rule::kMinMax;
  bool has_importance = false;

  constexpr uint64_t key() const {
    uint64_t key = uint64_t(x) << 4 | uint64_t(levels) << 2 | uint64_t(out);
    key = key << 3 | group_words;
    key = key << 1 | has_biases;
    key = key << 3 | m;
    key = key << 5 | warps;
    key = key << 3 | row_tiles;
    key = key << 3 | column_tiles;
    key = key << 1 | whole;
    key = key << 9 | rows;
    key = key << 3 | consumers;
    key = key << 4 | stages;
    key = key << 3 | steps;
    key = key << 1 | partial;
    key = key << 2 | uint64_t(rule);
    return key << 1 | has_importance;
  }
};

// Calls emit(macro, text) and emit(macro, number).
template <class Emit>
constexpr void for_each_define(const Variant& v, const Emit& emit) {
  emit("ONEBIT_X", type_name(v.x));
  emit("ONEBIT_LEVELS", type_name(v.levels));
  emit("ONEBIT_OUT", type_name(v.out));
  emit("ONEBIT_X_IS_HALF", int(v.x == DType::kHalf));
  emit("ONEBIT_GROUP_WORDS", int(v.group_words));
  emit("ONEBIT_HAS_BIASES", int(v.has_biases));
  emit("ONEBIT_M", int(v.m));
  emit("ONEBIT_WARPS", int(v.warps));
  emit("ONEBIT_ROW_TILES", int(v.row_tiles));
  emit("ONEBIT_COLUMN_TILES", int(v.column_tiles));
  emit("ONEBIT_WHOLE", int(v.whole));
  emit("ONEBIT_ROWS", int(v.rows));
  emit("ONEBIT_CONSUMERS", int(v.consumers));
  emit("ONEBIT_STAGES", int(v.stages));
  emit("ONEBIT_STEPS", int(v.steps));
  emit("ONEBIT_PARTIAL", int(v.partial));
  emit("ONEBIT_RULE", int(v.rule));
  emit("ONEBIT_HAS_IMPORTANCE", int(v.has_importance));
}

struct Grid {
  uint32_t x = 1, y = 1, z = 1;
};

struct Launch {
  Kernel kernel;
  Variant variant;
  Grid grid;
  uint32_t threads;
  uint32_t shared_bytes = 0;
  bool early = false;  // may start while the launch before it ends: the kernel waits for it itself
};

constexpr uint64_t ceil_div(uint64_t a, uint64_t b) { return (a + b - 1) / b; }
constexpr uint32_t smaller(uint64_t a, uint64_t b) { return uint32_t(a < b ? a : b); }
constexpr uint32_t larger(uint64_t a, uint64_t b) { return uint32_t(a > b ? a : b); }

struct Gpu {
  int architecture;  // 80, 90, 100, ...
  uint32_t multiprocessors;
};
// mma with bfloat16, and bf16 conversions: older devices run the composite.
constexpr int kOldestArchitecture = 80;

// quantize, dequantize, embedding, float32 x in parts, partial sums
// ---------------------------------------------------------------------------------------

constexpr uint32_t type_size(DType type) { return type == DType::kFloat ? 4 : 2; }

constexpr Launch plan_quantize(int64_t groups, DType type, int group_words) {
  const uint64_t vectors = groups * group_words * kWordBits * type_size(type) / 16;
  Launch launch = {Kernel::kQuantize, {type, type, type}, {}, kBlockThreads};
  launch.variant.group_words = group_words;
  launch.grid.x = ceil_div(vectors, kQuantizeChunks * kBlockThreads);
  return launch;
}

// `rows` of the result: of embedding, the number of indices; of dequantize, one.
constexpr Launch plan_decode(
    const DecodeArgs& args, int64_t rows, DType levels, DType out, int group_words) {
  Launch launch = {Kernel::kDecode, {levels, levels, out}, {}, kBlockThreads};
  launch.variant.group_words = group_words;
  launch.variant.has_biases = args.biases != nullptr;
  launch.grid.x = args.blocks_per_row * rows;
  return launch;
}
constexpr uint32_t decode_blocks(int64_t words, DType out) {
  return ceil_div(words * kWordBits * type_size(out) / 16, kBlockThreads * kDecodeChunks);
}

constexpr Launch plan_split(const SplitArgs& args, int group_words) {
  Launch launch = {Kernel::kSplit, {}, {}, kBlockThreads};
  launch.variant.group_words = group_words;
  launch.grid.x =
      ceil_div(uint64_t(args.sum_rows) * args.k / kWordBits / group_words, kBlockThreads / 32);
  return launch;
}

constexpr Launch plan_sum(int64_t count, DType out) {
  Launch launch = {Kernel::kSumPartials, {out, out, out}, {}, kBlockThreads};
  launch.grid.x = ceil_div(count, kBlockThreads);
  launch.early = true;
  return launch;
}

// Products
// ---------------------------------------------------------------------------------------

struct Product {
  uint32_t m, n, k;
  int group_words;
  bool transpose;
  uint32_t batches;
  bool indexed;  // x_index and w_index say which matrices meet; else there is one of each
  DType x, levels;
  bool has_biases;
};

enum class Way : uint8_t {
  kB1,
  kHmma,
  kWgmma,
  kTiles,
  kGatherN,
  kDense,  // dequantize, then the matrix product of torch
};

struct ProductPlan {
  Way way;
  Launch planes;  // of b1
  Launch product;
  uint32_t splits = 1, steps = 0;  // of tiles: above one split, partial sums are added up
};

// popc of 128 bits in one instruction; later architectures emulate it. float32 x adds up in
// float64, which only the data-center devices do at half rate.
constexpr bool has_b1(const Gpu& gpu, DType x) {
  const int a = gpu.architecture;
  return x == DType::kFloat ? a == 80 || a == 90 : a >= 80 && a < 100;
}

// Of groups of 64 and 32 planes are multiplied twice and four times, and decoding wins sooner
// (H100, 14336 x 4096, 4 rows: 16 and 25 us, hmma 13 and 19 us; float32, 3 rows: 25 and 38 us, hmma
// 50 and 47 us, 4 rows of groups of 32: 50 us).
constexpr uint32_t b1_max_m(int group_words, DType x) {
  if (group_words == 4) return 4;
  return x != DType::kFloat ? 2 : group_words == 2 ? 4 : 3;
}
// What counts are waves of blocks times the turns that a warp takes, four blocks of columns each:
// every turn waits for memory once. Registers leave room for so many warps.
constexpr uint32_t kB1Warps[] = {4, 8, 14};
constexpr uint32_t kB1WarpsInFlight = 42;
constexpr uint32_t b1_warps(uint32_t n, uint32_t k, const Gpu& gpu) {
  uint64_t least = ~0ull;
  uint32_t best = 0;
  for (const uint32_t warps : kB1Warps) {
    const uint64_t waves =
        ceil_div(ceil_div(n, 16), uint64_t(kB1WarpsInFlight / warps) * gpu.multiprocessors);
    const uint64_t turns = waves * ceil_div(k / 512, warps);
    if (turns < least) least = turns, best = warps;
  }
  return best;
}
// Above, a tile of 32 rows in wgmma is faster (H100, 14336 x 4096: 15 us for 32 rows, 19 us here
// for 16, 13 us for 8); of float32 x already above what b1 takes.
constexpr uint32_t kHmmaMaxM = 8;
constexpr uint32_t kHmmaMaxFloatM = 4;
// Where tiles cannot be taken either, 16 rows at a time share the weights through L2 up to here:
// dequantize and cuBLAS move 16 bits a weight twice, whatever m is (tried on an H100, 14336 x 4096:
// 64 rows take 65 and 93 us, 128 rows 124 and 95 us).
constexpr uint32_t kHmmaAloneMaxM = 32;
constexpr uint32_t kHmmaAloneMaxWideM = 64;
// With two tiles of W a warp decodes half as often where x has two, and reads half of x: 65 us,
// with one 111 us. Not of groups of 32, nor of float32 x, which decoding takes longer.
constexpr bool two_tiles(const Product& p, const Gpu& gpu) {
  return gpu.architecture != 90 && !p.indexed && p.x != DType::kFloat && p.m > 8 &&
         p.group_words > 1;
}
// Above, decoding anew for every 256 rows of x costs more than one pass that writes 16-bit weights
// (H100: 0.78 against 0.80 of cuBLAS at 2048 rows). float32 has no such limit: three bfloat16
// products are three times as fast as one in float32.
constexpr uint32_t kWgmmaMaxM = 1024;

// Tiles of mma.sync, between hmma and dequantize with cuBLAS (H200 as sm_80, 14336 x 4096: 32 rows
// take 23 us, 64 rows 39 us where hmma takes 65, 128 rows 54 us, 256 rows 108 us where the other
// way takes about 95).
constexpr uint32_t kHmmaTilesMaxM = 16, kTilesMaxM = 128;

// Words in flight hide the latency of memory: more warps for a long k, where there are few blocks.
constexpr uint32_t kLongK = 8192;
// Blocks of 16 rows that fill a device twice: then a warp takes two tiles, and x is read half as
// often.
constexpr uint32_t kWideBlocks = 4;

constexpr uint32_t kGridYLimit = 65535;

constexpr ProductPlan plan_b1(const Product& p, const Gpu& gpu, Variant v) {
  v.m = p.m;
  v.warps = b1_warps(p.n, p.k, gpu);
  v.row_tiles = 1;
  ProductPlan plan = {Way::kB1, {}, {}};
  plan.planes = {Kernel::kPlanes, v, {uint32_t(ceil_div(p.k / 128 * p.m, 4)), 1, 1}, 128};
  plan.product = {Kernel::kB1, v, {uint32_t(ceil_div(p.n, 16)), 1, 1}, v.warps * 32u};
  plan.planes.early = plan.product.early = true;
  return plan;
}

constexpr ProductPlan plan_hmma(const Product& p, const Gpu& gpu, Variant v) {
  const bool floats = p.x == DType::kFloat;
  v.whole = p.k / kWordBits / p.group_words % 4 == 0;
  v.column_tiles = floats || p.m <= 8 ? 1 : 2;
  const bool wide = ceil_div(p.n, 16) >= kWideBlocks * gpu.multiprocessors;
  v.row_tiles = !floats && (wide || two_tiles(p, gpu)) ? 2 : 1;
  v.warps = v.row_tiles == 2 ? 4 : p.k >= kLongK && v.column_tiles == 1 ? 14 : 8;
  ProductPlan plan = {Way::kHmma, {}, {}};
  plan.product = {Kernel::kHmma,
                  v,
                  {uint32_t(ceil_div(p.m, 8 * v.column_tiles)) * p.batches,
                   uint32_t(ceil_div(p.n, 16 * v.row_tiles)), 1},
                  v.warps * 32u,
                  0,
                  true};
  return plan;
}

constexpr uint32_t wgmma_rows(const Product& p, const Gpu& gpu) {
  const uint32_t most = p.x != DType::kFloat ? 256 : p.group_words == 4 ? 128 : 64;
  uint32_t rows = 32;
  while (rows < most && rows < p.m) rows *= 2;
  // A tile of 128 rows takes 0.53 of the time of one of 256 (H100): what counts are waves of tiles.
  const auto waves = [&](uint32_t tile) {
    return ceil_div(ceil_div(p.m, tile) * ceil_div(p.n, 128), gpu.multiprocessors);
  };
  if (rows == 256 && waves(128) * 53 < waves(256) * 100) rows = 128;
  return rows;
}

// Partial sums cost a second launch: only where more than half of the device would idle, and a
// split keeps 1024 columns.
constexpr void split_k(
    ProductPlan& plan, uint64_t tiles, uint32_t k, uint32_t steps_of_stage, const Gpu& gpu) {
  const uint32_t stages = k / (128 * steps_of_stage);
  if (tiles * 2 <= gpu.multiprocessors && k >= 2048) {
    plan.splits = smaller(gpu.multiprocessors / tiles, k / 1024);
  }
  plan.steps = ceil_div(stages, plan.splits);
  plan.splits = ceil_div(stages, plan.steps);
}

constexpr uint32_t kWgmmaShared = 224 * 1024;  // of a block; 227 KB are there

constexpr ProductPlan plan_wgmma(const Product& p, const Gpu& gpu, Variant v) {
  v.rows = wgmma_rows(p, gpu);
  v.consumers = 2;
  const uint32_t parts = p.x == DType::kFloat ? 3 : 1;
  v.steps = parts == 1 && v.rows <= 64 && p.k % 512 == 0 ? 4 : 1;
  const uint32_t stage = v.steps * (parts * 2 * v.rows * 128 + 64 * v.consumers * 16);
  v.stages = smaller(8, (kWgmmaShared - 1024) / stage);
  ProductPlan plan = {Way::kWgmma, {}, {}};
  split_k(plan, ceil_div(p.m, v.rows) * ceil_div(p.n, 64 * v.consumers), p.k, v.steps, gpu);
  v.partial = plan.splits > 1;
  plan.product = {
      Kernel::kWgmma,
      v,
      {uint32_t(ceil_div(p.m, v.rows)), uint32_t(ceil_div(p.n, 64 * v.consumers)), plan.splits},
      128u * (v.consumers + 1),
      1024 + v.stages * stage,
      true};
  return plan;
}

// Without wgmma. Two blocks of the smaller tiles fit a multiprocessor.
constexpr uint32_t tiles_shared(int architecture) {
  return architecture == 80                          ? 160 * 1024
         : architecture == 90 || architecture == 100 ? 200 * 1024
                                                     : 96 * 1024;
}
constexpr ProductPlan plan_tiles(const Product& p, const Gpu& gpu, Variant v) {
  v.rows = p.m <= 32 ? 32 : p.m <= 64 ? 64 : 128;
  const uint32_t stage = v.rows * 256 + kTileOutputs * 16;
  v.stages = smaller(4, tiles_shared(gpu.architecture) / (v.rows == 128 ? 1 : 2) / stage);
  ProductPlan plan = {Way::kTiles, {}, {}};
  split_k(plan, ceil_div(p.m, v.rows) * ceil_div(p.n, kTileOutputs), p.k, 1, gpu);
  v.partial = plan.splits > 1;
  plan.product = {
      Kernel::kTiles,
      v,
      {uint32_t(ceil_div(p.m, v.rows)), uint32_t(ceil_div(p.n, kTileOutputs)), plan.splits},
      kTileThreads,
      v.stages * stage,
      true};
  return plan;
}

constexpr ProductPlan plan_product(const Product& p, const Gpu& gpu) {
  const Variant v = {p.x, p.levels, p.x, uint8_t(p.group_words), p.has_biases};
  if (!p.transpose) {
    if (!p.indexed) return {Way::kDense, {}, {}};
    ProductPlan plan = {Way::kGatherN, {}, {}};
    plan.product = {Kernel::kGatherN,
                    v,
                    {p.m * p.batches, uint32_t(ceil_div(p.n, kWordBits * 32)), 1},
                    kBlockThreads};
    return plan;
  }
  if (!p.indexed && p.m <= b1_max_m(p.group_words, p.x) && p.k % 512 == 0 && has_b1(gpu, p.x)) {
    return plan_b1(p, gpu, v);
  }
  const bool floats = p.x == DType::kFloat, whole = p.k % 128 == 0;
  const bool wgmma = gpu.architecture == 90 && whole;
  const bool tiles =
      gpu.architecture != 90 && whole && !floats && ceil_div(p.n, kTileOutputs) <= kGridYLimit;
  const uint32_t most = wgmma               ? (floats ? kHmmaMaxFloatM : kHmmaMaxM)
                        : tiles             ? kHmmaTilesMaxM
                        : two_tiles(p, gpu) ? kHmmaAloneMaxWideM
                                            : kHmmaAloneMaxM;
  if (p.indexed || (p.m <= most && ceil_div(p.n, 16) <= kGridYLimit)) return plan_hmma(p, gpu, v);
  if (wgmma && (p.m <= kWgmmaMaxM || floats)) return plan_wgmma(p, gpu, v);
  if (tiles && p.m <= kTilesMaxM) return plan_tiles(p, gpu, v);
  return {Way::kDense, {}, {}};
}

// affine_grad, levels, flip_bits_
// ---------------------------------------------------------------------------------------

constexpr Launch plan_affine_grad(const AffineGradArgs& args,
                                  int64_t w_matrices,
                                  DType x,
                                  int group_words) {
  Launch launch = {Kernel::kAffineGrad, {x, x, x}, {}, kGradWarps * 32};
  launch.variant.group_words = group_words;
  launch.grid = {uint32_t(ceil_div(args.rows, kGradRows * kGradWarps) * w_matrices),
                 uint32_t(ceil_div(args.columns, kWordBits * 32)), 1};
  return launch;
}

struct GroupOptions {
  int group_words;
  Rule rule = Rule::kMinMax;
  DType other = DType::kFloat;  // of fake-quantized weights and their gradient
  DType levels = DType::kFloat;
  bool has_importance = false;
};

constexpr Launch plan_groups(Kernel kernel,
                             int64_t groups,
                             DType type,
                             const GroupOptions& options) {
  Launch launch = {kernel, {type, options.levels, options.other}, {}, kGroupWarps * 32};
  launch.variant.group_words = options.group_words;
  launch.variant.rule = options.rule;
  launch.variant.has_importance = options.has_importance;
  launch.grid.x =
      ceil_div(groups, kGroupWarps * groups_of_warp(options.rule, options.has_importance));
  return launch;
}

constexpr Launch plan_flip_bits(const FlipArgs& args, int group_words) {
  Launch launch = {Kernel::kFlipBits, {}, {}, kFlipWarps * 32};
  launch.variant.group_words = group_words;
  launch.grid.x = ceil_div(args.rows, kFlipWarps);
  return launch;
}

}  // namespace onebit::cuda

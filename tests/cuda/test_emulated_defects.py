"""Defects made in the shipped .cu files: the emulated GPU must report them, or results be wrong."""

from dataclasses import dataclass

import emulated_calls as gpu
import emulator
import pytest
import reference
import torch
from helpers import assert_as_accurate_as_torch, make_weights, to_numpy, torch_qmm
from test_emulated import A100, BFLOAT, FLOAT, HALF, Product, same

ops = torch.ops.onebit


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


@dataclass
class Mutant:
    why: str
    file: str
    before: str
    after: str
    case: Product
    report: str | None = None  # None: only the comparison finds it


B1 = Product("", "b1", 3, 24, 1024)
OUTLIER = Product("", "b1", 2, 20, 1024, outlier=2.0**14)
HMMA = Product("", "hmma", 13, 40, 448, HALF, FLOAT, 64, gpu=A100)
PARTS = Product("", "hmma", 5, 24, 512, FLOAT, gpu=A100)
TILES = Product("", "tiles", 20, 140, 1152, HALF, gpu=A100)
WGMMA = Product("", "wgmma", 20, 64, 1920, HALF, order="random")
WPARTS = Product("", "wgmma", 5, 130, 384, FLOAT, HALF, order="random")
STEPS = Product("", "wgmma", 33, 130, 1024, BFLOAT)

MUTANTS = [
    Mutant("planes are read before they are ready", "b1.cu",
           "if (block == uint32_t(warp) * 4) wait_for_previous();", "", B1, "uninitialised"),
    Mutant("no barrier before warps add up", "b1.cu", "  __syncthreads();\n", "", B1,
           "data race"),
    Mutant("a shuffle of the wrong lanes", "b1.cu", "__shfl_xor_sync(kAll, v, 2)",
           "__shfl_xor_sync(kAll, v, 4)", B1),
    Mutant("a plane of the wrong lane", "b1.cu", "lane == (plane & 7) * 4 + i",
           "lane == (plane & 7) + 8 * i", B1),
    Mutant("planes of one octet missing", "b1.cu", "for (int h = 0; h < kOctets; h++) p.planes",
           "for (int h = 1; h < kOctets; h++) p.planes", B1, "uninitialised|never written"),
    Mutant("an outlier is not noticed", "b1.cu", "inexact <= kBlock / 2", "inexact <= kBlock",
           OUTLIER),
    Mutant("a row past the end is stored", "b1.cu", "if (row0 + n >= p.n) continue;",
           "if (row0 + n > p.n) continue;", B1, "data race|out-of-bounds"),
    Mutant("weights past the end are read", "b1.cu", "min(row0 + r * 16 + h * 8 + g, p.n - 1)",
           "row0 + r * 16 + h * 8 + g", B1, "out-of-bounds"),
    Mutant("columns of a fragment swapped", "hmma.cu", "c * 8 + 2 * t + (e & 1)",
           "c * 8 + t + 4 * (e & 1)", HMMA),
    Mutant("upper and lower rows of A swapped", "hmma.cu",
           "decode(low, i + 2 * G, form[r][0].is_signed)",
           "decode(high, i + 2 * G, form[r][0].is_signed)", HMMA),
    Mutant("a rest of groups read as whole", "hmma.cu",
           "scale[r][h].load(scales + first, groups - group0);",
           "scale[r][h].load(scales + first);", HMMA, "out-of-bounds|misaligned"),
    Mutant("rows of x past the end are read", "hmma.cu", "inside && m < p.m", "inside", HMMA,
           "out-of-bounds"),
    Mutant("a vector that is not aligned", "hmma.cu", "* kGroupSize + t * 8 * G,",
           "* kGroupSize + t * 8 * G + 1,", HMMA, "misaligned vector of 16 bytes"),
    Mutant("a warp returns before a product", "hmma.cu",
           "  float out[kRowTiles][kTiles][4] = {};",
           "  if (lane == 31) return;\n  float out[kRowTiles][kTiles][4] = {};", HMMA,
           "divergence"),
    Mutant("a part of float32 taken twice", "common.cuh",
           "v - __uint_as_float(__float_as_uint(v) & 0xffff0000u)", "v", PARTS),
    Mutant("a stage read before its copy ends", "tiles.cu", "wait_for_copies<kStages - 2>();",
           "wait_for_copies<kStages - 1>();", TILES, "uninitialised"),
    Mutant("a stage read before others' copies end", "tiles.cu",
           "__syncthreads();  // the stage is there for all", "//", TILES,
           "data race|uninitialised"),
    Mutant("y overwrites stages that are read", "tiles.cu",
           "wait_for_copies<0>();\n  __syncthreads();", "wait_for_copies<0>();", TILES,
           "data race"),
    Mutant("parts of x not swapped back", "tiles.cu", "(2 * f + part ^ swap) << 4",
           "(2 * f + part) << 4", TILES),
    Mutant("the last step left out", "tiles.cu", "for (uint32_t i = 0; i < steps; i++) {",
           "for (uint32_t i = 0; i + 1 < steps; i++) {", TILES),
    Mutant("x is not waited for", "tiles.cu", "  wait_for_previous();\n", "", TILES,
           "uninitialised"),
    Mutant("a full stage is not waited for", "wgmma.cu",
           "    barrier_wait(&full[s], i / kStages & 1);\n", "", WGMMA, "uninitialised"),
    Mutant("an empty stage is not waited for", "wgmma.cu",
           "if (i >= kStages) barrier_wait(&empty[s], i / kStages - 1 & 1);", "", WGMMA,
           "uninitialised|more arrivals"),
    Mutant("the wrong parity", "wgmma.cu", "i / kStages - 1 & 1", "i / kStages & 1", WGMMA,
           "divergence|uninitialised|more arrivals"),
    Mutant("a stage is never given back", "wgmma.cu",
           "barrier_arrive(&empty[(i - 1) % kStages]);", "", WGMMA, "divergence: .*at wait"),
    Mutant("more bytes expected than come", "wgmma.cu", "barrier_expect(&full[s], kStageBytes)",
           "barrier_expect(&full[s], kStageBytes + 16)", WGMMA, "divergence: .*at wait"),
    Mutant("registers of A overwritten too early", "wgmma.cu", "wgmma_wait<1>(a[half]);",
           "wgmma_wait<2>(a[half]);", STEPS),
    Mutant("a stage given back too early", "wgmma.cu", "step == 0 && half == 1 && i > 0",
           "step == 0 && half == 0 && i > 0", WGMMA, "uninitialised"),
    Mutant("sums read before the last product", "wgmma.cu",
           "  wgmma_wait<0>(a[0]);\n  wgmma_wait<0>(a[1]);\n  ONEBIT_UNROLL\n",
           "  ONEBIT_UNROLL\n", STEPS),
    Mutant("words of the wrong part of a row", "wgmma.cu", "step ^ (line >> 1 & 3)",
           "step ^ (line & 3)", STEPS),
    Mutant("stages not aligned for the swizzle", "wgmma.cu",
           "uint8_t* shared = unaligned + (1024 - (shared_address(unaligned) & 1023)) % 1024;",
           "uint8_t* shared = unaligned + 128;", STEPS, "a box at byte"),
    Mutant("barriers used before they are made", "wgmma.cu",
           "    publish_barriers();\n  }\n  __syncthreads();", "    publish_barriers();\n  }",
           WGMMA, "data race|uninitialised"),
    Mutant("y overwrites stages that are read", "wgmma.cu",
           "(shared);\n  barrier_of_some<128 * kConsumers>();", "(shared);", STEPS, "data race"),
    Mutant("the fence forgotten", "wgmma.cu",
           "wgmma_fence();\n          ONEBIT_UNROLL\n          for (int j",
           "ONEBIT_UNROLL\n          for (int j", STEPS, "without a fence"),
    Mutant("sums of x read before they are ready", "wgmma.cu",
           "  if constexpr (kParts == 3) wait_for_previous();  // so are the sums\n", "", WPARTS,
           "uninitialised"),
]  # fmt: skip


@pytest.mark.parametrize("mutant", MUTANTS, ids=[f"{m.file}: {m.why}" for m in MUTANTS])
def test_a_defect_in_a_product_is_found(mutant):
    x, packed, scales, biases, group_size = arguments = mutant.case.arguments()
    changes = {mutant.file: (mutant.before, mutant.after)}
    if mutant.report:
        with pytest.raises(emulator.EmulatorError, match=mutant.report):
            mutant.case.run(arguments, changes=changes)
        return
    y = mutant.case.run(arguments, changes=changes)
    exact = reference.qmm(*map(to_numpy, (x, packed, scales, biases)), group_size, True)
    with pytest.raises(AssertionError):
        assert_as_accurate_as_torch(y, torch_qmm(*arguments), exact)


def quantized(run):
    return same(gpu.quantize(w := torch.randn(11, 384).to(BFLOAT), 128, run), ops.quantize(w, 128))


def embedded(run):
    coded = make_weights(7, 384)
    rows = gpu.decode(*coded, 128, torch.tensor([6, 9]), run=run)
    return same([rows[:1]], [ops.embedding(torch.tensor([6]), *coded, 128)])


def leveled(run):
    w, coded = torch.randn(9, 128), [torch.empty(9, 4, dtype=torch.int32), *torch.empty(2, 9, 1)]
    outputs = dict(zip(("packed", "first", "second"), coded, strict=True))
    gpu.on_groups("quantize_levels", w, 128, outputs, rule="optimal", run=run)
    return same(coded, ops.quantize_levels(w, "optimal", 128))


def multiplied_by_columns(run):
    x, experts, chosen = (
        torch.randn(1, 2, 16),
        make_weights(1, 16, 64, group_size=64),
        torch.zeros(1).long(),
    )
    y = gpu.gathered(x, experts[0], *experts[1:], chosen, chosen, 64, False, run)
    return torch.allclose(y, x @ ops.dequantize(*experts, 64), rtol=1e-4, atol=1e-4)


def flipped(run):
    bits, error, moments = torch.rand(5, 64) > 0.5, torch.randn(5, 64), torch.eye(64) + 0.1
    expected, scales = bits.clone(), torch.rand(5, 1)
    changes, _ = gpu.flip_bits(bits, error, scales, moments, 0, 64, 64, run)
    return same([changes], [ops.flip_bits_(expected, error.clone(), scales, moments, 0, 64, 64)])


def levels_moved(run):
    (packed, _, _), grad, x = make_weights(21, 96, group_size=32), *torch.randn(2, 5, 96)
    found = gpu.affine_grad(grad[:, :21].contiguous(), x, packed, 32, run=run)
    exact = ops.affine_grad(grad[:, :21].contiguous(), x, packed, None, None, 32)
    return all(torch.allclose(f, e, atol=1e-4) for f, e in zip(found, exact, strict=True))


# why, file, before, after, an operator, what is reported
OTHER_MUTANTS = [
    ("groups past the end are stored", "rows.cu", "if (at < total && lane % kLanesOfGroup == 0)",
     "if (lane % kLanesOfGroup == 0)", quantized, "out-of-bounds"),
    ("words without their neighbours", "rows.cu", "for (int d = 1; d < kLanesOfWord; d *= 2)",
     "for (int d = 2; d < kLanesOfWord; d *= 2)", quantized, None),
    ("an index that is not checked", "rows.cu", "(row >= 0 && row < p.rows)", "row >= 0", embedded,
     "out-of-bounds"),
    ("no barrier before sorted groups are summed", "levels.cu",
     "__syncthreads();\n  if (threadIdx.x < kCuts) sorted.sum_up",
     "if (threadIdx.x < kCuts) sorted.sum_up", leveled, "data race|uninitialised"),
    ("a barrier that some warps miss", "levels.cu",
     "__syncthreads();\n  if (threadIdx.x < kCuts) sorted.average",
     "if (threadIdx.x < 224) __syncthreads();\n  if (threadIdx.x < kCuts) sorted.average", leveled,
     "divergence"),
    ("the last group is written by several warps", "levels.cu",
     "warp * turns + turn >= p.groups", "false", leveled, "data race"),
    ("sums overwritten while they are read", "gather_n.cu", "    __syncthreads();\n  }\n", "  }\n",
     multiplied_by_columns, "data race"),
    ("the change of another column", "flip_bits.cu", "__shfl_sync(kAll, d, j % 32)",
     "__shfl_sync(kAll, d, (j + 1) % 32)", flipped, None),
    ("a row past the end", "affine_grad.cu", "min(row0 + r, p.rows - 1)", "row0 + r", levels_moved,
     "out-of-bounds"),
]  # fmt: skip


@pytest.mark.parametrize("why, file, before, after, works, report", OTHER_MUTANTS)
def test_a_defect_elsewhere_is_found(why, file, before, after, works, report):
    run = gpu.Options(changes={file: (before, after)})
    assert works(gpu.Options())
    if report is None:
        assert not works(run)
        return
    with pytest.raises(emulator.EmulatorError, match=report) as found:
        works(run)
    assert f"kernels/{file}:" in str(found.value)  # and the line

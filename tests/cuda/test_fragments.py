"""The emulated instructions hold matrices as the PTX ISA documents, and compute their products."""

import emulated
import numpy as np
import plans
import pytest
import torch

OPTIONS = {
    half: (
        *(f"-DONEBIT_{name}={'Half' if half else 'BFloat'}" for name in ("X", "LEVELS", "OUT")),
        f"-DONEBIT_X_IS_HALF={int(half)}",
        "-DONEBIT_GROUP_WORDS=4",
        "-DONEBIT_HAS_BIASES=1",
    )
    for half in (False, True)
}


def run(kernel, inputs, y, *, half=False, threads=32, grid=1):
    source = str(plans.HERE / "fragments")
    launch = plans.Launch(kernel, source, (grid, 1, 1), threads, 0, False, 0, OPTIONS[half])
    emulated.launch(launch, inputs=inputs, outputs={"y": y}, numbers={})
    return y


def integers(half, *shapes):
    """Matrices of small integers, whose products are exact; as floats and as 16 bits."""
    dtype = torch.float16 if half else torch.bfloat16
    made = [torch.randint(-8, 9, shape).to(dtype) for shape in shapes]
    bits = torch.cat([m.flatten() for m in made]).view(torch.int16).numpy()
    return [m.float().numpy() for m in made], bits


@pytest.mark.parametrize("half", [False, True])
def test_a_warp_multiplies_16_by_16_by_8(half):
    (a, b), bits = integers(half, (16, 16), (16, 8))
    y = run("product_of_warp", {"x": bits}, np.empty((16, 8), np.float32), half=half)
    assert np.array_equal(y, a @ b)


def test_a_warp_counts_bits_of_16_by_128_by_8():
    bits = np.random.default_rng(0).integers(0, 2, (16 + 8, 128), dtype=np.uint32)
    words = (bits.reshape(24, 4, 32) << np.arange(32, dtype=np.uint32)).sum(-1, dtype=np.uint32)
    y = run("product_of_bits", {"packed": words}, np.empty((16, 8), np.int32))
    assert np.array_equal(y, bits[:16].astype(int) @ bits[16:].astype(int).T)


def test_a_warp_loads_four_tiles():
    tiles = np.arange(4 * 8 * 8, dtype=np.uint16).reshape(32, 8)
    y = run("tiles_of_warp", {"x": tiles}, np.empty((32, 8), np.uint16))
    assert np.array_equal(y, tiles)


@pytest.mark.parametrize("half", [False, True])
def test_a_warpgroup_multiplies_64_by_64_by_32(half):
    (a, columns), bits = integers(half, (64, 64), (32, 64))
    y = np.empty((64, 32), np.float32)
    run("product_of_warpgroup", {"x": bits}, y, half=half, threads=128)
    assert np.array_equal(y, a @ columns.T)


def test_conversions_and_bytes_are_those_of_ptx():
    i = np.arange(65536, dtype=np.uint64)
    y = run("conversions", {}, np.empty((65536, 4), np.uint32), threads=256, grid=256)
    halves = torch.from_numpy(i.astype(np.uint16).view(np.int16)).view(torch.float16)
    assert np.array_equal(y[:, 0].view(np.float32), halves.float().numpy(), equal_nan=True)
    wide = torch.from_numpy((i * 65537 + 0x1234 & 0xFFFFFFFF).astype(np.uint32).view(np.float32))
    for dtype, bits in ((torch.float16, y[:, 1] & 0xFFFF), (torch.bfloat16, y[:, 1] >> 16)):
        expected = wide.to(dtype).view(torch.int16).numpy().view(np.uint16)
        assert np.array_equal(bits, np.where(wide.isnan(), 0x7FFF, expected))  # NaN has one form
    other = torch.from_numpy((i * 40503 & 0xFFFF).astype(np.uint16).view(np.int16))
    least = torch.fmin(halves, other.view(torch.float16)).view(torch.int16).numpy().view(np.uint16)
    of_nan = (halves.isnan() & other.view(torch.float16).isnan()).numpy()
    assert np.array_equal(y[:, 2] & 0xFFFF, np.where(of_nan, 0x7FFF, least))
    assert np.array_equal(y[:, 2] >> 16, y[:, 2] & 0xFFFF)
    for half, value in enumerate((i * 2654435761, ~i * np.uint64(2246822519))):
        sign = (value & 0xFFFFFFFF) >> (8 * (i & 3) + 7) & 1
        assert np.array_equal(y[:, 3] >> 16 * half & 0xFFFF, sign * 0xFFFF)


def test_ptx_is_where_another_file_can_take_its_place():
    files = {p.name for p in emulated.KERNELS.iterdir() if "asm" in p.read_text()}
    assert files == {"instructions.cuh", "wgmma.cuh"}
    users = {p.name for p in emulated.KERNELS.iterdir() if '"wgmma.cuh"' in p.read_text()}
    assert users == {"instructions.cuh"}

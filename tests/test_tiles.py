"""Products by tile registers (AMX) are those of the AVX-512 lookups, bit for bit."""

import pytest
import torch

import torch_onebit

ops = torch.ops.onebit

pytestmark = pytest.mark.skipif(
    "amx" not in ops.cpu_isas(), reason="needs a CPU with AMX; `make test-avx512` emulates it"
)


def bits_of(values: torch.Tensor) -> torch.Tensor:
    return values.view(torch.int16 if values.element_size() == 2 else torch.int32)


def product_on(isa: str, product) -> torch.Tensor:
    before = ops.cpu_isa()
    ops.set_cpu_isa(isa)
    try:
        return product()
    finally:
        ops.set_cpu_isa(before)


def structured(m: int, k: int, dtype: torch.dtype) -> torch.Tensor:
    """Rows that each take another way through the kernels, then ordinary ones."""
    x = torch.randn(m, k)
    x[0] = 1
    x[1] = x[1].relu()
    x[2, ::50] = 3e4  # a second plane of what the step has lost
    x[3, 5] = torch.inf
    x[4, 7] = torch.nan
    x[5] *= 1e37  # multiplied value by value
    x[6] = 1e-40
    x[7] = 0
    return x.to(dtype)


BFLOAT16, FLOAT16, FLOAT32 = torch.bfloat16, torch.float16, torch.float32
# dtype of x, m, n, k, group size, dtype of levels, symmetric, why
CASES = [
    (BFLOAT16, 16, 128, 128, 128, FLOAT16, False, "one tile of rows, one group"),
    (BFLOAT16, 33, 200, 1184, 32, BFLOAT16, True, "tiles of 16 and 1 rows, a chunk of 5 groups"),
    (BFLOAT16, 31, 130, 2176, 64, FLOAT32, False, "tiles of 16, 8, 4 and 3, outputs left over"),
    (BFLOAT16, 145, 2112, 256, 128, FLOAT16, False, "two blocks of rows, two panels of outputs"),
    (FLOAT32, 8, 64, 128, 128, FLOAT16, False, "two tiles of rows in bytes"),
    (FLOAT32, 11, 130, 1184, 32, BFLOAT16, True, "half a tile register of columns; 3 rows left"),
    (FLOAT32, 145, 2112, 256, 64, FLOAT32, False, "two blocks of rows, two panels of outputs"),
    (FLOAT32, 9, 64, 8320, 128, FLOAT32, False, "chains that end in double"),
    (FLOAT16, 18, 200, 640, 128, FLOAT16, False, "float16 has tables as wide as float32"),
    (BFLOAT16, 8, 96, 128, 128, FLOAT16, False, "fewer than 128 outputs: in bytes too"),
]


@pytest.mark.parametrize(
    ("x_dtype", "m", "n", "k", "group_size", "dtype", "symmetric", "why"), CASES
)
@pytest.mark.parametrize("prepacked", [False, True])
def test_tiles_give_the_bits_of_lookups(
    x_dtype, m, n, k, group_size, dtype, symmetric, why, prepacked
):
    packed, scales, biases = torch_onebit.quantize(torch.randn(n, k), group_size)
    biases[::7] = 0  # a level of 0 meets the outliers
    scales, biases = scales.to(dtype), None if symmetric else biases.to(dtype)
    x = structured(m, k, x_dtype)
    stored = ops.prepack(packed, scales, biases, group_size)

    def product():
        if prepacked:
            form = (n, k, group_size, dtype, symmetric)
            return ops.qmm_prepacked(x, stored, *form)
        return ops.qmm(x, packed, scales, biases, group_size)

    by_tiles, by_lookups = product_on("amx", product), product_on("avx512", product)
    assert by_tiles.isnan().any() and by_tiles.isfinite().any(), why
    assert torch.equal(bits_of(by_tiles), bits_of(by_lookups)), why

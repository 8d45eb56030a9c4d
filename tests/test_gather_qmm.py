"""gather_qmm: MLX's mixture-of-experts product, for every way of naming matrices."""

import time

import pytest
import reference
import torch
from cases import MIX_IDS, MIXES
from helpers import assert_as_accurate_as_torch, make_weights, to_numpy

gather_qmm = torch.ops.onebit.gather_qmm


def torch_gather_qmm(x, packed, scales, biases, lhs, rhs, group_size, transpose=True):
    w = torch.ops.onebit.dequantize(packed, scales, biases, group_size).to(x.dtype)
    count = lambda t: torch.arange(t.shape[:-2].numel(), device=t.device).view(t.shape[:-2])
    lhs = count(x) if lhs is None else lhs.long()
    rhs = count(w) if rhs is None else rhs.long()
    lhs, rhs = torch.broadcast_tensors(lhs, rhs)
    w = w.flatten(0, -3)[rhs] if w.dim() > 2 else w.expand(*rhs.shape, *w.shape)
    x = x.flatten(0, -3)[lhs] if x.dim() > 2 else x.expand(*lhs.shape, *x.shape)
    return torch.matmul(x, w.mT if transpose else w)


def assert_gather_qmm(*args):
    expected = reference.gather_qmm(*(to_numpy(t) for t in args[:6]), *args[6:])
    assert_as_accurate_as_torch(gather_qmm(*args), torch_gather_qmm(*args), expected)


def index(*values):
    return torch.tensor(values)


INDICES = [
    # x, leading dimensions of packed, lhs, rhs, why
    ((5, 1, 128), (4,), None, index(0, 3, 3, 1, 0), "one expert per row"),
    ((5, 1, 128), (4,), None, index(0, 0, 1, 3, 3), "sorted experts"),
    ((3, 1, 128), (4,), index(0, 0, 1, 1, 2, 2), index(3, 1, 0, 2, 1, 1), "two experts per row"),
    ((3, 1, 1, 128), (4,), None, torch.tensor([[0, 3], [2, 2], [1, 0]]), "experts broadcast rows"),
    ((2, 7, 128), (4,), None, index(2, 1), "a batch of rows per expert"),
    ((6, 128), (4,), None, index(2, 1, 3), "one x for chosen experts"),
    ((2, 3, 4, 128), (2, 3), None, None, "no index counts matrices"),
    ((2, 3, 128), (2, 2), index(1, 0, 1), index(3, 3, 0), "indices count across two dimensions"),
    ((5, 1, 128), (3,), index(4, 4, 4), None, "lhs names rows, experts are counted"),
    ((3, 1, 128), (), None, None, "one matrix that is no stack"),
    ((9, 1, 128), (2,), None, torch.zeros(9, dtype=torch.int64), "all rows to one expert"),
]


@pytest.mark.parametrize("x_shape, lead, lhs, rhs, why", INDICES, ids=[row[4] for row in INDICES])
@pytest.mark.parametrize("transpose", [True, False])
def test_gather_qmm_is_as_accurate_as_torch(x_shape, lead, lhs, rhs, why, transpose, device, isa):
    rows, columns = (70, 128) if transpose else (128, 96)
    packed, scales, biases = make_weights(*lead, rows, columns, group_size=32, device=device)
    move = lambda t: None if t is None else t.to(device)
    x = torch.randn(x_shape, device=device)
    assert_gather_qmm(x, packed, scales, biases, move(lhs), move(rhs), 32, transpose)


@pytest.mark.parametrize("mix", MIXES, ids=MIX_IDS)
@pytest.mark.parametrize("transpose", [True, False])
def test_gather_qmm_takes_every_mix_of_dtypes(mix, transpose, device, isa):
    x_dtype, dtype, group_size, affine = mix
    packed, scales, biases = make_weights(
        3, 256, 256, group_size=group_size, dtype=dtype, symmetric=not affine, device=device
    )
    x = torch.randn(4, 2, 256).to(device, x_dtype)
    rhs = torch.tensor([2, 0, 2, 1], dtype=torch.int32, device=device)
    assert_gather_qmm(x, packed, scales, biases, None, rhs, group_size, transpose)


def test_sorted_indices_is_only_a_hint(device, isa):
    packed, scales, biases = make_weights(4, 64, 128, device=device)
    x = torch.randn(6, 1, 128, device=device)
    rhs = torch.tensor([0, 0, 1, 3, 3, 3], device=device)
    args = (x, packed, scales, biases, None, rhs, 128)
    assert torch.equal(gather_qmm(*args, sorted_indices=True), gather_qmm(*args))


@pytest.mark.parametrize(
    "x_shape, experts, rhs", [((0, 1, 128), 4, []), ((2, 0, 128), 4, [1, 2]), ((0, 3, 128), 0, [])]
)
def test_gather_qmm_of_nothing_is_empty(x_shape, experts, rhs, device, isa):
    packed, scales, biases = make_weights(experts, 64, 128, device=device)
    rhs = torch.tensor(rhs, dtype=torch.int64, device=device)
    y = gather_qmm(torch.randn(x_shape, device=device), packed, scales, biases, None, rhs, 128)
    assert y.shape == (len(rhs), x_shape[1], 64)


def test_gather_qmm_does_not_depend_on_the_number_of_threads(isa):
    packed, scales, biases = make_weights(5, 320, 512)
    x, rhs = torch.randn(40, 1, 512), torch.randint(0, 5, (40,))
    threads = torch.get_num_threads()
    results = []
    for count in (1, 2, 5):
        torch.set_num_threads(count)
        results.append(gather_qmm(x, packed, scales, biases, None, rhs, 128))
    torch.set_num_threads(threads)
    assert all(torch.equal(results[0], other) for other in results[1:])


def test_time_grows_with_the_number_of_matrices_not_its_square():
    """Four times the matrices cost about four times, where a search for each would cost sixteen."""

    def seconds(count: int) -> float:
        packed = torch.zeros(count, 1, 1, dtype=torch.int32)
        scales, x = torch.ones(count, 1, 1), torch.ones(count, 1, 32)
        times = []
        for _ in range(5):
            start = time.process_time()
            torch.ops.onebit.qmm(x, packed, scales, None, 32)
            times.append(time.process_time() - start)
        return min(times)

    assert seconds(80_000) < 10 * seconds(20_000)

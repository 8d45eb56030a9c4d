"""Random illegal calls: each raises and changes nothing, and none ends the process.

A legal call is spoiled in one way that the rules forbid, which must raise, or in ways that they may
or may not allow, which must return or raise.
"""

import random
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves

from fuzz.calls import CALLS, ISAS, bits_of, described
from fuzz.tensors import FLOATS

ops = torch.ops.onebit
REFUSALS = (ValueError, IndexError, RuntimeError, TypeError, NotImplementedError)
DTYPES = (*FLOATS, torch.int32, torch.uint32, torch.int64, torch.bool, torch.complex64, torch.uint8)
SIZES = (0, 1, 2, 3, 4, 31, 32, 64, 65, 96, 128, 256)
NUMBERS = (-(2**62), -32, -1, 0, 1, 16, 31, 33, 48, 256, 2**31, 2**62)

Spoil = Callable[[random.Random, Any], Any]


def any_tensor(choose: random.Random) -> Tensor:
    """Any shape, dtype, stride, offset, device and content."""
    shape = [choose.choice(SIZES) for _ in range(choose.choice([0, 1, 1, 2, 2, 3]))]
    dtype = choose.choice(DTYPES)
    t = torch.empty(shape).uniform_(-4, 4)
    if choose.random() < 0.2 and t.numel():
        t.view(-1)[choose.randrange(t.numel())] = choose.choice([float("nan"), float("inf"), -1e38])
    t = t.to(torch.int64).to(dtype) if not dtype.is_floating_point else t.to(dtype)
    if t.dim() and choose.random() < 0.3:
        t = t.transpose(0, -1)
    if t.dim() and choose.random() < 0.2:
        t = t[..., ::2]
    if t.dim() and choose.random() < 0.1 and t.shape[0]:
        t = t[:1].expand(choose.choice(SIZES), *t.shape[1:])
    return t.to("meta") if choose.random() < 0.05 else t


# Ways to spoil an argument that no rule allows
# --------------------------------------------------------------------------------------------------


def other_dtype(*allowed: torch.dtype) -> Spoil:
    wrong = [dtype for dtype in DTYPES if dtype not in allowed]
    return lambda choose, t: torch.zeros(t.shape, dtype=choose.choice(wrong))


def longer(choose: random.Random, t: Tensor) -> Tensor:
    """One dimension one larger."""
    shape = list(t.shape) or [1]
    shape[choose.randrange(len(shape))] += 1
    return torch.zeros(shape, dtype=t.dtype)


def freed(choose: random.Random, t: Tensor) -> Tensor:
    """A tensor whose memory is gone."""
    t = t.contiguous().clone()
    t.untyped_storage().resize_(0)
    return t


def elsewhere(choose: random.Random, t: Tensor) -> Tensor:
    return t.to("meta")


def sparse(choose: random.Random, t: Tensor) -> Tensor:
    dtype = torch.int32 if t.dtype == torch.uint32 else t.dtype
    return torch.zeros(t.shape, dtype=dtype).to_sparse()


def not_a_tensor(choose: random.Random, t: Tensor) -> Any:
    return choose.choice(["x", 1.5j, object(), [t, "x"], {}])


def outside(choose: random.Random, t: Tensor) -> Tensor:
    """An index that no table here has."""
    t = t.clone()
    bad = choose.choice([-1, 2**31 - 1, -(2**31)])
    t[tuple(choose.randrange(size) for size in t.shape)] = bad
    return t


def pick(*values: Any) -> Spoil:
    return lambda choose, old: choose.choice(values)


FLOATING, WORDS = other_dtype(*FLOATS), other_dtype(torch.int32, torch.uint32)
INDICES = other_dtype(torch.int32, torch.int64)
ANYWAY = (elsewhere, sparse, not_a_tensor, freed)

SPOILS: dict[str, tuple[Spoil, ...]] = {
    "group_size": (pick(*NUMBERS, "32", None, 32.5),),
    "packed": (WORDS, longer, *ANYWAY),
    "scales": (FLOATING, longer, *ANYWAY),
    "biases": (FLOATING, longer, *ANYWAY),
    "prepacked": (other_dtype(torch.uint8), longer, *ANYWAY),
    "rows": (pick(-1, 2**40, 2**62, "1"),),
    "columns": (pick(-32, 1, 2**40, 2**62, None),),
    "x": (FLOATING, *ANYWAY),
    "w": (FLOATING, *ANYWAY),
    "grad": (FLOATING, longer, *ANYWAY),
    "bias": (FLOATING, longer, sparse, not_a_tensor, freed),
    "importance": (FLOATING, longer, *ANYWAY),
    "indices": (INDICES, outside, *ANYWAY),
    "lhs_indices": (INDICES, outside, *ANYWAY),
    "rhs_indices": (INDICES, outside, *ANYWAY),
    "rule": (pick("", "best", "minmaX", None, 3),),
    "dtype": (pick(torch.int32, torch.complex64, torch.bool, "half"),),
    "bits": (other_dtype(torch.bool), *ANYWAY),
    "error": (other_dtype(torch.float32, torch.float64), longer, *ANYWAY),
    "moments": (other_dtype(torch.float32, torch.float64), longer, *ANYWAY),
    "begin": (pick(-1, 2**40, -(2**62), "0"),),
    "end": (pick(-1, 0, 2**40, 2**62, None),),
}


def spoilable(arguments: dict) -> list[str]:
    return [name for name, old in arguments.items() if name in SPOILS and old is not None]


def is_forbidden(op: str, name: str, spoil: Spoil, one: Any, arguments: dict) -> bool:
    """Whether the rules forbid it here, of the argument or of one in its list."""
    tensors = [t for t in tree_leaves(arguments) if isinstance(t, Tensor)]
    if spoil is freed:  # a tensor of no values has no memory to lose
        return one.numel() > 0
    if spoil is outside:  # an index that broadcasts to nothing is not used
        indices = [t for key, t in arguments.items() if key.endswith("indices") and t is not None]
        return all(t.numel() for t in indices)
    if spoil is elsewhere:
        return len(tensors) > 1
    return not (spoil is longer and op == "affine_grad" and name == "packed")  # one matrix more


def case(number: int) -> int:
    choose = random.Random(number)
    torch.default_generator.manual_seed(number)  # torch.manual_seed takes a millisecond
    ops.set_cpu_isa(choose.choice(ISAS))
    op = choose.choice(list(CALLS))
    arguments, _ = CALLS[op](choose)
    if choose.random() < 0.4:
        spoil_anyhow(choose, op, arguments)
        return 1
    name = choose.choice(spoilable(arguments))
    spoil = choose.choice(SPOILS[name])
    old = arguments[name]
    at = choose.randrange(len(old)) if isinstance(old, list) else None
    one = old if at is None else old[at]
    if not is_forbidden(op, name, spoil, one, arguments):
        return 0
    before = {k: v.clone() for k, v in arguments.items() if isinstance(v, Tensor)}
    new = spoil(choose, one)
    spoiled = {**arguments, name: new if at is None else [*old[:at], new, *old[at + 1 :]]}
    way = getattr(spoil, "__name__", "")
    value = described(spoiled)[name]
    what = f"{op} with {name} ({way}) {value!r} of {described(arguments)}"
    try:
        getattr(ops, op)(**spoiled)
    except ValueError as error:
        message = str(error).splitlines()[0]
        assert " must " in message and "got" in message, f"{what} says: {message}"
    except REFUSALS:
        pass
    else:
        raise AssertionError(f"{what} was not refused")
    for key, t in before.items():
        assert torch.equal(bits_of(arguments[key]), bits_of(t)), f"{what} wrote to {key}"
    return 1


def spoil_anyhow(choose: random.Random, op: str, arguments: dict) -> None:
    for name, old in arguments.items():
        if choose.random() < 0.3:
            is_number = isinstance(old, int) and not isinstance(old, bool)
            arguments[name] = choose.choice(NUMBERS) if is_number else any_tensor(choose)
    try:
        getattr(ops, op)(**arguments)
    except REFUSALS:
        pass

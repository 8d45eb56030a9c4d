"""Packed weights that several modules share, as a head shares those of its embedding."""

import weakref
from collections.abc import Iterator
from contextlib import contextmanager

from torch import Tensor, nn

TENSORS = ("weight", "scales", "biases")


class Tie:
    """Keeps tensors shared when the modules that share them move one after the other.

    PyTorch copies a shared buffer once for every module that has it, and a shared Parameter too
    when its storage cannot be replaced in place (to and from the meta device).
    """

    def __init__(self) -> None:
        self._moves: dict[str, tuple[weakref.ref[Tensor], Tensor]] = {}

    def follow(self, name: str, before: Tensor, after: Tensor) -> Tensor:
        """What stands for ``before`` now: where the first module to move took it."""
        source, moved = self._moves.get(name, (None, None))
        if source is not None and source() is before:
            return moved
        self._moves[name] = (weakref.ref(before), after)
        return after

    @contextmanager
    def following(self, module: nn.Module) -> Iterator[None]:
        """While module moves, in place."""
        before = {name: getattr(module, name) for name in TENSORS}
        yield
        for name, old in before.items():
            new = getattr(module, name)
            if new is not old:
                setattr(module, name, self.follow(name, old, new))

    def __reduce__(self) -> tuple[type["Tie"], tuple[()]]:
        return (Tie, ())


def tie(first: nn.Module, second: nn.Module) -> None:
    """Make second use the weights of first, in place; they stay shared when the model is moved.

    Both are ``OneBitModule``.

    Raises:
        TypeError: something else.
        ValueError: weights of different shape, group size or form.
    """
    for name, module in (("first", first), ("second", second)):
        if not hasattr(module, "_tie"):  # its class imports this module
            raise TypeError(f"{name} must be a OneBitModule, got {type(module).__name__}")
    if first.weight.shape != second.weight.shape or first.group_size != second.group_size:
        raise ValueError(
            f"second must have packed weights {list(first.weight.shape)} in groups of "
            f"{first.group_size}, got {list(second.weight.shape)} in groups of {second.group_size}"
        )
    if first.symmetric != second.symmetric:
        raise ValueError(
            f"second must have symmetric={first.symmetric}, got symmetric={second.symmetric}"
        )
    first._tie = second._tie = first._tie or Tie()
    for name in TENSORS:
        setattr(second, name, getattr(first, name))

"""What a reader of any format offers: descriptions first, tensors one by one."""

from collections.abc import Collection
from dataclasses import dataclass
from typing import Any, Protocol

from torch import Tensor


class CheckpointError(ValueError):
    """A file that is damaged, hostile, or holds what this project cannot take; says which part."""


@dataclass(frozen=True)
class Layer:
    """A quantized matrix ``[rows, columns]``, or a stack of them, as a file describes it; nothing
    of it is read."""

    bits: int
    group_size: int
    mode: str
    rows: int
    columns: int
    lead: tuple[int, ...] = ()  # how many there are in a stack

    @property
    def shape(self) -> tuple[int, ...]:
        return (*self.lead, self.rows, self.columns)

    @property
    def one_bit(self) -> bool:
        return self.bits == 1 and self.mode == "affine"

    def __str__(self) -> str:
        return f"{self.bits} bits ({self.mode}, groups of {self.group_size})"


@dataclass(frozen=True)
class Packed:
    """A matrix of the format: words ``[n, k // 32]`` int32, levels ``[n, k // group_size]``; or a
    stack of them."""

    weight: Tensor
    scales: Tensor
    biases: Tensor | None
    group_size: int


class Source(Protocol):
    """An open checkpoint. Names are those of the model's modules and parameters."""

    config: dict[str, Any]  # of the model, as config.json has it
    paths: Collection[str]  # of layers that are quantized
    names: Collection[str]  # of the other tensors

    def layer(self, path: str, columns: int | None = None) -> Layer:
        """Describe a quantized layer; columns, if the model knows them, settle what it leaves open.

        Raises:
            CheckpointError: tensors whose shapes contradict each other.
        """

    def packed(self, path: str) -> Packed:
        """Read a 1-bit layer."""

    def dequantized(self, path: str, layer: Layer) -> Tensor:
        """Read an affine layer of any number of bits, in the shape of layer."""

    def shape(self, name: str) -> tuple[int, ...]:
        """The shape of one of ``names``, from the header."""

    def tensor(self, name: str) -> Tensor:
        """Read one of ``names``; it may be a view of the file, copied when written to."""

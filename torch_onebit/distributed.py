"""Tensor parallelism: 1-bit layers sharded among devices by ``parallelize_module``.

Importing this module tells DTensor how the operators may be sharded.
"""

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import (
    DTensor,
    Partial,
    Placement,
    Replicate,
    Shard,
    distribute_module,
    distribute_tensor,
)
from torch.distributed.tensor.experimental import register_sharding
from torch.distributed.tensor.parallel import ParallelStyle

from torch_onebit.checks import check_kind
from torch_onebit.nn import OneBitEmbedding, OneBitLinear, OneBitModule, OneBitStack
from torch_onebit.packing import WORD_BITS

__all__ = ["ColwiseParallel", "RowwiseParallel"]


class _OneBitParallel(ParallelStyle):
    """Weights sharded along one dimension, x and y converted to the layouts asked for."""

    name: str
    input_layout: Placement  # what the product wants
    output_layout: Placement

    def __init__(
        self,
        *,
        input_layouts: Placement | None = None,
        output_layouts: Placement | None = None,
        use_local_output: bool = True,
    ) -> None:
        super().__init__()
        self.input_layouts = input_layouts or self.input_layout
        self.output_layouts = output_layouts or self.output_layout
        self.use_local_output = use_local_output

    def _dim(self, module: nn.Module) -> int:
        """The dimension of the weights to shard: -2, rows, or -1, groups of columns."""
        raise NotImplementedError

    def _apply(self, module: nn.Module, device_mesh: DeviceMesh) -> nn.Module:
        check_kind("module", module, OneBitModule, "a OneBitLinear, -Embedding or -Stack")
        dim = self._dim(module)
        _check_shards(module, dim, device_mesh.size(), self.name)
        return distribute_module(
            module,
            device_mesh,
            partial(_shard, dim, self.src_data_rank),
            partial(_prepare_input, self.input_layouts, self.input_layout),
            partial(_prepare_output, self.output_layouts, self.use_local_output),
        )


class ColwiseParallel(_OneBitParallel):
    """Outputs of a ``OneBitLinear`` or of every matrix of a ``OneBitStack``, or columns of a
    ``OneBitEmbedding``, divided among devices.

    What ``torch.distributed.tensor.parallel.ColwiseParallel`` is to float layers: the names are
    those of the transposed weight.

    Args:
        input_layouts: of x as it comes; replicated without it.
        output_layouts: of y; sharded along its last dimension without it.
        use_local_output: whether y is this device's shard as a plain tensor, or a DTensor.
    Raises:
        TypeError: (when applied) another kind of module.
        ValueError: (when applied) columns of an embedding that are not whole groups on every
            device, or a layer that shares its weights with another.
    """

    name = "ColwiseParallel"
    input_layout = Replicate()
    output_layout = Shard(-1)

    def _dim(self, module: nn.Module) -> int:
        return -1 if isinstance(module, OneBitEmbedding) else -2


class RowwiseParallel(_OneBitParallel):
    """Inputs of a ``OneBitLinear`` or of every matrix of a ``OneBitStack`` divided among devices;
    their products are added up.

    What ``torch.distributed.tensor.parallel.RowwiseParallel`` is to float layers.

    Args:
        input_layouts: of x as it comes; sharded along its last dimension without it.
        output_layouts: of y; replicated without it.
        use_local_output: whether y is a plain tensor, or a DTensor.
    Raises:
        TypeError: (when applied) another kind of module; embeddings take ``ColwiseParallel``.
        ValueError: (when applied) columns that are not whole groups on every device, or a layer
            that shares its weights with another.
    """

    name = "RowwiseParallel"
    input_layout = Shard(-1)
    output_layout = Replicate()

    def _dim(self, module: nn.Module) -> int:
        what = "a OneBitLinear or -Stack (embeddings: ColwiseParallel)"
        check_kind("module", module, (OneBitLinear, OneBitStack), what)
        return -1


def _check_shards(module: OneBitModule, dim: int, devices: int, style: str) -> None:
    if module._tie is not None:
        raise ValueError(
            f"module must not share its weights with another layer under {style}, "
            f"got {module} (leave both replicated)"
        )
    whole = module.group_size * devices
    columns = getattr(module, module.columns_name)
    if dim == -1 and columns % whole:
        raise ValueError(
            f"{module.columns_name} must be a multiple of {whole} ({devices} devices, groups of "
            f"{module.group_size}) under {style}, got {columns}"
        )


def _shard(
    dim: int, source: int | None, name: str, module: nn.Module, device_mesh: DeviceMesh
) -> None:
    """Make the tensors of a layer DTensors, in place."""

    def sharded(tensor: Tensor, placement: Placement) -> Tensor:
        return distribute_tensor(tensor, device_mesh, [placement], src_data_rank=source)

    columns, dim = dim == -1, dim + module.weight.ndim
    module.weight = sharded(module.weight, Shard(dim))
    for key, parameter in list(module.named_parameters(recurse=False)):
        # bias is added once to what devices have added up, or is of its device's outputs.
        placement = Replicate() if key == "bias" and columns else Shard(dim)
        data = sharded(parameter.detach(), placement)
        setattr(module, key, nn.Parameter(data, requires_grad=parameter.requires_grad))


def _prepare_input(
    given: Placement, wanted: Placement, module: nn.Module, inputs: Any, device_mesh: DeviceMesh
) -> tuple[Any, ...]:
    def put(t: Any, placement: Placement) -> Any:
        plain = isinstance(t, Tensor) and not isinstance(t, DTensor)
        return DTensor.from_local(t, device_mesh, [placement], run_check=False) if plain else t

    x, *indices = inputs  # which matrices of a stack, and which rows of x: the same everywhere
    x = put(x, given).redistribute(placements=[wanted])
    return x, *(put(t, Replicate()) for t in indices)


def _prepare_output(
    wanted: Placement, local: bool, module: nn.Module, y: DTensor, device_mesh: DeviceMesh
) -> Tensor:
    y = y.redistribute(placements=[wanted])
    return y.to_local() if local else y


# --- How operators may be sharded: (placements of results, placements of arguments) ---

Sharding = tuple[list[Placement | None], list[Placement | None]]


def _rule(op: Any) -> Callable[[Callable[..., Iterator[Sharding]]], Any]:
    """Register what a generator yields, after everything replicated."""

    def decorate(shardings: Callable[..., Iterator[Sharding]]) -> Any:
        results = len(op._schema.returns)

        def every(*args: Any) -> list[Sharding]:
            given = [Replicate() if hasattr(a, "placements") else None for a in args]
            return [([Replicate()] * results, given), *shardings(*args)]

        register_sharding(op)(every)
        return shardings

    return decorate


def _whole_groups(packed: Any, group_size: int) -> bool:
    """Whether every device gets whole groups of the columns of a matrix."""
    return packed.shape[-1] * WORD_BITS // group_size % packed.mesh.size() == 0


def _levels(scales: Any, biases: Any, placement: Placement) -> list[Placement | None]:
    return [placement, None if biases is None else placement]


_ops = torch.ops.onebit


@_rule(_ops.qmm.default)
def _qmm(x, packed, scales, biases, group_size, transpose=True) -> Iterator[Sharding]:
    if packed.ndim != 2:
        return
    last = x.ndim - 1
    by_rows = [Shard(0), *_levels(scales, biases, Shard(0)), None, None]
    by_columns = [Shard(1), *_levels(scales, biases, Shard(1)), None, None]
    outputs, inputs = (by_rows, by_columns) if transpose else (by_columns, by_rows)
    whole = _whole_groups(packed, group_size)
    if transpose or whole:
        yield [Shard(last)], [Replicate(), *outputs]
    if not transpose or whole:
        yield [Partial()], [Shard(last), *inputs]
    whole_weights = [Replicate(), *_levels(scales, biases, Replicate()), None, None]
    for dim in range(last):
        yield [Shard(dim)], [Shard(dim), *whole_weights]


@_rule(_ops.gather_qmm.default)
def _gather_qmm(
    x, packed, scales, biases, lhs, rhs, group_size, transpose=True, sorted_indices=False
) -> Iterator[Sharding]:
    """Matrices in parts, every process all of them; or chosen products in parts."""
    indices = [t for t in (lhs, rhs) if t is not None]
    dims = max(t.ndim for t in indices) if indices else max(x.ndim, packed.ndim) - 2
    every = [None if t is None else Replicate() for t in (lhs, rhs)]
    rest = [None, None, None]
    rows, columns = packed.ndim - 2, packed.ndim - 1
    by_rows = [Shard(rows), *_levels(scales, biases, Shard(rows)), *every, *rest]
    by_columns = [Shard(columns), *_levels(scales, biases, Shard(columns)), *every, *rest]
    outputs, inputs = (by_rows, by_columns) if transpose else (by_columns, by_rows)
    whole = _whole_groups(packed, group_size)
    if transpose or whole:
        yield [Shard(dims + 1)], [Replicate(), *outputs]
    if not transpose or whole:
        yield [Partial()], [Shard(x.ndim - 1), *inputs]
    if len(indices) == 2 and lhs.shape == rhs.shape:
        weights = [Replicate(), *_levels(scales, biases, Replicate())]
        for dim in range(dims):
            yield [Shard(dim)], [Replicate(), *weights, Shard(dim), Shard(dim), *rest]


@_rule(_ops.affine_grad.default)
def _affine_grad(
    grad, x, packed, lhs_indices, rhs_indices, group_size, transpose=True
) -> Iterator[Sharding]:
    every = [None if t is None else Replicate() for t in (lhs_indices, rhs_indices)]
    last, rest = x.ndim - 1, [*every, None, None]
    # The factor whose last dimension counts the rows of the weights, and the other.
    of_rows, of_columns = [Shard(grad.ndim - 1), Replicate()], [Replicate(), Shard(last)]
    if not transpose:
        of_rows, of_columns = of_columns, of_rows
    rows, columns = packed.ndim - 2, packed.ndim - 1
    yield [Shard(rows)] * 2, [*of_rows, Shard(rows), *rest]
    if _whole_groups(packed, group_size):
        yield [Shard(columns)] * 2, [*of_columns, Shard(columns), *rest]
    if packed.ndim == 2 and every == [None, None]:
        for dim in range(last):
            yield [Partial()] * 2, [Shard(dim), Shard(dim), Replicate(), *rest]


@_rule(_ops.embedding.default)
def _embedding(indices, packed, scales, biases, group_size) -> Iterator[Sharding]:
    if _whole_groups(packed, group_size):
        yield (
            [Shard(indices.ndim)],
            [Replicate(), Shard(1), *_levels(scales, biases, Shard(1)), None],
        )
    for dim in range(indices.ndim):
        weights = [Replicate(), *_levels(scales, biases, Replicate())]
        yield [Shard(dim)], [Shard(dim), *weights, None]


@_rule(_ops.dequantize.default)
def _dequantize(packed, scales, biases, group_size) -> Iterator[Sharding]:
    for dim in range(packed.ndim):
        if dim < packed.ndim - 1 or _whole_groups(packed, group_size):
            yield [Shard(dim)], [Shard(dim), *_levels(scales, biases, Shard(dim)), None]

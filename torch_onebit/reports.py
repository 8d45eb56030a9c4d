"""What was done to a model: layers swapped, matrices left, with reasons and bytes."""

from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from math import prod

from torch import Tensor, nn
from torch.nn.parameter import UninitializedTensorMixin
from torch.nn.utils.parametrize import ParametrizationList

from torch_onebit.checks import check_model
from torch_onebit.float_layers import experts_obstacle, is_experts, shape_of
from torch_onebit.nn import OneBitModule

_ATTRIBUTE = "onebit_report"
_PACKED = ("OneBit", "Prepacked")  # classes of packed layers begin with one of these


@dataclass(frozen=True)
class LayerRow:
    """One layer that was swapped.

    Bytes count the weight and its levels, not the bias; a layer that shares them with an earlier
    one has 0. ``bytes_before`` is from before the first step. Errors are squared and relative to
    what they are errors of: of the weights, and of the outputs, ``E|y - t|^2 / E|t|^2`` over all
    calls in all batches of ``calibrate_``, t what the layer aimed at: 0 when outputs are right, 1
    when they might as well be 0. None when the layer was quantized without its inputs.
    """

    name: str
    kind: str  # the class it has now
    shape: tuple[int, ...]
    group_size: int | None
    bytes_before: int
    bytes_after: int
    steps: tuple[str, ...]  # what was done to it, in order: "quantize_", …
    note: str = ""
    weight_error: float | None = None
    output_error: float | None = None
    seconds: float | None = None


@dataclass(frozen=True)
class LeftRow:
    """One matrix that stayed float, or all vectors together."""

    name: str
    kind: str  # the class of the module that holds it
    shape: tuple[int, ...]
    bytes: int
    reason: str


@dataclass(frozen=True)
class CalibrationReport:
    """How ``calibrate_`` ran; its errors and seconds are in the rows of the layers."""

    batches: str  # what was made of them
    chains: tuple[str, ...]  # run block by block, not from the start

    def __str__(self) -> str:
        names = [name or "the whole model" for name in self.chains]
        ran = (
            f"ran one block at a time: {', '.join(names)}"
            if names
            else "ran the whole model for every layer: it has no list of blocks of which each gets "
            "just what the one before returned (slower, results are the same; a cache of keys and "
            "values is a common reason: use_cache=False)"
        )
        return f"{self.batches}\n{ran}"


@dataclass
class Report:
    """Layers swapped and matrices left, with reasons. ``print(report)`` shows it as a table."""

    layers: list[LayerRow] = field(default_factory=list)
    left: list[LeftRow] = field(default_factory=list)
    calibration: CalibrationReport | None = None  # of the last calibrate_

    def record(self, rows: list[LayerRow], left: list[LeftRow]) -> None:
        """Add a step: a layer that was there before keeps its place and where it came from."""
        places = {row.name: index for index, row in enumerate(self.layers)}
        for row in rows:
            if row.name not in places:
                self.layers.append(row)
                continue
            index = places[row.name]
            before = self.layers[index]
            known = {  # what this step did not find out
                name: getattr(before, name)
                for name in ("weight_error", "output_error", "seconds")
                if getattr(row, name) is None
            }
            self.layers[index] = replace(
                row, bytes_before=before.bytes_before, steps=before.steps + row.steps, **known
            )
        self.left = left

    @property
    def bytes_before(self) -> int:
        return sum(row.bytes_before for row in self.layers)

    @property
    def bytes_after(self) -> int:
        return sum(row.bytes_after for row in self.layers)

    @property
    def bytes_left(self) -> int:
        """Of everything that stayed float: matrices and vectors."""
        return sum(row.bytes for row in self.left)

    @property
    def bits_per_weight(self) -> float:
        """Bits stored per weight of packed layers, levels included; 0 when there are none."""
        packed = [row for row in self.layers if row.kind.startswith(_PACKED) and row.bytes_after]
        weights = sum(prod(row.shape) for row in packed)
        return 8 * sum(row.bytes_after for row in packed) / weights if weights else 0.0

    def __str__(self) -> str:
        head = ("layer", "kind", "shape", "group", "bytes before", "after", "")
        lines = _table(head, self._rows())
        lines.append(
            f"{len(self.layers)} layers, {self.bits_per_weight:.3f} bits per packed weight, "
            f"{self.bytes_before:,} -> {self.bytes_after:,} bytes"
        )
        if self.calibration:
            lines.append(f"calibrate_: {self.calibration}")
        if self.left:
            rows = [
                (row.name, row.kind, _shape(row.shape), "", f"{row.bytes:,}", "", row.reason)
                for row in self.left
            ]
            head = ("left as it was", "kind", "shape", "", "bytes", "", "why")
            lines += ["", *_table(head, rows), f"{self.bytes_left:,} bytes left float"]
        return "\n".join(lines)

    def _rows(self) -> list[tuple[str, ...]]:
        rows = []
        for row in self.layers:
            errors = (("weight error", row.weight_error), ("output error", row.output_error))
            figures = [f"{name} {value:.4f}" for name, value in errors if value is not None]
            if row.seconds is not None:
                figures.append(f"{row.seconds:.2f} s")
            rows.append(
                (
                    row.name,
                    row.kind,
                    _shape(row.shape),
                    str(row.group_size or ""),
                    f"{row.bytes_before:,}" if row.bytes_before else "tied",
                    f"{row.bytes_after:,}" if row.bytes_after else "tied",
                    ", ".join([*figures, row.note] if row.note else figures),
                )
            )
        return rows


def report(model: nn.Module) -> Report:
    """What ``quantize_``, ``calibrate_``, ``prepare_qat_``, ``convert_``, ``add_lora_``,
    ``prepack_`` and ``dequantize_`` have done to a model so far.

    Raises:
        ValueError: a model that none of them has changed.
        TypeError: no model.
    """
    check_model(model)
    found = getattr(model, _ATTRIBUTE, None)
    if found is None:
        raise ValueError(
            "model must be one that quantize_, calibrate_, prepare_qat_ or another in-place "
            f"function was called on, got a {type(model).__name__} that none was"
        )
    return found


def record(
    model: nn.Module,
    rows: list[LayerRow],
    reasons: dict[int, str],
    stayed: dict[int, tuple[str, nn.Module]],
) -> Report:
    """Add a step to the report of a model.

    Args:
        reasons: why a module was not swapped, by its identity.
        stayed: the layers that the step is about and that were not, with their names.
    """
    made = getattr(model, _ATTRIBUTE, None) or Report()
    earlier = {row.name: row.reason for row in made.left}
    left = list(left_float(model, reasons, earlier))
    for name, layer in stayed.values():
        if getattr(layer, "is_onebit", False):  # nothing of it is float
            left.append(LeftRow(name, type(layer).__name__, shape_of(layer), 0, reasons[id(layer)]))
    made.record(rows, left)
    setattr(model, _ATTRIBUTE, made)
    return made


def left_float(
    model: nn.Module, reasons: dict[int, str], earlier: dict[str, str]
) -> Iterator[LeftRow]:
    """Every matrix of a model that is in no 1-bit layer, and one row for all vectors.

    Args:
        reasons: of this step, by the identity of modules.
        earlier: of the steps before, by name; they hold for layers that this one is not about.
    """
    seen: set[int] = set()
    vectors = vector_bytes = 0
    for name, module in model.named_modules():
        onebit = _is_onebit(module)
        for key, parameter in module.named_parameters(recurse=False):
            if id(parameter) in seen:
                continue
            seen.add(id(parameter))
            if onebit and parameter.dim() > 1:
                continue
            if parameter.dim() < 2:
                vectors += 1
                vector_bytes += tensor_bytes(parameter)
                continue
            shown = f"{name}.{key}" if key != "weight" else name
            yield LeftRow(
                shown,
                type(module).__name__,
                tuple(parameter.shape),
                tensor_bytes(parameter),
                reasons.get(id(module)) or earlier.get(shown) or _why(module, parameter),
            )
    if vectors:
        yield LeftRow(f"{vectors} vectors", "", (), vector_bytes, "norms, biases and the like")


def _is_onebit(module: nn.Module) -> bool:
    """Whether the parameters of a module are those of a 1-bit layer, of any kind."""
    modules = [module, *module] if isinstance(module, ParametrizationList) else [module]
    return any(getattr(m, "is_onebit", False) for m in modules)


def _why(module: nn.Module, parameter: Tensor) -> str:
    """Why no step takes this matrix."""
    kind = type(module).__name__
    if isinstance(module, ParametrizationList):
        return "parametrized: only prepare_qat_ takes it"
    if type(module) in (nn.Linear, nn.Embedding):
        return "no step was about it"
    if isinstance(module, nn.Linear | nn.Embedding | nn.EmbeddingBag):
        return f"{kind} is a class of its own: whoever made it may read its weight"
    if is_experts(module):
        return experts_obstacle(module) or "no step was about it"
    if isinstance(module, nn.MultiheadAttention):
        return "nn.MultiheadAttention reads its weights itself"
    if isinstance(module, nn.RNNBase | nn.RNNCellBase):
        return f"nn.{kind} hands its weights to one kernel of PyTorch"
    if isinstance(module, nn.modules.conv._ConvNd):
        return "convolutions have no 1-bit form"
    if isinstance(module, nn.Bilinear):
        return "nn.Bilinear has no 1-bit form"
    if parameter.dim() > 2:
        return f"a parameter of {parameter.dim()} dimensions: no layer to swap"
    return f"a parameter of {kind} itself: no layer to swap"


def tensor_bytes(t: Tensor | None) -> int:
    if t is None or isinstance(t, UninitializedTensorMixin):
        return 0
    return t.numel() * t.element_size()


def weight_bytes(layer: nn.Module) -> int:
    """Bytes of a layer's weight and levels, of a float layer or a 1-bit one."""
    own = [tensor_bytes(p) for key, p in layer.named_parameters(recurse=False) if key != "bias"]
    words = 0
    if isinstance(layer, OneBitModule):
        words = sum(tensor_bytes(layer._buffers.get(name)) for name in ("weight", "prepacked"))
    return words + sum(own) + sum(weight_bytes(child) for child in layer.children())


def _shape(shape: tuple[int, ...]) -> str:
    return " x ".join(map(str, shape))


def _table(head: tuple[str, ...], rows: list[tuple[str, ...]]) -> list[str]:
    widths = [max(len(row[column]) for row in [head, *rows]) for column in range(len(head))]
    return [
        "  ".join(
            cell.rjust(width) if 2 <= column < 6 else cell.ljust(width)
            for column, (cell, width) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in [head, *rows]
    ]

"""load_checkpoint, load_gguf: the tensors of a file into a model, packed all the way."""

from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from tqdm.auto import tqdm

from torch_onebit.checkpoint import CheckpointError, GGUFCheckpoint, Layer, MLXCheckpoint, Source
from torch_onebit.checks import check_model
from torch_onebit.float_layers import (
    experts_obstacle,
    is_conv1d,
    is_embedding,
    is_experts,
    is_linear,
    matrix,
    projection_shapes,
)
from torch_onebit.nn import (
    OneBitEmbedding,
    OneBitExperts,
    OneBitLinear,
    OneBitModule,
    OneBitStack,
    tie,
)
from torch_onebit.nn.forms import unprepack_all
from torch_onebit.saving import stored_path
from torch_onebit.skeleton import skeleton, tie_empty_
from torch_onebit.symmetric import symmetrize_

OTHER_BITS = ("error", "dequantize")
_LAYERS = (OneBitLinear, OneBitEmbedding)


def load_checkpoint(
    path: str | Path,
    model: nn.Module | None = None,
    *,
    other_bits: str = "error",
    symmetrize: bool = False,
    strict: bool = True,
    dtype: torch.dtype | None = None,
    device: torch.device | str | None = None,
    progress: bool = True,
) -> nn.Module:
    """Load a 1-bit checkpoint of MLX (a folder, as mlx-lm writes it) into a model, in place.

    The layers that the checkpoint quantizes become ``OneBitLinear`` and ``OneBitEmbedding`` with
    the words and levels of the file; nothing is unpacked. Files are memory-mapped and read tensor
    by tensor. All names, shapes and dtypes are checked before the model is touched.

    Args:
        path: the folder.
        model: whose modules have the names of the checkpoint, on any device, ``meta`` too; layers
            to fill are ``nn.Linear`` and ``nn.Embedding``, or 1-bit already. Without it the model
            that config.json describes is built by transformers.
        other_bits: layers of other than 1 bit: "error" names them, "dequantize" makes them dense.
        symmetrize: then drop biases that are ``-scales / 2`` (see ``symmetrize_``).
        strict: the file must fill every parameter and hold nothing else; false leaves both alone.
        dtype: of the model to build; what config.json says without it, else that of its tensors.
            Parameters of a model given keep their dtypes; levels have the file's.
        device: to put the tensors on; where they were without it (``meta``: the CPU).
        progress: show a progress bar when it takes more than a moment.
    Returns:
        model, in eval mode if it was built here.
    Raises:
        CheckpointError: a ValueError; the file is damaged, or does not fit the model, or has layers
            of other bits. The message names the tensor.
        ImportError: the package safetensors, or transformers where it must build the model, is not
            installed.
    """
    check_other_bits(other_bits)
    source = MLXCheckpoint(path)
    options = {"other_bits": other_bits, "strict": strict, "device": device, "progress": progress}
    return load_source(source, model, dtype=dtype, symmetrize=symmetrize, **options)


def load_gguf(
    path: str | Path,
    model: nn.Module | None = None,
    *,
    symmetrize: bool = False,
    strict: bool = True,
    dtype: torch.dtype | None = None,
    device: torch.device | str | None = None,
    progress: bool = True,
) -> nn.Module:
    """Load a GGUF file of llama.cpp with Q1_0 tensors into a model, in place.

    A Q1_0 matrix becomes a 1-bit layer of group 128 with ``scales = 2 d`` and ``biases = -d``: no
    bit is lost. F16, BF16, F32 and Q8_0 tensors become dense ones. Architectures: llama, qwen2,
    qwen3.

    Args:
        path: the file.
        model, symmetrize, strict, dtype, device, progress: as in ``load_checkpoint``; names are
            those of transformers' models.
    Raises:
        CheckpointError: as in ``load_checkpoint``; also a tensor of another type, such as the
            ternary Q2_0, TQ1_0 and TQ2_0, by name and type.
    """
    source = GGUFCheckpoint(path)
    options = {"other_bits": "error", "strict": strict, "device": device, "progress": progress}
    return load_source(source, model, dtype=dtype, symmetrize=symmetrize, **options)


def load_source(
    source: Source,
    model: nn.Module | None,
    *,
    dtype: torch.dtype | None,
    symmetrize: bool,
    **options: Any,
) -> nn.Module:
    """What the loaders of all formats do once the file is open."""
    if model is None:
        _check_depth(source)
        model = skeleton(source.config, dtype or _dtype_of(source)).eval()
    elif dtype is not None:
        raise ValueError(f"dtype must be None where a model is given, got {dtype}")
    fill_(model, source, **options)
    if symmetrize:
        symmetrize_(model)
    return model


def fill_(
    model: nn.Module,
    source: Source,
    *,
    other_bits: str,
    strict: bool,
    device: torch.device | str | None,
    progress: bool,
) -> None:
    """Load an open checkpoint into a model, in place."""
    check_model(model)
    tie_empty_(model)
    unprepack_all(model)
    plan = _plan(model, source, other_bits, strict)
    work = [*plan.tensors.items(), *plan.layers.items()]  # biases before their layers are swapped
    bar = tqdm(work, desc="load", unit="tensor", delay=1, disable=None if progress else True)
    for name, target in bar:
        target.load(source, name, device)
    left = [n for n, t in _tensors(model) if t.is_meta]
    if strict and left:
        raise CheckpointError(
            f"model must have no tensors on the meta device that the checkpoint cannot fill, got "
            f"{_some(left)}"
        )


@dataclass
class _Place:
    """An attribute of a module."""

    owner: nn.Module
    attribute: str

    @property
    def value(self) -> Any:
        return getattr(self.owner, self.attribute)

    def set(self, value: Any) -> None:
        setattr(self.owner, self.attribute, value)


@dataclass
class _LayerTarget:
    """A layer of the checkpoint and all places of the model that share its weight."""

    layer: Layer
    places: list[_Place]

    def load(self, source: Source, path: str, device: torch.device | str | None) -> None:
        if not self.layer.one_bit:
            weight = source.dequantized(path, self.layer)
            return _fill([_Place(p.value, "weight") for p in self.places], weight, device)
        packed = source.packed(path)
        device = device or _device(self.places[0].value.weight)
        levels = [t if t is None else t.to(device) for t in (packed.scales, packed.biases)]
        tensors = (packed.weight.to(device), *levels)
        first: OneBitModule | None = None
        for place in self.places:
            new = _swapped(place.value, tensors, packed.group_size)
            if first is None:
                first = new
            else:
                tie(first, new)
            place.set(new)


@dataclass
class _ExpertsTarget:
    """The three stacks of a mixture's experts in the file, and the module that gets them."""

    layers: dict[str, tuple[str, Layer | None]]  # by projection: path in the file; None: dense
    place: _Place

    def load(self, source: Source, path: str, device: torch.device | str | None) -> None:
        experts = self.place.value
        if not all(layer and layer.one_bit for _, layer in self.layers.values()):
            stacks = {
                name: source.dequantized(p, layer) if layer else source.tensor(f"{p}.weight")
                for name, (p, layer) in self.layers.items()
            }
            gate_up = torch.cat([stacks["gate_proj"], stacks["up_proj"]], 1)
            _fill([_Place(experts, "gate_up_proj")], gate_up, device)
            return _fill([_Place(experts, "down_proj")], stacks["down_proj"], device)
        if device is None:
            down = experts.down_proj
            device = _device(down.weight if isinstance(down, OneBitStack) else down)
        stacks = {}
        for name, (stored_as, _) in self.layers.items():
            packed = source.packed(stored_as)
            tensors = (t.to(device) for t in (packed.weight, packed.scales, packed.biases))
            stacks[name] = OneBitStack.from_packed(*tensors, group_size=packed.group_size)
        if isinstance(experts, OneBitExperts):
            for name, stack in stacks.items():
                setattr(experts, name, stack.train(experts.training))
        else:
            self.place.set(OneBitExperts(experts, **stacks))


@dataclass
class _TensorTarget:
    """A tensor of the checkpoint and all places of the model that share it."""

    places: list[_Place]

    def load(self, source: Source, name: str, device: torch.device | str | None) -> None:
        _fill(self.places, source.tensor(name), device)


@dataclass
class _Plan:
    layers: dict[str, _LayerTarget | _ExpertsTarget] = field(default_factory=dict)
    tensors: dict[str, _TensorTarget] = field(default_factory=dict)


def _plan(model: nn.Module, source: Source, other_bits: str, strict: bool) -> _Plan:
    """Where everything goes; raises before anything is changed."""
    plan = _Plan()
    modules = dict(model.named_modules(remove_duplicate=False))
    shared: dict[int, list[str]] = {}  # by identity of a tensor: its names
    for name, tensor in _tensors(model):
        shared.setdefault(id(tensor), []).append(name)
    names_of = {name: names for names in shared.values() for name in names}
    filled: set[str] = set()
    unexpected: list[str] = []
    other: list[str] = []
    experts = _experts(modules, source)
    for path, stacks in experts.items():
        plan.layers[path] = _ExpertsTarget(stacks, _place(modules, path))
        other += [f"{p}: {layer}" for p, layer in stacks.values() if layer and not layer.one_bit]
        filled |= {name for name in names_of if name.startswith(f"{path}.")}
    in_experts = {p for stacks in experts.values() for p, _ in stacks.values()}
    for path in source.paths:
        module = modules.get(path)
        if path in in_experts:
            continue
        if module is None:
            unexpected.append(path)
            continue
        shape = _matrix_shape(path, module)
        layer = source.layer(path, shape[-1])
        if f"{path}.weight" in filled:  # a tied layer that the file holds twice
            _check_same(source, plan.layers, names_of[f"{path}.weight"], path)
            continue
        _check_shape(path, layer.shape, shape)
        if not layer.one_bit:
            other.append(f"{path}: {layer}")
        aliases = [n.rpartition(".")[0] for n in names_of[f"{path}.weight"]]
        for alias in aliases:
            _check_kind(alias, modules[alias], layer)
            filled |= {f"{alias}.{entry}" for entry in ("weight", "scales", "biases")}
        plan.layers[path] = _LayerTarget(layer, [_place(modules, alias) for alias in aliases])
    if other and other_bits == "error":
        raise CheckpointError(
            f"layers must be of 1 bit, got {_some(other)}; other_bits='dequantize' makes them dense"
        )
    for name in source.names:
        if name.removesuffix(".weight") in in_experts:
            continue
        if name not in names_of:
            unexpected.append(name)
            continue
        place = _place(modules, name)
        if isinstance(place.owner, OneBitModule) and place.attribute != "bias":
            raise CheckpointError(f"{name} must be quantized as in the model, got a dense tensor")
        _check_shape(name, source.shape(name), tuple(place.value.shape))
        if name in filled:
            continue  # tied, and the file holds it twice
        filled |= set(names_of[name])
        plan.tensors[name] = _TensorTarget([_place(modules, n) for n in names_of[name]])
    missing = [name for name in model.state_dict() if name not in filled]
    if strict and (missing or unexpected):
        what = [f"lacks {_some(missing)}"] * bool(missing)
        what += [f"has {_some(unexpected)} that the model lacks"] * bool(unexpected)
        raise CheckpointError(f"checkpoint must fit the model, but it {' and '.join(what)}")
    return plan


def _experts(
    modules: dict[str, nn.Module], source: Source
) -> dict[str, dict[str, tuple[str, Layer | None]]]:
    """By the path of experts in the model: their stacks in the file, checked; None for dense."""
    found: dict[str, dict[str, tuple[str, Layer | None]]] = {}
    quantized, names = set(source.paths), set(source.names)
    for path, module in modules.items():
        packed = isinstance(module, OneBitExperts)
        if not packed and not (is_experts(module) and experts_obstacle(module) is None):
            continue
        shapes = projection_shapes(module)
        paths = {name: stored_path(path, name) for name in shapes}
        stored = [p for p in paths.values() if p in quantized or f"{p}.weight" in names]
        if not stored:
            continue
        stacks: dict[str, tuple[str, Layer | None]] = {}
        for name, stored_as in paths.items():
            if stored_as not in stored:
                raise CheckpointError(f"{stored[0]} must have {stored_as} beside it, got none")
            layer = source.layer(stored_as, shapes[name][-1]) if stored_as in quantized else None
            shape = layer.shape if layer else source.shape(f"{stored_as}.weight")
            _check_shape(stored_as, shape, shapes[name])
            what = str(layer) if layer else "a dense tensor"
            if packed and not (layer and layer.one_bit):
                raise CheckpointError(f"{stored_as} must be of 1 bit in this model, got {what}")
            if (layer is None) != (stored[0] not in quantized):
                raise CheckpointError(f"{stored_as} must be stored as {stored[0]} is, got {what}")
            stacks[name] = (stored_as, layer)
        found[path] = stacks
    return found


def _check_same(
    source: Source, layers: dict[str, _LayerTarget], aliases: list[str], path: str
) -> None:
    first = next(p for p in (n.rpartition(".")[0] for n in aliases) if p in layers)
    one, two = source.packed(first), source.packed(path)
    pairs = ((one.weight, two.weight), (one.scales, two.scales), (one.biases, two.biases))
    if not all(torch.equal(a, b) for a, b in pairs):
        raise CheckpointError(
            f"{path} must equal {first}, to which the model ties it, got other weights"
        )


def _swapped(module: nn.Module, tensors: tuple[Any, ...], group_size: int) -> OneBitModule:
    """The 1-bit layer that takes a module's place."""
    new: OneBitModule
    if is_linear(module) or isinstance(module, OneBitLinear):
        new = OneBitLinear.from_packed(*tensors, module.bias, group_size=group_size)
    else:
        float_rows = isinstance(module, nn.Embedding)
        new = OneBitEmbedding.from_packed(
            *tensors,
            module.padding_idx,
            group_size=group_size,
            output_dtype=module.weight.dtype if float_rows else module.output_dtype,
        )
    return new.train(module.training)


def _fill(places: list[_Place], tensor: Tensor, device: torch.device | str | None) -> None:
    old = places[0].value
    new = tensor.to(device or _device(old), old.dtype)
    if isinstance(old, nn.Parameter):
        new = nn.Parameter(new, requires_grad=old.requires_grad)
    for place in places:
        place.set(new)


def _place(modules: dict[str, nn.Module], name: str) -> _Place:
    prefix, _, attribute = name.rpartition(".")
    return _Place(modules[prefix], attribute)


def _tensors(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    yield from model.named_parameters(remove_duplicate=False)
    yield from model.named_buffers(remove_duplicate=False)


def _matrix_shape(path: str, module: nn.Module) -> tuple[int, ...]:
    """The shape of a module's weight, packed or not."""
    if isinstance(module, OneBitModule):
        return module.weight.shape[0], getattr(module, module.columns_name)
    weight = getattr(module, "weight", None)
    if not isinstance(weight, Tensor) or weight.dim() != 2:
        raise _wrong_kind(path, module)
    return tuple(matrix(module).shape)


def _check_kind(path: str, module: nn.Module, layer: Layer) -> None:
    """Whether a module can hold what the file has for it."""
    if not layer.one_bit:
        if isinstance(module, OneBitModule) or is_conv1d(module):
            raise CheckpointError(f"{path} must be of 1 bit in this model, got {layer}")
    elif not (is_linear(module) or is_embedding(module) or isinstance(module, _LAYERS)):
        raise _wrong_kind(path, module)


def _wrong_kind(path: str, module: nn.Module) -> CheckpointError:
    return CheckpointError(
        f"{path} must be an nn.Linear or nn.Embedding (no subclass) to hold 1-bit weights, "
        f"got {type(module).__name__}"
    )


def _check_shape(name: str, got: tuple[int, ...], want: tuple[int, ...]) -> None:
    if got != want:
        raise CheckpointError(
            f"{name} must have shape {list(want)} as in the model, got {list(got)}"
        )


def _check_depth(source: Source) -> None:
    """A model is built layer by layer: no more of them than the file has tensors."""
    depth, most = source.config.get("num_hidden_layers"), len(source.names) + len(source.paths)
    if depth is not None and (type(depth) is not int or not 0 <= depth <= most):
        raise CheckpointError(f"num_hidden_layers must be at most {most} here, got {depth!r}")


def check_other_bits(other_bits: str) -> None:
    if other_bits not in OTHER_BITS:
        raise ValueError(f"other_bits must be one of {', '.join(OTHER_BITS)}, got {other_bits!r}")


def _device(tensor: Tensor) -> torch.device:
    return torch.device("cpu") if tensor.is_meta else tensor.device


def _dtype_of(source: Source) -> torch.dtype | None:
    """Where the config does not say, the dtype of a dense matrix, or else of a vector."""
    if source.config.get("dtype") or source.config.get("torch_dtype"):
        return None
    names = sorted(source.names, key=lambda name: len(source.shape(name)), reverse=True)
    floats = (t.dtype for t in map(source.tensor, names) if t.is_floating_point())
    return next(floats, None)


def _some(names: list[str]) -> str:
    """A few of the names, for a message."""
    more = len(names) - 5
    return ", ".join(names[:5]) + (f" and {more} more" if more > 0 else "")

"""Batches as people have them, as calls of a model."""

import inspect
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence
from torch.utils.data import DataLoader

Call = tuple[tuple[Any, ...], dict[str, Any]]  # positional and keyword arguments


def as_calls(model: nn.Module, batches: Iterable[Any]) -> tuple[list[Call], str]:
    """(calls, what was made of the batches in words).

    A mapping is keyword arguments, or the one argument of a model that takes one under another
    name; keys that forward does not take are left out. A tuple or list is positional arguments:
    values that forward cannot take are left out, and of a DataLoader's also those that it does not
    require, which are labels as often as not; a single value is the first argument, and so is
    anything else. ``use_cache`` is false unless a batch says otherwise: a cache that goes from
    block to block hides that they are a chain. Tensors move to the device of the model, if it has
    one.

    Raises:
        TypeError: something else than an iterable of batches.
        ValueError: no batches, or batches that do not say which arguments they are.
    """
    if isinstance(batches, Tensor | Mapping | str) or not isinstance(batches, Iterable):
        raise TypeError(
            f"batches must be an iterable of batches, such as a list, got {type(batches).__name__}"
        )
    parameters = _Parameters.of(model)
    loader = isinstance(batches, DataLoader)
    readings = [parameters.read(batch, loader) for batch in batches]
    if not readings:
        raise ValueError("batches must hold at least one batch, got none")
    devices = {t.device for t in model.parameters()}
    calls = [call for call, _ in readings]
    if "use_cache" in parameters.named:
        calls = [(args, {"use_cache": False, **named}) for args, named in calls]
    words = list(dict.fromkeys(text for _, text in readings))
    if len(devices) == 1:
        device = devices.pop()
        if any(t.device != device for call in calls for t in tensors_of(call)):
            words.append(f"moved to {device}")
            calls = [_moved(call, device) for call in calls]
    return calls, f"{len(calls)} batches: {'; '.join(words)}"


def tensors_of(value: Any) -> Iterator[Tensor]:
    """Every tensor in a value made of tuples, lists and mappings."""
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, Mapping):
        for inner in value.values():
            yield from tensors_of(inner)
    elif isinstance(value, tuple | list):
        for inner in value:
            yield from tensors_of(inner)


def _moved(value: Any, device: torch.device) -> Any:
    if isinstance(value, Tensor):
        return value.to(device)
    if type(value) in (tuple, list):
        return type(value)(_moved(inner, device) for inner in value)
    if type(value) is dict:
        return {key: _moved(inner, device) for key, inner in value.items()}
    return value.to(device) if hasattr(value, "to") else value


@dataclass(frozen=True)
class _Parameters:
    """What a model's forward takes."""

    required: list[str]  # without default, by position
    optional: list[str]  # with one
    named: set[str]  # all that keywords reach
    any_positional: bool
    any_keyword: bool

    @classmethod
    def of(cls, model: nn.Module) -> "_Parameters":
        try:
            parameters = inspect.signature(model.forward).parameters.values()
        except (TypeError, ValueError):  # a forward that is not Python: anything goes
            return cls([], [], set(), True, True)
        kinds, named_only = inspect.Parameter, inspect.Parameter.KEYWORD_ONLY
        positional = [
            p for p in parameters if p.kind in (kinds.POSITIONAL_ONLY, kinds.POSITIONAL_OR_KEYWORD)
        ]
        return cls(
            [p.name for p in positional if p.default is kinds.empty],
            [p.name for p in positional if p.default is not kinds.empty],
            {p.name for p in parameters if p.kind in (kinds.POSITIONAL_OR_KEYWORD, named_only)},
            any(p.kind is kinds.VAR_POSITIONAL for p in parameters),
            any(p.kind is kinds.VAR_KEYWORD for p in parameters),
        )

    def __str__(self) -> str:
        optional = [f"{name}=" for name in self.optional]
        if len(optional) > 3:
            optional[2:] = ["..."]
        names = [*self.required, *optional, *["*args"] * self.any_positional]
        return f"forward({', '.join(names)})"

    def read(self, batch: Any, loader: bool) -> tuple[Call, str]:
        if isinstance(batch, Mapping):
            return self._read_mapping(batch)
        if isinstance(batch, tuple | list) and not isinstance(batch, PackedSequence):
            return self._read_sequence(tuple(batch), loader)
        name = next(iter([*self.required, *self.optional]), "the first argument")
        return ((batch,), {}), f"{type(batch).__name__} as {name}"

    def _read_mapping(self, batch: Mapping[str, Any]) -> tuple[Call, str]:
        kind = type(batch).__name__
        if len(self.required) == 1 and self.required[0] not in batch:
            return ((batch,), {}), f"{kind} as {self.required[0]}"
        taken = {k: v for k, v in batch.items() if self.any_keyword or k in self.named}
        left = [str(key) for key in batch if key not in taken]
        missing = [name for name in self.required if name not in taken]
        if missing or not taken:
            raise ValueError(
                f"batches must hold the arguments of {self}, got a {kind} of {', '.join(batch)}"
            )
        return ((), taken), f"{kind} as {', '.join(taken)}{_left_out(left)}"

    def _read_sequence(self, batch: tuple[Any, ...], loader: bool) -> tuple[Call, str]:
        least, most = len(self.required), len(self.required) + len(self.optional)
        count, kind = len(batch), f"tuple of {len(batch)}"
        ambiguous = count > max(least, 1) and loader and (self.optional or self.any_positional)
        if self.any_positional:
            most = max(most, count)
        if count < least or (count > most > max(least, 1)) or (ambiguous and not least):
            raise ValueError(
                f"batches must say which arguments of {self} they are, got a {kind}: make them "
                "dicts, such as {'x': x}"
            )
        used = least if ambiguous else min(count, most)
        names = [*self.required, *self.optional, *["*args"] * count][:used]
        left = [f"{count - used} more"] if used < count else []
        return (batch[:used], {}), f"{kind} as {', '.join(names)}{_left_out(left)}"


def _left_out(names: list[str]) -> str:
    return f", {' and '.join(names)} left out" if names else ""

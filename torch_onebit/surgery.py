"""One way to change the layers of a model in place, for everything that does.

What is swapped is decided before anything is made, made before anything is put in place, and taken
back when something fails: a model is changed as a whole or not at all. Layers with several names
stay one layer, and shared weights stay shared.
"""

import warnings
from collections.abc import Callable, Iterable, Iterator
from fnmatch import fnmatchcase
from typing import Any

from torch import nn
from tqdm.auto import tqdm

from torch_onebit import adapters
from torch_onebit.checks import check_callable, check_group_size, check_model, check_skip
from torch_onebit.float_layers import shape_of
from torch_onebit.heads import heads
from torch_onebit.nn.fast_path import carry_hooks
from torch_onebit.readers import readers
from torch_onebit.reports import LayerRow, Report, record, weight_bytes

FilterFn = Callable[[nn.Module, str], "bool | dict[str, Any]"]
Maker = Callable[..., "nn.Module | Callable[[], Any]"]


class Job:
    """A layer to swap: where it is, with what options, and what takes its place."""

    def __init__(self, name: str, layer: nn.Module, options: dict[str, Any]) -> None:
        self.names = [name]  # all of it
        self.layer = layer
        self.options = options
        self.places: list[tuple[nn.Module, str]] = []
        self.new: nn.Module | None = None
        self.twins = 0  # other layers that have its weight, swapped or not
        self.shared = False  # its weight is that of an earlier job
        self.note = ""
        self.figures: dict[str, float | None] = {}  # errors and seconds, for its row in the report
        self.shape = shape_of(layer)
        self.bytes_before = weight_bytes(layer)

    @property
    def name(self) -> str:
        return self.names[0]

    def row(self, step: str) -> LayerRow:
        return LayerRow(
            name=self.name,
            kind=type(self.new).__name__,
            shape=self.shape,
            group_size=getattr(self.new, "group_size", None),
            bytes_before=0 if self.shared else self.bytes_before,
            bytes_after=0 if self.shared else weight_bytes(self.new),
            steps=(step,),
            note=self.note,
            **self.figures,
        )


class Surgery:
    """One in-place change of a model: a context that takes everything back on an exception.

    Args:
        step: the name of the function that does it, for errors, the report and the progress bar.
        model: not itself a layer to swap.
        wanted: which layers it is about.
        check: ``check(layer, options)`` completes the options of a layer, raises ValueError for
            what cannot be meant, and returns why this layer must stay, or None.
        defaults: the options a layer can have, with their values.
        filter_fn: ``filter_fn(module, name)`` is false to leave the layer, true to swap it, or a
            dict of options for this layer.
        skip: patterns of names to leave, before filter_fn is asked. A pattern matches one or
            several whole parts of a dotted name, ``*`` anything: "lm_head" matches "model.lm_head",
            and "classifier" everything below it. None: the heads of transformers' models, unless
            there is a filter_fn, which decides alone.
        hint: what to use for a model that is itself a layer.
    Raises:
        TypeError: a model, filter or pattern of the wrong kind.
        ValueError: a model that is itself a layer, or options that are not allowed.
    """

    def __init__(
        self,
        step: str,
        model: nn.Module,
        wanted: Callable[[nn.Module], bool],
        *,
        check: Callable[[nn.Module, dict[str, Any]], str | None] | None = None,
        defaults: dict[str, Any] | None = None,
        filter_fn: FilterFn | None = None,
        skip: Iterable[str] | None = (),
        hint: str = "",
    ) -> None:
        _check_choice(model, filter_fn, skip)
        if wanted(model):
            raise ValueError(
                f"model must contain the layers to swap, got {type(model).__name__} itself{hint}"
            )
        self.step, self.model, self.wanted = step, model, wanted
        self.reasons: dict[int, str] = {}  # why layers stay, by their identity
        self.unused = set(skip or ())
        self._left: dict[tuple[int, ...], str] = {}  # names of layers that stay, by their weight
        self._stayed: dict[int, tuple[str, nn.Module]] = {}
        self._undo: list[tuple[nn.Module, str, nn.Module]] = []
        jobs: dict[int, Job] = {}
        stay = staying(model, and_heads=skip is None and filter_fn is None)
        holders: dict[tuple[int, ...], set[int]] = {}  # layers by their weight
        for name, parent, attribute, layer in _places(model, wanted):
            holders.setdefault(_weight_id(layer), set()).add(id(layer))
            options = self._options(layer, name, filter_fn, skip or (), defaults or {})
            if options is not None:
                reason = check(layer, options) if check else None
                reason = stay.get(id(layer), reason)
                if reason:
                    self.reasons[id(layer)] = reason
                    options = None
            if options is None:
                self._left.setdefault(_weight_id(layer), name)
                self._stayed.setdefault(id(layer), (name, layer))
                continue
            job = jobs.setdefault(id(layer), Job(name, layer, options))
            if name not in job.names:
                job.names.append(name)
            job.places.append((parent, attribute))
        self.jobs = list(jobs.values())
        for job in self.jobs:
            job.twins = len(holders[_weight_id(job.layer)]) - 1
        _warn_unused(self.unused)

    def _options(
        self,
        layer: nn.Module,
        name: str,
        filter_fn: FilterFn | None,
        skip: Iterable[str],
        defaults: dict[str, Any],
    ) -> dict[str, Any] | None:
        """The options for a layer, completed by defaults; None: leave it."""
        if pattern := _skipped(name, skip):
            self.unused.discard(pattern)
            self.reasons[id(layer)] = f"skip has {pattern!r}"
            return None
        chosen = filter_fn(layer, name) if filter_fn else True
        if not chosen and not isinstance(chosen, dict):
            self.reasons[id(layer)] = "filter_fn left it"
            return None
        chosen = chosen if isinstance(chosen, dict) else {}
        unknown = chosen.keys() - defaults.keys()
        if unknown:
            raise ValueError(
                f"filter_fn must return options among {sorted(defaults)}, got {sorted(unknown)}"
            )
        options = {**defaults, **chosen}
        if options.get("group_size") is not None:
            check_group_size(options["group_size"])
        return options

    def progress(self, show: bool) -> Iterator[Job]:
        bar = _bar(self.jobs, self.step, show)
        for job in bar:
            bar.set_postfix_str(job.name, refresh=False)
            yield job

    def install(self, job: Job, new: nn.Module) -> None:
        """Put new everywhere the layer of a job is."""
        if new is not job.layer:
            new.train(job.layer.training)
            if not any(module is job.layer for module in new.modules()):
                carry_hooks(job.layer, new)
        job.new = new
        for parent, attribute in job.places:
            self._undo.append((parent, attribute, getattr(parent, attribute)))
            setattr(parent, attribute, new)

    def share(self, share: Callable[[Any, Any], None] | None) -> None:
        """Call ``share(owner, other)`` for layers that take the place of ones with one weight."""
        first: dict[tuple[int, ...], Job] = {}
        for job in self.jobs:
            key = _weight_id(job.layer)
            owner = first.setdefault(key, job)
            if owner is not job:
                if share is not None:
                    share(owner.new, job.new)
                job.shared = True
                job.note = _join(job.note, f"tied to {owner.name}")
            elif key in self._left:
                job.note = _join(job.note, f"no longer tied to {self._left[key]}, which stays")

    def finish(self) -> Report:
        """Write the report, and warn when nothing was swapped."""
        rows = [job.row(self.step) for job in self.jobs]
        report = record(self.model, rows, self.reasons, self._stayed)
        adapters.guard(self.model)
        if not rows:
            reasons = sorted({row.reason for row in report.left if row.kind})
            what = "; ".join(reasons) or "there is no layer that it is about"
            warnings.warn(f"{self.step} swapped nothing: {what}", stacklevel=4)
        return report

    def __enter__(self) -> "Surgery":
        return self

    def __exit__(self, kind: Any, error: Any, trace: Any) -> None:
        if kind is not None:
            for parent, attribute, before in reversed(self._undo):
                setattr(parent, attribute, before)


def swap_(
    step: str,
    model: nn.Module,
    wanted: Callable[[nn.Module], bool],
    make: Maker,
    *,
    share: Callable[[Any, Any], None] | None = None,
    progress: bool = True,
    **plan: Any,
) -> nn.Module:
    """Change every layer that is wanted and accepted, in place.

    Args:
        make: ``make(layer, **options)`` is what takes the place of a layer; or a function that
            changes the layer itself, called when all the others are made.
        share: ``share(owner, other)`` for new layers whose old ones had one weight.
        plan: further arguments of ``Surgery``.
    Returns:
        model.
    """
    with Surgery(step, model, wanted, **plan) as surgery:
        changes = []
        for job in surgery.progress(progress):
            made = make(job.layer, **job.options)
            if isinstance(made, nn.Module):
                job.new = made
            else:
                job.new = job.layer
                changes.append(made)
        surgery.share(share)
        for job in surgery.jobs:
            surgery.install(job, job.new)
        for change in changes:
            change()
        surgery.finish()
    return model


def chosen_layers(
    model: nn.Module, kind: type[nn.Module], filter_fn: FilterFn | None, skip: Iterable[str]
) -> list[Any]:
    """The layers of a kind that filter_fn and skip do not leave out, for changes of the layers
    themselves; model may be one."""
    _check_choice(model, filter_fn, skip)
    layers, unused = [], set(skip)
    for name, layer in model.named_modules():
        if not isinstance(layer, kind):
            continue
        if pattern := _skipped(name, skip):
            unused.discard(pattern)
        elif filter_fn is None or filter_fn(layer, name):
            layers.append(layer)
    _warn_unused(unused)
    return layers


def change_(
    step: str,
    model: nn.Module,
    kind: type[nn.Module],
    change: Callable[[Any], object],
    *,
    filter_fn: FilterFn | None,
    skip: Iterable[str],
    progress: bool,
) -> nn.Module:
    """Change the layers of a kind that filter_fn and skip do not leave out; returns model."""
    for layer in _bar(chosen_layers(model, kind, filter_fn, skip), step, progress):
        change(layer)
    return model


def _bar(work: list[Any], step: str, show: bool) -> tqdm:
    """The work, with a progress bar when it takes more than a moment."""
    return tqdm(work, step, unit="layer", delay=1, disable=None if show else True)


def _check_choice(model: nn.Module, filter_fn: FilterFn | None, skip: Iterable[str] | None) -> None:
    check_model(model)
    if filter_fn is not None:
        check_callable("filter_fn", filter_fn)
    check_skip(skip or ())


def _skipped(name: str, skip: Iterable[str]) -> str | None:
    """The pattern of skip that a name matches."""
    return next((p for p in skip if fnmatchcase(f".{name}.", f"*.{p}.*")), None)


def _warn_unused(patterns: set[str]) -> None:
    for pattern in sorted(patterns):
        warnings.warn(f"skip: no layer has a name that matches {pattern!r}", stacklevel=5)


def _places(
    model: nn.Module, wanted: Callable[[nn.Module], bool]
) -> Iterator[tuple[str, nn.Module, str, nn.Module]]:
    """Every attribute that holds a wanted module: (name, parent, attribute, module)."""
    for name, module in list(model.named_modules(remove_duplicate=False)):
        if name and wanted(module):
            prefix, _, attribute = name.rpartition(".")
            yield name, model.get_submodule(prefix), attribute, module


def staying(model: nn.Module, and_heads: bool) -> dict[int, str]:
    """Why float layers stay, whatever the step, by their identity."""
    found = heads(model) if and_heads else {}
    found |= {layer: f"{kind} reads its weight" for layer, kind in readers(model).items()}
    found |= adapters.staying(model)
    done = {id(module) for module in model.modules() if getattr(module, "is_onebit", False)}
    return {layer: reason for layer, reason in found.items() if layer not in done}


def _weight_id(layer: nn.Module) -> tuple[int, ...]:
    """The identities of the tensors a layer keeps as its weight, levels of its own included; of the
    layer when it keeps none. Layers that share words and not levels have weights of their own."""
    kept = {**layer._parameters, **layer._buffers}
    ids = [id(kept[name]) for name in ("weight", "scales", "biases") if kept.get(name) is not None]
    return tuple(ids) or (id(layer),)


def _join(*notes: str) -> str:
    return "; ".join(note for note in notes if note)

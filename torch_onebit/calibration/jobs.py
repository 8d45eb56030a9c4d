"""The layers to quantize, everywhere they are used, and putting 1-bit ones in their places."""

from collections import Counter
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from torch_onebit.calibration.layer import Result
from torch_onebit.calibration.linear_algebra import not_finite
from torch_onebit.calibration.report import CalibrationReport
from torch_onebit.nn import OneBitEmbedding, OneBitLinear, OneBitModule, tie
from torch_onebit.surgery import FilterFn, layer_options, obstacle, places
from torch_onebit.training import LoRALinear


class Job:
    """A layer to quantize."""

    def __init__(self, name: str, layer: nn.Module, options: dict[str, Any], reason: str) -> None:
        self.names = [name]  # all of it
        self.layer = layer
        self.group_size: int = options["group_size"]
        self.symmetric: bool = options["symmetric"]
        self.reason = reason  # why it cannot be calibrated; empty when it can

    @property
    def name(self) -> str:
        return self.names[0]

    def make(self, result: Result) -> nn.Module:
        """The 1-bit layer; it shares nothing with the float one."""
        levels = result.packed, result.scales, result.biases
        options = {"group_size": self.group_size}
        if isinstance(self.layer, nn.Embedding):
            new: nn.Module = OneBitEmbedding.from_packed(*levels, self.layer.padding_idx, **options)
            return new.train(self.layer.training)
        bias = self.layer.bias
        if bias is not None:
            value = bias.detach().clone() if result.bias is None else result.bias
            bias = nn.Parameter(value, requires_grad=bias.requires_grad)
        new = OneBitLinear.from_packed(*levels, bias, **options)
        if result.lora_a is not None:
            new = LoRALinear(new, rank=len(result.lora_a))
            with torch.no_grad():
                new.lora_a.copy_(result.lora_a)
                new.lora_b.copy_(result.lora_b)
        return new.train(self.layer.training)


def find_jobs(
    model: nn.Module,
    filter_fn: FilterFn | None,
    defaults: dict[str, Any],
    report: CalibrationReport,
) -> list[Job]:
    """Every nn.Linear and nn.Embedding that the filter accepts and the format can hold.

    Raises:
        ValueError: an option that is not allowed, or weights that are not finite.
    """
    found = list(places(model, lambda module: type(module) in (nn.Linear, nn.Embedding)))
    owners: dict[int, set[int]] = {}  # layers by the identity of their weight
    for _, _, _, layer in found:
        owners.setdefault(id(layer.weight), set()).add(id(layer))
    jobs: dict[int, Job] = {}
    for name, _, _, layer in found:
        options = layer_options(filter_fn, layer, name, defaults)
        if options is None:
            continue
        hindrance = obstacle(layer, options["group_size"])
        if hindrance:
            report.skipped.append((name, hindrance))
        elif id(layer) in jobs:
            jobs[id(layer)].names.append(name)
        else:
            _check_finite(layer, name)
            reason = "embedding" if isinstance(layer, nn.Embedding) else ""
            if not layer.weight.numel():
                reason = "no weights"
            elif not reason and len(owners[id(layer.weight)]) > 1:
                reason = "shared weight"
            jobs[id(layer)] = Job(name, layer, options, reason)
    return list(jobs.values())


def _check_finite(layer: nn.Module, name: str) -> None:
    for kind in ("weight", "bias"):
        values: Tensor | None = getattr(layer, kind, None)
        if values is not None and not torch.isfinite(values).all():
            raise ValueError(
                f"model must have finite weights, got {not_finite(values)} in the {kind} of "
                f"layer '{name}'"
            )


def put(model: nn.Module, names: list[str], module: nn.Module) -> None:
    """Make module what all these names stand for."""
    for name in names:
        prefix, _, attribute = name.rpartition(".")
        setattr(model.get_submodule(prefix), attribute, module)


def install(model: nn.Module, new: Mapping[Job, nn.Module]) -> None:
    """Put the new layers in their places, in place: all of them or, should one fail, none.

    Layers whose weight was one are tied. A calibrated bias is written into the bias Parameter of
    the float layer, which the new layer takes over, unless two layers share that.
    """
    users = Counter(id(getattr(job.layer, "bias", None)) for job in new)
    first: dict[int, OneBitModule] = {}
    biases: list[tuple[Tensor, Tensor]] = []
    for job, module in new.items():
        packed = module.base if isinstance(module, LoRALinear) else module
        owner = first.setdefault(id(job.layer.weight), packed)
        if owner is not packed:
            tie(owner, packed)
        bias = getattr(packed, "bias", None)
        if bias is not None and users[id(job.layer.bias)] == 1:
            biases.append((job.layer.bias, bias.detach()))
            packed.bias = job.layer.bias
    done: list[Job] = []
    try:
        for job, module in new.items():
            done.append(job)
            put(model, job.names, module)
    except BaseException:
        for job in done:
            put(model, job.names, job.layer)
        raise
    with torch.no_grad():
        for bias, value in biases:
            bias.copy_(value)

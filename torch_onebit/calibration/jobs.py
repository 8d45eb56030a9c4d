"""The layers to quantize, everywhere they are used, and putting 1-bit ones in their places."""

from collections import Counter
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from torch_onebit import surgery
from torch_onebit.calibration.experts import packed as packed_experts
from torch_onebit.calibration.layer import Result
from torch_onebit.float_layers import is_embedding, is_experts, is_linear, obstacle
from torch_onebit.linear_algebra import not_finite
from torch_onebit.lora import LoRALinear
from torch_onebit.nn import OneBitEmbedding, OneBitLinear, tie
from torch_onebit.reports import Report
from torch_onebit.surgery import FilterFn, Surgery


class Job:
    """A layer to quantize."""

    def __init__(self, swap: surgery.Job, reason: str) -> None:
        self.swap = swap
        self.names = swap.names  # all of it
        self.layer = swap.layer
        self.group_size: int = swap.options["group_size"]
        self.symmetric: bool = swap.options["symmetric"]
        self.reason = reason  # why it cannot be calibrated; empty when it can
        self.experts = is_experts(swap.layer)

    @property
    def name(self) -> str:
        return self.names[0]

    @property
    def weights(self) -> list[Tensor]:
        """The float matrices."""
        kept = self.layer._parameters
        return [kept[name] for name in ("weight", "gate_up_proj", "down_proj") if name in kept]

    def make(self, result: Result) -> nn.Module:
        """The 1-bit layer; it shares nothing with the float one."""
        if self.experts:
            return packed_experts(self.layer, result, self.group_size)
        levels = result.packed, result.scales, result.biases
        options = {"group_size": self.group_size}
        if isinstance(self.layer, nn.Embedding):
            new: nn.Module = OneBitEmbedding.from_packed(
                *levels,
                self.layer.padding_idx,
                embedding_dim=self.layer.embedding_dim,
                scale_grad_by_freq=self.layer.scale_grad_by_freq,
                sparse=self.layer.sparse,
                **options,
            )
            return new.train(self.layer.training)
        bias = self.layer.bias
        if bias is not None:
            value = bias.detach().clone() if result.bias is None else result.bias
            bias = nn.Parameter(value, requires_grad=bias.requires_grad)
        new = OneBitLinear.from_packed(*levels, bias, in_features=self.swap.shape[1], **options)
        if result.lora_a is not None:
            new = LoRALinear(new, rank=len(result.lora_a))
            with torch.no_grad():
                new.lora_a.copy_(result.lora_a)
                new.lora_b.copy_(result.lora_b)
        return new.train(self.layer.training)


def find_jobs(
    model: nn.Module,
    filter_fn: FilterFn | None,
    skip: Iterable[str] | None,
    defaults: dict[str, Any],
) -> tuple[Surgery, list[Job]]:
    """Every layer that is not left out, and the operation that swaps them.

    Raises:
        ValueError: an option that is not allowed, or weights that are not finite.
    """
    plan = Surgery(
        "calibrate_",
        model,
        lambda module: is_linear(module) or is_embedding(module) or is_experts(module),
        check=lambda layer, options: obstacle(layer),
        defaults=defaults,
        filter_fn=filter_fn,
        skip=skip,
        hint=": use quantize_weight",
    )
    jobs = []
    for swap in plan.jobs:
        _check_finite(swap.layer, swap.name)
        reason = "embedding" if isinstance(swap.layer, nn.Embedding) else ""
        job = Job(swap, reason)
        if not all(w.numel() for w in job.weights):
            job.reason = "no weights"
        elif not reason and swap.twins:
            job.reason = "shared weight"
        jobs.append(job)
    return plan, jobs


def _check_finite(layer: nn.Module, name: str) -> None:
    for kind, values in layer.named_parameters(recurse=False):
        if not torch.isfinite(values).all():
            raise ValueError(
                f"model must have finite weights, got {not_finite(values)} in the {kind} of "
                f"layer '{name}'"
            )


def put(model: nn.Module, names: list[str], module: nn.Module) -> None:
    """Make module what all these names stand for."""
    for name in names:
        prefix, _, attribute = name.rpartition(".")
        setattr(model.get_submodule(prefix), attribute, module)


def install(plan: Surgery, new: Mapping[Job, nn.Module]) -> Report:
    """Put the new layers in their places, in place: all of them or, should one fail, none.

    Layers whose weight was one are tied. A calibrated bias is written into the bias Parameter of
    the float layer, which the new layer takes over, unless two layers share that.
    """
    users = Counter(id(getattr(job.layer, "bias", None)) for job in new)
    biases: list[tuple[Tensor, Tensor]] = []
    for job, module in new.items():
        packed = module.base if isinstance(module, LoRALinear) else module
        job.swap.new = module
        bias = getattr(packed, "bias", None)
        if bias is not None and users[id(job.layer.bias)] == 1:
            biases.append((job.layer.bias, bias.detach()))
            packed.bias = job.layer.bias
    with plan:
        plan.share(tie)
        for job, module in new.items():
            plan.install(job.swap, module)
    with torch.no_grad():
        for bias, value in biases:
            bias.copy_(value)
    return plan.finish()

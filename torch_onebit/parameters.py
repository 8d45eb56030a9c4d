"""Which parameters of a model train, which of them decay, and how many there are."""

from collections.abc import Iterable
from dataclasses import dataclass
from math import ceil
from typing import Any

from torch import nn

from torch_onebit.checks import check_model
from torch_onebit.lora import LoRALinear
from torch_onebit.nn import OneBitModule, PrepackedLinear
from torch_onebit.surgery import FilterFn, change_


def thaw_levels_(
    model: nn.Module,
    requires_grad: bool = True,
    *,
    filter_fn: FilterFn | None = None,
    skip: Iterable[str] = (),
    progress: bool = True,
) -> nn.Module:
    """Make scales and biases of 1-bit layers trainable, in place; the bits stay frozen.

    Their gradients are exact and computed from packed weights; prepacked layers are unpacked.

    Args:
        model: a model with 1-bit layers, or one of them.
        requires_grad: False to freeze them again.
        filter_fn: ``filter_fn(module, name)`` is false to leave the layer as it is.
        skip, progress: as in ``quantize_``.
    Returns:
        model.
    Raises:
        TypeError: an argument of the wrong kind.
    Warns:
        UserWarning: a pattern of skip that no layer matches.
    """

    def thaw(layer: OneBitModule) -> None:
        if isinstance(layer, PrepackedLinear) and not requires_grad:
            return  # its levels are frozen
        for levels in (layer.scales, layer.biases):
            if levels is not None:
                levels.requires_grad_(requires_grad)

    return change_(
        "thaw_levels_",
        model,
        OneBitModule,
        thaw,
        filter_fn=filter_fn,
        skip=skip,
        progress=progress,
    )


def thaw_lora_(
    model: nn.Module,
    requires_grad: bool = True,
    *,
    filter_fn: FilterFn | None = None,
    skip: Iterable[str] = (),
    progress: bool = True,
) -> nn.Module:
    """Make the low-rank products of a model trainable, in place, after it was frozen as a whole.

    Args:
        model: a model with ``LoRALinear`` layers, or one of them.
        requires_grad, filter_fn, skip, progress: as in ``thaw_levels_``.
    Returns:
        model.
    """

    def thaw(layer: LoRALinear) -> None:
        layer.lora_a.requires_grad_(requires_grad)
        layer.lora_b.requires_grad_(requires_grad)

    return change_(
        "thaw_lora_", model, LoRALinear, thaw, filter_fn=filter_fn, skip=skip, progress=progress
    )


def parameter_groups(
    model: nn.Module, *, weight_decay: float = 0.01, **options: Any
) -> list[dict[str, Any]]:
    """Groups for an optimizer that decay matrices but neither levels nor vectors.

    Scales and biases of 1-bit layers have two dimensions, so the usual rule "decay what has two or
    more" pulls them to zero: the weights they stand for shrink, and no gradient of the bits makes
    up for it.

    Args:
        model: any; parameters that do not require grad are left out.
        weight_decay: of float matrices, latent weights and low-rank matrices.
        options: of both groups, such as ``lr``.
    Returns:
        ``[{"params": …, "weight_decay": weight_decay}, {"params": …, "weight_decay": 0.0}]``.
    """
    check_model(model)
    levels = {
        id(p)
        for module in model.modules()
        if getattr(module, "is_onebit", False)
        for name, p in module.named_parameters(recurse=False)
        if name in ("scales", "biases")
    }
    trained = [p for p in model.parameters() if p.requires_grad]
    decayed = [p for p in trained if p.dim() > 1 and id(p) not in levels]
    kept = [p for p in trained if p.dim() < 2 or id(p) in levels]
    return [
        {"params": decayed, "weight_decay": weight_decay, **options},
        {"params": kept, "weight_decay": 0.0, **options},
    ]


@dataclass(frozen=True)
class ParameterCount:
    """Numbers of a model. ``parameters()`` has the float ones only: packed words are buffers."""

    packed: int  # weights of one bit
    levels: int  # scales and biases of packed layers
    floats: int  # all other parameters
    trainable: int  # of the parameters
    bytes: int  # of words, levels and other parameters; not of other buffers

    @property
    def weights(self) -> int:
        """What the float model would have: a packed weight counts one, its levels nothing."""
        return self.packed + self.floats


def count_parameters(model: nn.Module) -> ParameterCount:
    """Count what a model computes with; shared tensors once.

    ``sum(p.numel() for p in model.parameters())``, ``num_parameters()`` of transformers and
    torchinfo see no packed weights: they are a buffer. This sees both.
    """
    check_model(model)
    packed = levels = word_bytes = 0
    hidden = 0  # levels that are no parameters
    seen: set[int] = set()
    for module in model.modules():
        if not isinstance(module, OneBitModule):
            continue
        prepacked = isinstance(module, PrepackedLinear)
        words = module.prepacked if prepacked else module.weight
        if id(words) in seen:
            continue
        seen.add(id(words))
        rows, columns = (getattr(module, n) for n in (module.rows_name, module.columns_name))
        packed += rows * columns
        own = rows * ceil(columns / module.group_size) * (1 if module.symmetric else 2)
        levels += own
        hidden += own if prepacked else 0
        word_bytes += words.numel() * words.element_size()
    parameters = list(model.parameters())
    return ParameterCount(
        packed=packed,
        levels=levels,
        floats=sum(p.numel() for p in parameters) - levels + hidden,
        trainable=sum(p.numel() for p in parameters if p.requires_grad),
        bytes=word_bytes + sum(p.numel() * p.element_size() for p in parameters),
    )

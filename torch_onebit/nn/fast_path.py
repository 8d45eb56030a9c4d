"""What keeps PyTorch's fused transformer kernels away from weights that are not plain floats.

In eval without gradients ``nn.TransformerEncoderLayer`` hands ``linear1.weight`` to one fused
kernel and never calls ``linear1``: packed words would be an error there, and latent weights of
1-bit training would be used as floats, silently. It declines by itself when a module below it has
forward hooks, for the kernel would not call them. The layers here look like such modules.
"""

from collections import OrderedDict
from typing import Any

from torch import nn


class CountedOnce(OrderedDict[int, Any]):
    """Forward hooks that count as one more than there are, and are false when there are none.

    PyTorch counts hooks to decide on the fused kernel, and asks for their truth to decide whether a
    call may skip them: calls cost what they cost without a hook.
    """

    def __len__(self) -> int:
        return super().__len__() + 1

    def __bool__(self) -> bool:
        return super().__len__() > 0


class NoHooks(CountedOnce):
    """The same before there are any: bool(), which is False, runs no Python at every call."""

    __bool__ = bool

    def __setitem__(self, key: int, hook: Any) -> None:
        self.__class__ = CountedOnce
        self[key] = hook


def decline_fast_path(module: nn.Module) -> None:
    """Have ``nn.TransformerEncoderLayer`` call this module, in place."""
    module._forward_hooks = NoHooks(module._forward_hooks)


def carry_hooks(layer: nn.Module, new: nn.Module) -> None:
    """Give new the hooks of the layer whose place it takes, in place; their handles go on working.

    Handles refer to the dict of hooks, so the dict itself moves; then the other one counts once.
    """
    for name in _HOOKS:
        if getattr(layer, name):
            setattr(new, name, getattr(layer, name))
    if getattr(new, "is_onebit", False) and not isinstance(new._forward_hooks, CountedOnce):
        new._forward_pre_hooks = NoHooks(new._forward_pre_hooks)


_HOOKS = [name for name in vars(nn.Module()) if "hook" in name]

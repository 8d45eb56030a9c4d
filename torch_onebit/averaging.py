"""AveragedModel: averages that leave packed words alone, with PyTorch's own class too."""

from typing import Any

import torch
from torch import nn
from torch.nn.modules.module import register_module_module_registration_hook
from torch.optim import swa_utils

from torch_onebit.nn import OneBitModule


class AveragedModel(swa_utils.AveragedModel):
    """``torch.optim.swa_utils.AveragedModel`` that never averages packed weights.

    With ``use_buffers=True`` PyTorch averages every buffer, int32 ones as numbers: packed words
    would turn into noise. Here floating buffers are averaged and all others copied. PyTorch's own
    class becomes this one as soon as it is given a model with packed layers.
    """

    def update_parameters(self, model: nn.Module) -> None:
        """Average the parameters (and floating buffers) of model into this one."""
        super().update_parameters(model)
        with torch.no_grad():
            for averaged, source in zip(self.module.buffers(), model.buffers(), strict=True):
                if not averaged.is_floating_point():
                    averaged.copy_(source)


def register() -> None:
    """Have torch.nn tell us of models that are put into an AveragedModel."""
    register_module_module_registration_hook(_protect)


def _protect(owner: nn.Module, name: str, model: Any) -> None:
    if not isinstance(owner, swa_utils.AveragedModel) or isinstance(owner, AveragedModel):
        return
    if model is None or not any(isinstance(m, OneBitModule) for m in model.modules()):
        return
    if type(owner) is not swa_utils.AveragedModel:
        raise ValueError(
            "the class that averages packed layers must derive from torch_onebit.AveragedModel, "
            f"got {type(owner).__name__}"
        )
    owner.__class__ = AveragedModel

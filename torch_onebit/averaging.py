"""AveragedModel: an average of weights that leaves packed words alone."""

import torch
from torch import nn
from torch.optim import swa_utils

from torch_onebit.nn.forms import unprepack_all


class AveragedModel(swa_utils.AveragedModel):
    """``torch.optim.swa_utils.AveragedModel`` that never averages packed weights.

    With ``use_buffers=True`` floating buffers are averaged and all others copied. PyTorch's own
    class would average packed words, int32 buffers, as numbers: given packed layers it refuses
    ``use_buffers=True``. Without ``use_buffers`` both are the same.
    """

    copies_words = True

    def update_parameters(self, model: nn.Module) -> None:
        """Average the parameters (and floating buffers) of model into this one."""
        unprepack_all(self, model)  # parameters are gone through side by side
        super().update_parameters(model)
        with torch.no_grad():
            for averaged, source in zip(self.module.buffers(), model.buffers(), strict=True):
                if not averaged.is_floating_point():
                    averaged.copy_(source)

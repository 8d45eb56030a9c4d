"""PyTorch's AveragedModel must not average packed words as if they were numbers.

Asked to average buffers (``use_buffers=True``) it takes every one of them, int32 or not, and
nothing that a layer can say about its buffers keeps it from that. So the first packed layer that is
made has torch.nn tell of models that are put into another module; an AveragedModel that is given
packed layers then refuses to update with ``use_buffers=True``. Otherwise it copies buffers, which
is right.
"""

from functools import cache
from typing import Any

from torch import nn
from torch._C._dynamo import eval_frame
from torch.nn.modules.module import register_module_module_registration_hook
from torch.optim import swa_utils

from torch_onebit.nn.forms import unprepack_all


class CheckedUpdate:
    """``update_parameters`` of one AveragedModel of PyTorch that holds packed layers."""

    def __init__(self, owner: swa_utils.AveragedModel) -> None:
        self.owner = owner

    def __call__(self, model: nn.Module) -> None:
        if self.owner.use_buffers:
            raise ValueError(
                "use_buffers must be False for packed layers, whose words would be averaged as "
                "numbers, got True: use torch_onebit.AveragedModel"
            )
        unprepack_all(self.owner, model)  # parameters are gone through side by side
        type(self.owner).update_parameters(self.owner, model)


@cache
def watch_averages() -> None:
    """Have torch.nn tell of models that are put into an AveragedModel; once per process."""
    # Compiled autograd would trace the hook while it makes a module, and fails on what is half
    # made. torch.compiler.disable does this too and takes a second to import.
    skip = eval_frame._FrameExecStrategy(
        eval_frame._FrameAction.SKIP, eval_frame._FrameAction.DEFAULT
    )
    eval_frame.set_code_exec_strategy(_check.__code__, skip)
    register_module_module_registration_hook(_check)


def _check(owner: nn.Module, name: str, model: Any) -> None:
    if not isinstance(owner, swa_utils.AveragedModel) or getattr(owner, "copies_words", False):
        return
    if model is not None and any(getattr(m, "is_onebit", False) for m in model.modules()):
        owner.update_parameters = CheckedUpdate(owner)

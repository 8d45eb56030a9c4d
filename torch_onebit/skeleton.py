"""The model that a config describes, without its weights."""

from typing import Any

import torch
from torch import nn

from torch_onebit.checkpoint import CheckpointError

MISSING = (
    "model must be given, or the packages transformers and accelerate be installed, which build it "
    "from its config: pip install torch_onebit[transformers]"
)


def skeleton(config: dict[str, Any], dtype: torch.dtype | None) -> nn.Module:
    """A causal language model of transformers, its parameters on the meta device.

    Raises:
        ImportError: transformers or accelerate is not installed.
        CheckpointError: a config that transformers can make no model of.
    """
    try:
        import accelerate
        import transformers
    except ImportError as error:
        raise ImportError(MISSING) from error
    known = transformers.AutoConfig
    kind = config.get("model_type")
    if not isinstance(kind, str):
        raise CheckpointError(f"config must have a model_type, got {kind!r}")
    quantization = ("quantization", "quantization_config")
    plain = {k: v for k, v in config.items() if k not in (*quantization, "model_type")}
    options = {} if dtype is None else {"dtype": dtype}
    try:
        described = known.for_model(kind, **plain)
        with accelerate.init_empty_weights(include_buffers=False):
            model = transformers.AutoModelForCausalLM.from_config(described, **options)
    except Exception as error:  # of whatever kind: it is the file's doing
        what = " ".join(str(error).split())[:200]
        raise CheckpointError(
            "config must describe a language model that transformers can make, got "
            f"{type(error).__name__}: {what}"
        ) from error
    tie_empty_(model)
    return model


def tie_empty_(model: nn.Module) -> None:
    """Tie what a model of transformers ties, if it is on the meta device: accelerate's
    ``init_empty_weights`` makes a parameter of its own of each of them."""
    tied = {name for pair in getattr(model, "all_tied_weights_keys", {}).items() for name in pair}
    if any(parameter.is_meta for name, parameter in model.named_parameters() if name in tied):
        model.tie_weights()

"""The model that a config describes, without its weights."""

from typing import Any

import torch
from torch import nn

MISSING = (
    "model must be given, or the packages transformers and accelerate be installed, which build it "
    "from its config: pip install torch_onebit[transformers]"
)


def skeleton(config: dict[str, Any], dtype: torch.dtype | None) -> nn.Module:
    """A causal language model of transformers, its parameters on the meta device.

    Raises:
        ImportError: transformers or accelerate is not installed.
        ValueError: a model_type that transformers does not know.
    """
    try:
        import accelerate
        import transformers
    except ImportError as error:
        raise ImportError(MISSING) from error
    known = transformers.AutoConfig
    kind = config.get("model_type")
    if not isinstance(kind, str):
        raise ValueError(f"config must have a model_type, got {kind!r}")
    quantization = ("quantization", "quantization_config")
    plain = {k: v for k, v in config.items() if k not in (*quantization, "model_type")}
    described = known.for_model(kind, **plain)
    with accelerate.init_empty_weights(include_buffers=False):
        options = {} if dtype is None else {"dtype": dtype}
        model = transformers.AutoModelForCausalLM.from_config(described, **options)
    model.tie_weights()
    return model

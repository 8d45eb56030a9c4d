"""What a packed layer accepts from a state_dict."""

from typing import Any

import torch
from torch import Tensor

from torch_onebit.checks import LEVEL_DTYPES


def legal_entries(
    state_dict: dict[str, Any], prefix: str, error_msgs: list[str]
) -> dict[str, Any] | None:
    """state_dict with words as int32, or None and a message where an entry is of another kind.

    Copying would convert, and float32 keeps 24 of the 32 bits of a word.
    """
    key = prefix + "weight"
    stored = state_dict.get(key)
    if isinstance(stored, Tensor) and stored.dtype == torch.uint32:
        # MLX stores the words so: the same bits, viewed. The caller's dict stays as it was.
        state_dict = {**state_dict, key: stored.view(torch.int32)}
    elif isinstance(stored, Tensor) and stored.dtype != torch.int32:
        error_msgs.append(f"{key} must be int32 or uint32, got {stored.dtype}")
        return None
    for key in (prefix + "scales", prefix + "biases"):
        stored = state_dict.get(key)
        if isinstance(stored, Tensor) and stored.dtype not in LEVEL_DTYPES:
            error_msgs.append(
                f"{key} must be float32, float16, bfloat16 or float64, got {stored.dtype}"
            )
            return None
    return state_dict

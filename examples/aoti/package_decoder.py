"""A decoder of transformers as an AOTInductor package: one token and its position to logits.

Keys and values are buffers of the package, so who runs it passes two numbers (decode.cpp).
"""

from typing import Any

import torch
import transformers
from torch import Tensor, nn

import torch_onebit


class Step(nn.Module):
    """One token after others, of a model of transformers with room for ``length`` of them."""

    def __init__(self, model: Any, length: int) -> None:
        super().__init__()
        config = model.config
        self.model = model
        self.cache = transformers.StaticCache(config=config, max_cache_len=length)
        self.cache.early_initialization(
            1, config.num_key_value_heads, config.head_dim, model.dtype, model.device
        )
        for i, layer in enumerate(self.cache.layers):
            self.register_buffer(f"keys_{i}", layer.keys, persistent=False)
            self.register_buffer(f"values_{i}", layer.values, persistent=False)

    def forward(self, token: Tensor, position: Tensor) -> Tensor:
        """``token`` and ``position`` ``[1, 1]``, int64, to logits ``[1, vocabulary]``."""
        for i, layer in enumerate(self.cache.layers):
            layer.keys, layer.values = self.get_buffer(f"keys_{i}"), self.get_buffer(f"values_{i}")
            layer.cumulative_length = position.view(()).clone()  # tokens before this one
        return self.model(token, past_key_values=self.cache, position_ids=position).logits[:, -1]


def package(step: Step, path: str) -> None:
    number = torch.zeros(1, 1, dtype=torch.long)
    with torch.no_grad():
        exported = torch.export.export(step, (number, number.clone()))
        torch._inductor.aoti_compile_and_package(
            exported, package_path=path, inductor_configs=torch_onebit.compile_options()
        )

"""LoRA of the package peft over 1-bit layers."""

from typing import Any

import torch.nn.functional as F
from peft import LoraConfig
from peft.tuners.lora import layer as lora
from torch import Tensor, nn

from torch_onebit import adapters
from torch_onebit.checks import check_kind
from torch_onebit.float_layers import is_linear
from torch_onebit.heads import heads
from torch_onebit.nn import OneBitEmbedding, OneBitLinear

# Other initialisations read the float weights, or change them.
INITIALISATIONS = (True, False, "gaussian", "orthogonal")


ALL_LINEAR = "all-linear"  # of peft, which knows float layers only


def onebit_lora(config: LoraConfig, model: nn.Module | None = None) -> LoraConfig:
    """Make a LoraConfig know ``OneBitLinear`` and ``OneBitEmbedding``; the bits stay packed.

    PEFT keeps this out of the file of the adapter: call it on the config again to load one,
    ``config = onebit_lora(PeftConfig.from_pretrained(path))`` and
    ``PeftModel.from_pretrained(model, path, config=config)``.

    Args:
        config: of peft; changed in place.
        model: where ``target_modules`` is "all-linear": the model, of which that becomes the names
            of all linear layers, packed or float, but heads.
    Returns:
        config.
    Raises:
        TypeError: not a LoraConfig.
        ValueError: an initialisation that needs float weights, other than ``INITIALISATIONS``.
            (DoRA and other variants are refused by PEFT.) "all-linear" without a model.
    """
    check_kind("config", config, LoraConfig, "a peft.LoraConfig")
    if config.init_lora_weights not in INITIALISATIONS:
        raise ValueError(
            f"init_lora_weights must be one of {INITIALISATIONS} over 1-bit layers, "
            f"got {config.init_lora_weights!r}"
        )
    targets = config.target_modules
    if isinstance(targets, str) and targets.lower() == ALL_LINEAR:
        if model is None:
            raise ValueError(f"model must be given where target_modules is {targets!r}, got None")
        config.target_modules = _all_linear(model)
    config._register_custom_module({OneBitLinear: LoraOneBitLinear})
    config._register_custom_module({OneBitEmbedding: LoraOneBitEmbedding})
    return config


def _all_linear(model: nn.Module) -> set[str]:
    left = adapters.staying(model) | heads(model)
    return {
        name.removeprefix("base_model.model.").removesuffix(".base_layer")
        for name, module in model.named_modules()
        if (isinstance(module, OneBitLinear) or is_linear(module)) and id(module) not in left
    }


class _OneBitBase:
    """What a LoRA layer must not do to packed words."""

    @property
    def lora_variants(self) -> dict[tuple[str, ...], None]:
        return {(): None}

    merge = staticmethod(adapters.refuse_merge)


class LoraOneBitLinear(_OneBitBase, lora.Linear):
    """``y = onebit(x) + B(A(dropout(x))) * scaling``."""

    def _get_in_out_features(self, module: nn.Module) -> tuple[int, int]:
        return module.in_features, module.out_features


class LoraOneBitEmbedding(_OneBitBase, lora.Embedding):
    """Rows of the packed matrix, and of ``(B A).T * scaling`` added to them."""

    def _get_in_out_features(self, module: nn.Module) -> tuple[int, int]:
        return module.num_embeddings, module.embedding_dim

    def _embed(self, input: Tensor, weight: Tensor, *hooks: Any, **named: Any) -> Tensor:
        return F.embedding(input, weight, padding_idx=self.get_base_layer().padding_idx)


__all__ = ["INITIALISATIONS", "LoraOneBitEmbedding", "LoraOneBitLinear", "onebit_lora"]

"""Telling transformers about OneBitConfig, and about MLX's folders, which name no method."""

from transformers import PreTrainedConfig
from transformers.quantizers import auto, register_quantization_config, register_quantizer

from torch_onebit.transformers.config import OneBitConfig, of_mlx
from torch_onebit.transformers.quantizer import OneBitQuantizer


def register() -> None:
    """Register once; the second time nothing happens."""
    if "onebit" in auto.AUTO_QUANTIZATION_CONFIG_MAPPING:
        return
    register_quantization_config("onebit")(OneBitConfig)
    register_quantizer("onebit")(OneBitQuantizer)
    auto.LOADING_ATTRIBUTES_CONFIG_TYPES += (OneBitConfig,)  # a list without a hook
    _know_mlx()


def _know_mlx() -> None:
    """transformers 5 asks for ``quant_method`` in two places and offers no hook; MLX's folders have
    none, and older ones have the block under ``quantization`` only."""
    from_dict = auto.AutoQuantizationConfig.from_dict.__func__
    supports = auto.AutoHfQuantizer.supports_quant_method
    config_from_dict = PreTrainedConfig.from_dict.__func__

    def read(cls, described, **options):
        return from_dict(cls, of_mlx(described), **options)

    def read_config(cls, described, **options):
        block = described.get("quantization")
        if "quantization_config" not in described and of_mlx(block) is not block:
            described = {**described, "quantization_config": of_mlx(block)}
        return config_from_dict(cls, described, **options)

    auto.AutoQuantizationConfig.from_dict = classmethod(read)
    auto.AutoHfQuantizer.supports_quant_method = staticmethod(lambda d: supports(of_mlx(d)))
    PreTrainedConfig.from_dict = classmethod(read_config)

"""OneBitQuantizer: what transformers calls while it loads, trains and saves a 1-bit model."""

import re
import weakref
from collections.abc import Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from transformers.core_model_loading import ConversionOps, WeightTransform
from transformers.integrations.accelerate import load_offloaded_parameter
from transformers.quantizers import HfQuantizer
from transformers.quantizers.quantizers_utils import should_convert_module

from torch_onebit.checkpoint import CheckpointError
from torch_onebit.checkpoint.mlx import description
from torch_onebit.checks import LEVEL_DTYPES, check_model
from torch_onebit.float_layers import (
    experts_obstacle,
    is_conv1d,
    is_embedding,
    is_experts,
    is_linear,
    matrix,
    projection_shapes,
)
from torch_onebit.methods import quantize_weight
from torch_onebit.nn import OneBitEmbedding, OneBitExperts, OneBitLinear, OneBitModule, tie
from torch_onebit.quantizing import dequantize_
from torch_onebit.saving import layers_once, mlx_names, packed_layers
from torch_onebit.surgery import staying
from torch_onebit.symmetric import symmetrize_
from torch_onebit.transformers.config import OneBitConfig
from torch_onebit.transformers.stored import DecodeAffine, StoredLayers, read_layers

ENTRIES = ("weight", "scales", "biases")


class OneBitQuantizer(HfQuantizer):
    """Swaps layers before the weights are loaded; packs and views them as they come."""

    requires_calibration = False

    def __init__(self, quantization_config: OneBitConfig, **options: Any) -> None:
        super().__init__(quantization_config, **options)
        self._ties: dict[str, str] = {}  # paths of layers: the tied one, the one that has weights
        self._experts: set[str] = set()  # paths of those to quantize on load
        self._transposed: set[str] = set()  # and those of layers that store their transpose
        self._stored: StoredLayers | None = None
        self._model: weakref.ref[nn.Module] | None = None

    # --- before loading ---

    def _process_model_before_weight_loading(
        self, model: nn.Module, checkpoint_files: list[str] | None = None, **options: Any
    ) -> nn.Module:
        if self.pre_quantized:
            config = self.quantization_config
            self._stored = stored = read_layers(model, checkpoint_files, config.other_bits)
            wanted = stored.packed
        else:
            wanted = {path: self._options(layer) for path, layer in self._chosen(model)}
            self._experts = {path for path in wanted if is_experts(model.get_submodule(path))}
            self._transposed = {path for path in wanted if is_conv1d(model.get_submodule(path))}
        tied = {
            target.removesuffix(".weight"): source.removesuffix(".weight")
            for target, source in model.all_tied_weights_keys.items()
        }
        self._ties = {target: source for target, source in tied.items() if source in wanted}
        for target, source in tied.items():
            if source in wanted:
                wanted[target] = wanted[source]
            else:  # what shares a float weight stays float
                wanted.pop(target, None)
        for path, layer_options in wanted.items():
            if path not in self._experts:  # those stay float until transformers has merged them
                model.set_submodule(path, _empty(path, model.get_submodule(path), layer_options))
        _declare_ties(model, self._ties)
        return model

    def _chosen(self, model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
        """Layers to quantize on load."""
        chosen = self.quantization_config.modules_to_not_convert
        left = [*(chosen or ()), *(model._keep_in_fp32_modules or ())]
        stays = staying(model, and_heads=chosen is None)
        for path, layer in list(model.named_modules()):
            if id(layer) not in stays and _fits(layer, self.quantization_config.group_size):
                if should_convert_module(path, left):
                    yield path, layer

    def _options(self, layer: nn.Module) -> dict[str, Any]:
        config = self.quantization_config
        return {
            "group_size": config.group_size,
            "symmetric": config.symmetric,
            "dtype": (layer.down_proj if is_experts(layer) else layer.weight).dtype,
        }

    # --- while loading ---

    def param_needs_quantization(self, model: nn.Module, param_name: str, **options: Any) -> bool:
        path, _, entry = param_name.rpartition(".")
        packed = entry == "weight" and isinstance(model.get_submodule(path), OneBitModule)
        return (packed or path in self._experts) and not self.pre_quantized

    def get_quantize_ops(self) -> ConversionOps:
        return _Quantize(self.quantization_config, self._transposed)

    def update_weight_conversions(
        self, weight_conversions: list[WeightTransform], model: nn.Module
    ) -> list[WeightTransform]:
        if self._stored is None:
            return weight_conversions
        return [*weight_conversions, *self._stored.conversions]

    def get_new_dtype(
        self, converter: Any, param: Any, dtype: torch.dtype | None
    ) -> torch.dtype | None:
        """Levels keep the dtype of the file, and what is to be decoded too."""
        if converter.target_patterns[0].rpartition(".")[2] in ("scales", "biases"):
            return None
        if any(isinstance(op, DecodeAffine) for op in getattr(converter, "operations", ())):
            return None
        return super().get_new_dtype(converter, param, dtype)

    # --- after loading ---

    def _process_model_after_weight_loading(self, model: nn.Module, **options: Any) -> nn.Module:
        for layer in model.modules():
            if isinstance(layer, OneBitModule):
                if layer.weight.is_meta and not self.pre_quantized:
                    raise ValueError(
                        "offload_buffers must be False where a model is quantized on load, got "
                        "True: save it, and load that"
                    )
                layer.weight = layer.weight.view(torch.int32)
                layer.scales.requires_grad_(False)
                if layer.biases is not None:
                    layer.biases.requires_grad_(False)
        for target, source in self._ties.items():
            tie(model.get_submodule(source), model.get_submodule(target))
        if self.pre_quantized and self.quantization_config.symmetric:
            symmetrize_(model)
        if self._stored is not None:  # others are reverted when the model is saved
            ours = self._stored.conversions
            kept = [c for c in model._weight_conversions if c not in ours]
            model._weight_conversions = kept
        self.pre_quantized = True  # what is saved from now on
        self._model = weakref.ref(model)
        return model

    # --- saving and training ---

    def is_serializable(self) -> bool:
        return True

    def get_state_dict_and_metadata(self, model: nn.Module) -> tuple[dict[str, Tensor], dict]:
        """As mlx-lm reads it: words as uint32, biases in symmetric layers too, tied layers once."""
        state = dict(model.state_dict())
        layers = dict(packed_layers(model, partial(load_offloaded_parameter, model)))
        for path, layer in model.named_modules(remove_duplicate=False):
            if isinstance(layer, OneBitModule):
                for entry in ENTRIES:
                    state.pop(f"{path}.{entry}", None)
        for path, packed in layers.items():
            scales, biases = packed.scales, packed.biases
            state[f"{path}.weight"] = packed.weight.view(torch.uint32)
            state[f"{path}.scales"] = scales
            state[f"{path}.biases"] = -scales / 2 if biases is None else biases
        self._describe(model)
        return state, {}

    def _describe(self, model: nn.Module) -> None:
        layers = {in_file: layer.group_size for in_file, _, layer in layers_once(model)}
        if not layers:
            raise CheckpointError(
                "model must have 1-bit layers, got none: model.dequantize() makes it a float one "
                "for transformers too"
            )
        modules = [m for m in model.modules() if isinstance(m, OneBitModule)]
        block = description(layers)["quantization"]
        self.quantization_config.group_size = block["group_size"]
        self.quantization_config.symmetric = all(m.symmetric for m in modules)
        model.config.quantization_config = self.quantization_config
        model.config.quantization = block  # where mlx-lm looks first
        vars(model.config).update(mlx_names(model.config))

    def _dequantize(self, model: nn.Module, dtype: Any = None) -> nn.Module:
        """What ``model.dequantize()`` does: float layers again, saved as those of any model."""
        dequantize_(model)
        if dtype is not None:  # a name in a config that was saved
            model.to(getattr(torch, dtype) if isinstance(dtype, str) else dtype)
        for target, source in self._ties.items():
            for entry in ENTRIES:
                model._tied_weights_keys.pop(f"{target}.{entry}")
            model._tied_weights_keys[f"{target}.weight"] = f"{source}.weight"
            model.all_tied_weights_keys[f"{target}.weight"] = f"{source}.weight"
        vars(model.config).pop("quantization", None)
        return model

    @property
    def is_trainable(self) -> bool:
        return True

    @property
    def is_qat_trainable(self) -> bool:
        """Whether ``Trainer`` may train the model without adapters: something of it does train."""
        model = self._model and self._model()
        return model is not None and any(p.requires_grad for p in model.parameters())

    @property
    def is_compileable(self) -> bool:
        return True


class _Quantize(ConversionOps):
    """A float weight, as it comes from the file, to packed words and levels."""

    def __init__(self, config: OneBitConfig, transposed: set[str]) -> None:
        self._config = config
        self._transposed = transposed

    def convert(self, input_dict: dict[str, Any], *args: Any, **options: Any) -> dict[str, Tensor]:
        name, value = next(iter(input_dict.items()))
        weight = value[0] if isinstance(value, list) else value
        path, _, entry = name.rpartition(".")
        if entry == "weight":
            return self._packed(path, weight.t() if path in self._transposed else weight)
        model = options["model"]
        experts = model.get_submodule(path)
        if is_experts(experts):
            form = {"group_size": self._config.group_size, "symmetric": self._config.symmetric}
            model.set_submodule(path, _empty(path, experts, {**form, "dtype": weight.dtype}))
        options["missing_keys"].discard(name)
        parts = {"down_proj": weight}
        if entry == "gate_up_proj":
            gate, up = weight.chunk(2, dim=1)
            parts = {"gate_proj": gate, "up_proj": up}
        tensors: dict[str, Tensor] = {}
        for projection, part in parts.items():
            tensors |= self._packed(f"{path}.{projection}", part)
            # Words stay in memory, as those of other layers: transformers knows no buffers that
            # were not there before, and would put these on the disk.
            words = tensors.pop(f"{path}.{projection}.weight")
            words._is_hf_initialized = True
            model.get_submodule(f"{path}.{projection}").weight = words
        return tensors

    def _packed(self, path: str, weight: Tensor) -> dict[str, Tensor]:
        config = self._config
        tensors = quantize_weight(
            weight.flatten(0, -2), config.method, config.group_size, symmetric=config.symmetric
        )
        named = zip(ENTRIES, tensors, strict=True)
        return {
            f"{path}.{entry}": tensor.view(*weight.shape[:-1], tensor.shape[-1])
            for entry, tensor in named
            if tensor is not None
        }


def attach_quantizer_(model: nn.Module) -> nn.Module:
    """Let ``save_pretrained`` and ``Trainer`` take a model of transformers that ``quantize_``,
    ``calibrate_``, ``convert_`` or ``load_gguf`` made 1-bit, in place.

    Returns:
        model.
    Raises:
        ValueError: a model that is not of transformers, or has no 1-bit layers.
    """
    check_model(model)
    if not hasattr(model, "all_tied_weights_keys"):
        raise ValueError(f"model must be of transformers, got {type(model).__name__}")
    if not any(isinstance(m, OneBitModule) for m in model.modules()):
        raise CheckpointError("model must have 1-bit layers, got none")
    quantizer = OneBitQuantizer(OneBitConfig(), pre_quantized=True)
    quantizer._ties = {
        target.removesuffix(".weight"): source.removesuffix(".weight")
        for target, source in model.all_tied_weights_keys.items()
        if isinstance(model.get_submodule(source.rpartition(".")[0]), OneBitModule)
    }
    _declare_ties(model, quantizer._ties)
    quantizer._model = weakref.ref(model)
    quantizer._describe(model)
    model.hf_quantizer = quantizer
    model.is_quantized = True
    model.quantization_method = "onebit"
    model.config._is_quantized = True
    return model


def _fits(layer: nn.Module, group_size: int) -> bool:
    if is_experts(layer):
        shapes = projection_shapes(layer).values()
        return experts_obstacle(layer) is None and not any(s[-1] % group_size for s in shapes)
    return (
        (is_linear(layer) or is_embedding(layer))
        and matrix(layer).shape[1] % group_size == 0
        and layer.weight.dtype in LEVEL_DTYPES
        and getattr(layer, "max_norm", None) is None
    )


def _empty(path: str, layer: nn.Module, options: dict[str, Any]) -> nn.Module:
    """The 1-bit layer in the place of a float one, without weights."""
    new: nn.Module
    if isinstance(layer, nn.Embedding):
        sizes = (layer.num_embeddings, layer.embedding_dim, layer.padding_idx)
        dtype = layer.weight.dtype  # the model's: levels may have another
        new = OneBitEmbedding(*sizes, device="meta", output_dtype=dtype, **options)
    elif is_linear(layer):
        rows, columns = matrix(layer).shape
        new = OneBitLinear(columns, rows, False, device="meta", **options)
        new.bias = layer.bias
    elif is_experts(layer):
        each = {name: options.get(name, options) for name in projection_shapes(layer)}
        new = OneBitExperts.empty(layer, each)
    else:
        raise CheckpointError(f"{path} must be an nn.Linear or nn.Embedding, got {type(layer)}")
    return new.train(layer.training)


def _declare_ties(model: nn.Module, ties: dict[str, str]) -> None:
    """Tell a model of transformers that its tied layers share three tensors, which are not in the
    file and which ``tie`` shares: its own way is to set Parameters named ``weight``."""
    others = dict(model._tied_weights_keys or {})
    for target in ties:
        model.all_tied_weights_keys.pop(f"{target}.weight", None)
        others.pop(f"{target}.weight", None)
    if ties:
        patterns = {rf"^{re.escape(target)}\.(weight|scales|biases)$" for target in ties}
        ignored = set(model._keys_to_ignore_on_load_missing or ())
        model._keys_to_ignore_on_load_missing = ignored | patterns
        model._tied_weights_keys = others | {
            f"{target}.{entry}": f"{source}.{entry}"
            for target, source in ties.items()
            for entry in ENTRIES
        }

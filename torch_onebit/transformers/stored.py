"""What an MLX folder holds of a model of transformers: layers of 1 bit, and of others."""

import re
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import (
    Concatenate,
    ConversionOps,
    WeightConverter,
    WeightRenaming,
    WeightTransform,
    rename_source_key,
)

from torch_onebit.checkpoint import CheckpointError, Layer, MLXCheckpoint
from torch_onebit.checkpoint.mlx import ENTRIES, decode_affine
from torch_onebit.float_layers import (
    experts_obstacle,
    is_conv1d,
    is_embedding,
    is_experts,
    is_linear,
    matrix,
    projection_shapes,
)

DTYPES = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16, "F64": torch.float64}
EXPERTS = WeightRenaming(r"\.switch_mlp\.", ".experts.")  # mlx-lm's name for them


@dataclass
class StoredLayers:
    """Layers of a folder by the paths they have in the model."""

    packed: dict[str, dict[str, Any]] = field(default_factory=dict)  # options of 1-bit layers
    conversions: list[WeightTransform] = field(default_factory=list)  # from the file to the model


class DecodeAffine(ConversionOps):
    """Words, scales and biases of one layer, or of gate and up, to the weight they stand for."""

    def __init__(self, layers: list[Layer]) -> None:
        self._layers = layers

    def convert(
        self,
        input_dict: dict[str, list[Tensor]],
        source_patterns: list[str],
        target_patterns: list[str],
        **options: Any,
    ) -> dict[str, Tensor]:
        tensors = [input_dict[pattern][0] for pattern in source_patterns]
        parts = [
            decode_affine(tensors[3 * i : 3 * i + 3], layer) for i, layer in enumerate(self._layers)
        ]
        dtype = options["model"].get_parameter(options["full_layer_name"]).dtype
        weight = parts[0] if len(parts) == 1 else torch.cat(parts, 1)
        return {target_patterns[0]: weight.to(dtype)}


def read_layers(
    model: nn.Module, checkpoint_files: list[str] | None, other_bits: str
) -> StoredLayers:
    """Describe what is quantized in a folder; nothing is read but headers.

    Raises:
        CheckpointError: a layer that the model cannot hold, or of other bits, unless those are to
            be dequantized.
    """
    if not checkpoint_files:
        raise CheckpointError("a 1-bit model must be loaded from files of safetensors, got none")
    source = MLXCheckpoint(Path(checkpoint_files[0]).parent)
    modules = dict(model.named_modules())
    experts = {
        path: projection_shapes(module)
        for path, module in modules.items()
        if is_experts(module) and experts_obstacle(module) is None
    }
    shapes = {
        path: tuple(matrix(module).shape)
        for path, module in modules.items()
        if isinstance(getattr(module, "weight", None), Tensor)
    }
    shapes |= {f"{path}.{name}": s for path, own in experts.items() for name, s in own.items()}
    rename = _renaming(model, shapes)
    found = {rename(path): path for path in source.paths}
    layers: dict[str, Layer] = {}
    for name, path in found.items():
        if name not in shapes:
            continue  # transformers reports what the model lacks
        layer = layers[name] = source.layer(path, shapes[name][-1])
        if layer.shape != shapes[name]:
            raise CheckpointError(
                f"{name} must have shape {list(shapes[name])} as in the model, "
                f"got {list(layer.shape)}"
            )
        module = modules.get(name)
        if module and is_conv1d(module) and not layer.one_bit:
            raise CheckpointError(f"{name} must be of 1 bit in this model, got {layer}")
        if layer.one_bit and module and not (is_linear(module) or is_embedding(module)):
            raise CheckpointError(
                f"{name} must be an nn.Linear or nn.Embedding (no subclass) to hold 1-bit weights, "
                f"got {type(module).__name__}"
            )
    others = [f"{name}: {layer}" for name, layer in layers.items() if not layer.one_bit]
    if others and other_bits == "error":
        raise CheckpointError(
            f"layers must be of 1 bit, got {', '.join(others[:5])} ({len(others)} in all); "
            "quantization_config=OneBitConfig(other_bits='dequantize') makes them dense"
        )
    stored = StoredLayers(conversions=[EXPERTS])
    options = {
        name: {
            "group_size": layer.group_size,
            "dtype": DTYPES[source.dtype(f"{found[name]}.scales")],
        }
        for name, layer in layers.items()
        if layer.one_bit
    }

    def dense(target: str, *names: str) -> None:
        patterns = [_pattern(model, f"{name}.{entry}") for name in names for entry in ENTRIES]
        operation = DecodeAffine([layers[name] for name in names])
        stored.conversions.append(WeightConverter(patterns, target, [operation]))

    for path in experts:
        gate, up, down = names = [f"{path}.{name}" for name in experts[path]]
        have = [name for name in names if name in layers]
        if have and have != names:
            lacking = min(set(names) - set(have))
            raise CheckpointError(f"{have[0]} must have {lacking} beside it, got none")
        if have and all(name in options for name in names):
            stored.packed[path] = {n: options[f"{path}.{n}"] for n in experts[path]}
        elif have:
            dense(f"{path}.gate_up_proj", gate, up)
            dense(f"{path}.down_proj", down)
        else:  # float stacks, if the folder has those
            parts = [_pattern(model, f"{name}.weight") for name in (gate, up, down)]
            merge = WeightConverter(parts[:2], f"{path}.gate_up_proj", [Concatenate(dim=1)])
            stored.conversions += [merge, WeightRenaming(parts[2], f"{path}.down_proj")]
        for name in have:
            del layers[name]
    for name, layer in layers.items():
        if layer.one_bit:
            stored.packed[name] = options[name]
        else:
            dense(f"{name}.weight", name)
    return stored


def _pattern(model: nn.Module, name: str) -> str:
    """A name of the model in a file, which may be of one with a head, or without."""
    return r"(?<!\w)" + re.escape(name.removeprefix(f"{model.base_model_prefix}."))


def _renaming(model: nn.Module, shapes: dict[str, tuple[int, ...]]) -> Callable[[str], str]:
    """What the model calls a layer of a file: transformers keeps old names in files, and the file
    may be of a model with a head, or without."""
    state = {**model.state_dict(), **{f"{path}.weight": path for path in shapes}}
    mapping = [*get_model_conversion_mapping(model), EXPERTS]
    renamings = [entry for entry in mapping if isinstance(entry, WeightRenaming)]

    def rename(path: str) -> str:
        for some in (renamings, []):
            key, _ = rename_source_key(
                f"{path}.weight", some, [], model.base_model_prefix, meta_state_dict=state
            )
            if key in state:
                break
        return key.removesuffix(".weight")

    return rename

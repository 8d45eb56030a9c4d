"""save_checkpoint, export_gguf: a model into a file that others read."""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from torch_onebit.checkpoint import CheckpointError, Packed, save_gguf, save_mlx
from torch_onebit.checkpoint.gguf_tokenizer import tokenizer_entries
from torch_onebit.checkpoint.mlx import MAX_SHARD_BYTES
from torch_onebit.checks import check_count, check_model
from torch_onebit.float_layers import experts_obstacle, is_experts
from torch_onebit.nn import OneBitModule, OneBitStack, PrepackedLinear


def save_checkpoint(
    model: nn.Module,
    path: str | Path,
    *,
    config: dict[str, Any] | None = None,
    max_shard_bytes: int = MAX_SHARD_BYTES,
) -> None:
    """Write a 1-bit model as an MLX checkpoint, a folder that mlx-lm and ``load_checkpoint`` read.

    The folder changes at once: killed at any moment, the old checkpoint is there or the new one.
    Other files in it, a tokenizer's for example, stay.

    Args:
        model: with 1-bit layers; what is tied is stored once.
        path: the folder, which need not exist.
        config: what config.json says of the model; ``model.config`` without it, where there is one.
        max_shard_bytes: a file is begun when the last would be larger.
    Raises:
        ValueError: no 1-bit layers, or tensors on the meta device.
        ImportError: the package safetensors is not installed.
    """
    check_model(model)
    check_count("max_shard_bytes", max_shard_bytes, 1)
    if config is None:
        config = config_of(model)
    layers = packed_layers(model)
    save_mlx(path, config, layers, other_tensors(model), max_shard_bytes=max_shard_bytes)


def export_gguf(
    model: nn.Module,
    path: str | Path,
    *,
    tokenizer: Any = None,
    config: dict[str, Any] | None = None,
    metadata: dict[str, Any] | None = None,
) -> None:
    """Write a 1-bit model as a GGUF file for llama.cpp, its layers as Q1_0, at once.

    Exact: what Q1_0 cannot hold is an error. It holds groups of 128 of ``±d``, d in float16, which
    ``quantize_(model.half(), symmetric=True)`` makes. Vectors become float32, as llama.cpp wants
    them; other dense tensors keep their dtype.

    Args:
        model: of transformers' names for Llama, Qwen2 or Qwen3.
        path: the file.
        tokenizer: a fast one of transformers, byte-level BPE; without it, or its entries in
            metadata, the file says that it has none.
        config: what config.json says of the model; ``model.config`` without it.
        metadata: entries of GGUF to add, or to take the place of those of the tokenizer.
    Raises:
        CheckpointError: a ValueError; an architecture, a tensor, levels or a tokenizer that GGUF
            does not have.
    """
    check_model(model)
    if config is None:
        config = config_of(model)
    entries = {} if tokenizer is None else tokenizer_entries(tokenizer, config["vocab_size"])
    entries |= metadata or {}
    save_gguf(path, config, packed_layers(model), other_tensors(model), entries)


def stored_path(experts: str, projection: str) -> str:
    """The path of a stack of experts in a file, where mlx-lm looks for it."""
    owner, _, name = experts.rpartition(".")
    return ".".join(filter(None, (owner, "switch_mlp" if name == "experts" else name, projection)))


def layers_once(model: nn.Module) -> Iterator[tuple[str, str, OneBitModule]]:
    """Every 1-bit layer, of those that share weights the first: its path in a file, and its own."""
    seen: set[int] = set()
    for path, module in model.named_modules():
        if not isinstance(module, OneBitModule):
            continue
        # Prepacked ones share nothing.
        key = id(module if isinstance(module, PrepackedLinear) else module.scales)
        if key not in seen:
            seen.add(key)
            in_file = path
            if isinstance(module, OneBitStack) and "." in path:
                in_file = stored_path(*path.rsplit(".", 1))
            yield in_file, path, module


def packed_layers(
    model: nn.Module, load: Callable[[str], Tensor] | None = None
) -> Iterator[tuple[str, Packed]]:
    """Every 1-bit layer by the path it has in a file; of those that share weights the first.

    Args:
        load: ``load(name)`` for tensors that are not in memory.
    """
    for in_file, path, module in layers_once(model):
        if module._lacking:
            raise CheckpointError(
                f"{path} must have whole groups of {module.group_size} columns to be stored, "
                f"got {module._lacking} too few"
            )
        own, tensors = module.canonical(), []
        for entry in ("weight", "scales", "biases"):
            tensor = getattr(own, entry)
            if tensor is not None and tensor.is_meta:
                if load is None:
                    raise CheckpointError(
                        f"{path} must have its weights in memory, got them on meta"
                    )
                tensor = load(f"{path}.{entry}")
            tensors.append(tensor if tensor is None else tensor.detach())
        words, *levels = tensors
        yield in_file, Packed(words.view(torch.int32), *levels, module.group_size)


def other_tensors(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Every tensor of the state_dict that is not a 1-bit layer's weights; shared ones once, float
    experts as mlx-lm has them."""
    experts = {
        path
        for path, module in model.named_modules()
        if is_experts(module) and experts_obstacle(module) is None
    }
    packed = {
        f"{path}.{entry}"
        for path, module in model.named_modules(remove_duplicate=False)
        if isinstance(module, OneBitModule)
        for entry in ("weight", "scales", "biases")
    }
    seen: set[int] = set()
    for name, tensor in model.state_dict(keep_vars=True).items():
        if name in packed or id(tensor) in seen or not isinstance(tensor, Tensor):
            continue
        if tensor.is_meta:
            raise CheckpointError(f"{name} must be in memory, got it on meta")
        seen.add(id(tensor))
        owner, _, entry = name.rpartition(".")
        if owner not in experts:
            yield name, tensor.detach()
            continue
        halves = tensor.detach().chunk(2, dim=1) if entry == "gate_up_proj" else [tensor.detach()]
        projections = ["gate_proj", "up_proj"] if entry == "gate_up_proj" else [entry]
        for projection, half in zip(projections, halves, strict=True):
            yield f"{stored_path(owner, projection)}.weight", half


def config_of(model: nn.Module) -> dict[str, Any]:
    """``model.config`` as a dict; without the model's own idea of its quantization."""
    config = getattr(model, "config", None)
    if not hasattr(config, "to_dict"):
        return {}
    described = config.to_dict()
    described.pop("quantization_config", None)
    return {**mlx_names(config), **described}


def mlx_names(config: Any) -> dict[str, Any]:
    """What transformers writes under other names than those mlx-lm looks for."""
    names = {}
    rope = getattr(config, "rope_parameters", None)
    if isinstance(rope, dict) and "rope_theta" in rope:
        names["rope_theta"] = rope["rope_theta"]
    if "num_experts" in getattr(config, "attribute_map", {}):
        names["num_experts"] = config.num_experts
    return names

"""What GGUF calls the tensors and sizes of Llama, Qwen2 and Qwen3, and what their models do."""

import re
from typing import Any

import torch
from torch import Tensor

from torch_onebit.checkpoint.source import CheckpointError

ARCHITECTURES = ("llama", "qwen2", "qwen3")

_OUTER = {"token_embd": "model.embed_tokens", "output_norm": "model.norm", "output": "lm_head"}
_INNER = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "attn_q_norm": "self_attn.q_norm",
    "attn_k_norm": "self_attn.k_norm",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
_OUTER_BACK = {ours: theirs for theirs, ours in _OUTER.items()}
_INNER_BACK = {ours: theirs for theirs, ours in _INNER.items()}

# key of config.json, key of GGUF after the architecture's name, needed
_SIZES = (
    ("hidden_size", "embedding_length", True),
    ("intermediate_size", "feed_forward_length", True),
    ("num_hidden_layers", "block_count", True),
    ("num_attention_heads", "attention.head_count", True),
    ("num_key_value_heads", "attention.head_count_kv", False),
    ("head_dim", "attention.key_length", False),
    ("max_position_embeddings", "context_length", True),
    ("rms_norm_eps", "attention.layer_norm_rms_epsilon", True),
    ("rope_theta", "rope.freq_base", False),
)
SCALINGS = ("none", "linear", "yarn")
_TOKENS = ("bos_token_id", "eos_token_id")


def check_architecture(name: Any) -> str:
    if not isinstance(name, str) or name not in ARCHITECTURES:
        raise CheckpointError(f"architecture must be one of {ARCHITECTURES}, got {name!r}")
    return name


def model_name(name: str) -> str | None:
    """What the model calls a tensor of GGUF; None if it has none such."""
    if match := re.fullmatch(r"blk\.(\d{1,6})\.(\w+)\.(weight|bias)", name):
        layer, inner, entry = match.groups()
        return f"model.layers.{layer}.{_INNER[inner]}.{entry}" if inner in _INNER else None
    outer, _, entry = name.rpartition(".")
    return f"{_OUTER[outer]}.{entry}" if outer in _OUTER and entry in ("weight", "bias") else None


def gguf_name(name: str) -> str:
    """What GGUF calls a parameter of the model.

    Raises:
        CheckpointError: it has no name for it.
    """
    path, _, entry = name.rpartition(".")
    if match := re.fullmatch(r"model\.layers\.(\d+)\.(.+)", path):
        layer, inner = match.groups()
        if inner in _INNER_BACK:
            return f"blk.{layer}.{_INNER_BACK[inner]}.{entry}"
    if path in _OUTER_BACK:
        return f"{_OUTER_BACK[path]}.{entry}"
    raise CheckpointError(f"{name} must have a name in GGUF's {ARCHITECTURES}, got none")


def heads_of(name: str, config: dict[str, Any]) -> int | None:
    """Heads whose rows llama.cpp interleaves, for a model's parameter; None where it does not."""
    if config["model_type"] != "llama":
        return None
    if ".self_attn.q_proj." in name:
        return config["num_attention_heads"]
    if ".self_attn.k_proj." in name:
        return config["num_key_value_heads"]
    return None


def interleave(tensor: Tensor, heads: int) -> Tensor:
    """Rows as llama.cpp wants them: the halves of a head, which rotate together, in turn."""
    return _reordered(tensor, heads, 2)


def separate(tensor: Tensor, heads: int) -> Tensor:
    """The inverse of ``interleave``."""
    return _reordered(tensor, heads, -1)


def _reordered(tensor: Tensor, heads: int, first: int) -> Tensor:
    rows = torch.arange(len(tensor))
    shape = (heads, 2, -1) if first == 2 else (heads, -1, 2)
    return tensor[rows.view(shape).transpose(1, 2).flatten()]


def config_from(metadata: dict[str, Any], vocab: int, tied: bool, biased: bool) -> dict[str, Any]:
    """config.json's entries from GGUF's.

    Raises:
        CheckpointError: an entry that is missing or makes no sense, or a scaling of positions that
            is not known here.
    """
    kind = check_architecture(metadata.get("general.architecture"))
    config: dict[str, Any] = {"model_type": kind, "vocab_size": vocab, "tie_word_embeddings": tied}
    for ours, theirs, needed in _SIZES:
        value = metadata.get(f"{kind}.{theirs}")
        if value is None and not needed:
            continue
        if type(value) not in (int, float) or not 0 < value < 1 << 31:
            raise CheckpointError(f"{kind}.{theirs} must be a positive number, got {value!r}")
        config[ours] = value
    if config["num_hidden_layers"] > 4096 or config["hidden_size"] % config["num_attention_heads"]:
        raise CheckpointError(
            f"{kind}.embedding_length must be a multiple of attention.head_count in at most 4096 "
            f"blocks, got {config['hidden_size']}, {config['num_attention_heads']} and "
            f"{config['num_hidden_layers']}"
        )
    config.setdefault("num_key_value_heads", config["num_attention_heads"])
    config.setdefault("head_dim", config["hidden_size"] // config["num_attention_heads"])
    if kind == "llama":
        config["attention_bias"] = biased
    for token in _TOKENS:
        value = metadata.get(f"tokenizer.ggml.{token}")
        if type(value) is int:
            config[token] = value
    scaling = metadata.get(f"{kind}.rope.scaling.type", "none")
    if scaling not in SCALINGS if isinstance(scaling, str) else True:
        raise CheckpointError(
            f"{kind}.rope.scaling.type must be one of {SCALINGS}, got {scaling!r}"
        )
    if scaling != "none":
        factor = metadata.get(f"{kind}.rope.scaling.factor", 1.0)
        original = metadata.get(f"{kind}.rope.scaling.original_context_length")
        if type(factor) is not float or not (original is None or type(original) is int):
            raise CheckpointError(
                f"{kind}.rope.scaling must have numbers, got {factor!r} and {original!r}"
            )
        config["rope_scaling"] = {"rope_type": scaling, "factor": factor}
        if original is not None:
            config["rope_scaling"]["original_max_position_embeddings"] = original
    return config


def metadata_from(config: dict[str, Any]) -> dict[str, Any]:
    """GGUF's entries from config.json's.

    Raises:
        CheckpointError: another architecture, a size that is missing, or a scaling of positions
            that is not known here.
    """
    kind = check_architecture(config.get("model_type"))
    metadata: dict[str, Any] = {"general.architecture": kind}
    for ours, theirs, needed in _SIZES:
        value = config.get(ours)
        if value is None and needed:
            raise CheckpointError(f"config must have {ours}, got none")
        if value is not None:
            floats = ours in ("rms_norm_eps", "rope_theta")
            metadata[f"{kind}.{theirs}"] = float(value) if floats else int(value)
    width = config.get("head_dim") or config["hidden_size"] // config["num_attention_heads"]
    metadata[f"{kind}.attention.key_length"] = int(width)
    metadata[f"{kind}.attention.value_length"] = int(width)
    metadata[f"{kind}.rope.dimension_count"] = int(width)
    metadata[f"{kind}.vocab_size"] = int(config["vocab_size"])
    scaling = config.get("rope_scaling") or config.get("rope_parameters") or {}
    scaling_kind = scaling.get("rope_type", "default")
    if scaling_kind in ("linear", "yarn"):
        metadata[f"{kind}.rope.scaling.type"] = scaling_kind
        metadata[f"{kind}.rope.scaling.factor"] = float(scaling["factor"])
        if original := scaling.get("original_max_position_embeddings"):
            metadata[f"{kind}.rope.scaling.original_context_length"] = int(original)
    elif scaling_kind != "default":
        raise CheckpointError(f"rope_type must be linear or yarn, got {scaling_kind!r}")
    return metadata


def no_tokenizer(config: dict[str, Any]) -> dict[str, Any]:
    """GGUF's way to say that the file has no tokenizer."""
    tokens = {f"tokenizer.ggml.{t}": config[t] for t in _TOKENS if type(config.get(t)) is int}
    return {"tokenizer.ggml.model": "none", **tokens}

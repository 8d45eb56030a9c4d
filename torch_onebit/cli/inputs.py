"""What a path holds, by its content."""

import json
from pathlib import Path

from torch_onebit.checkpoint import CheckpointError, GGUFCheckpoint, MLXCheckpoint
from torch_onebit.checkpoint.files import read_json

DTYPES = ("float32", "float16", "bfloat16")
TOKENIZER = ("tokenizer*", "special_tokens_map.json", "vocab.*", "merges.txt", "chat_template*")


def is_gguf(path: Path) -> bool:
    """Whether a path is a GGUF file, or is named as one."""
    return path.suffix == ".gguf" or path.is_file()


def is_float(path: Path) -> bool:
    """Whether a folder holds a model that is not quantized."""
    if not path.is_dir():
        return False
    config = read_json(path / "config.json")
    return "quantization" not in config and "quantization_config" not in config


def open_source(path: Path) -> GGUFCheckpoint | MLXCheckpoint:
    """A 1-bit checkpoint, in either format."""
    if not path.exists():
        raise CheckpointError(f"path must exist, got {path}")
    return GGUFCheckpoint(path) if is_gguf(path) else MLXCheckpoint(path)


def plain_config(config: dict) -> dict:
    """A config without its description of a quantization, as JSON holds it."""
    kept = {k: v for k, v in config.items() if k not in ("quantization", "quantization_config")}
    return json.loads(json.dumps(kept))

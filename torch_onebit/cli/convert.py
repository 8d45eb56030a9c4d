"""Convert a checkpoint: MLX to GGUF, GGUF to MLX, or a float model to 1 bit.

SRC is a folder of MLX, a GGUF file, or a folder of a float model of transformers (safetensors).
DST is a GGUF file if it ends in .gguf, and a folder of MLX otherwise. Between the two formats
nothing is lost: what GGUF's Q1_0 cannot hold is an error. For GGUF a float model needs
--symmetric --dtype float16 and groups of 128. A tokenizer is copied from folder to folder, and one
of byte-level BPE written into GGUF.
"""

import argparse
import shutil
from pathlib import Path
from typing import Any

import torch

from torch_onebit.checkpoint import CheckpointError, save_gguf, save_mlx
from torch_onebit.checkpoint.gguf_tokenizer import tokenizer_entries
from torch_onebit.cli.inputs import DTYPES, TOKENIZER, is_float, is_gguf, open_source, plain_config
from torch_onebit.methods import METHODS
from torch_onebit.saving import export_gguf, save_checkpoint

HELP = "MLX to GGUF and back, or a float model to 1 bit"
UNTRAINED = tuple(m for m in METHODS if m != "calibrated")  # calibrate_ needs data


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("src", type=Path, metavar="SRC", help="what to read")
    parser.add_argument("dst", type=Path, metavar="DST", help="what to write")
    parser.add_argument("--force", action="store_true", help="replace DST if it exists")
    group = parser.add_argument_group("for a float model")
    group.add_argument("--method", choices=UNTRAINED, default="optimal", help="default: optimal")
    group.add_argument("--group-size", type=int, choices=(32, 64, 128), default=128)
    group.add_argument("--symmetric", action="store_true", help="weights of plus and minus a level")
    group.add_argument(
        "--dtype", choices=DTYPES, help="of levels and the rest; the model's without"
    )
    group.add_argument(
        "--keep",
        nargs="*",
        metavar="LAYER",
        help="leave these layers float (names, ends of names, patterns); "
        "without it the heads and what is tied to them",
    )


def run(arguments: argparse.Namespace) -> None:
    src, dst = arguments.src, arguments.dst
    if not src.exists():
        raise CheckpointError(f"SRC must exist, got {src}")
    if dst.exists() and not arguments.force:
        raise CheckpointError(f"DST must not exist without --force, got {dst}")
    if dst.exists() and dst.resolve() == src.resolve():
        raise CheckpointError(f"DST must be another path than SRC, got {dst}")
    if is_float(src):
        _quantize(arguments)
    else:
        _translate(src, dst)
    if src.is_dir() and dst.is_dir():
        for pattern in TOKENIZER:
            for file in src.glob(pattern):
                shutil.copy2(file, dst / file.name)
    print(f"written: {dst}")


def _translate(src: Path, dst: Path) -> None:
    source = open_source(src)
    config = plain_config(source.config)
    for path in source.paths:
        layer = source.layer(path)
        if not layer.one_bit:
            raise CheckpointError(f"layers must be of 1 bit, got {path}: {layer}")
    layers = ((path, source.packed(path)) for path in source.paths)
    tensors = ((name, source.tensor(name)) for name in source.names)
    if dst.suffix == ".gguf":
        save_gguf(dst, config, layers, tensors, _tokenizer(src, config))
    else:
        save_mlx(dst, config, layers, tensors)
        if is_gguf(src):
            print("no tokenizer is written: that of a GGUF file stays in it")


def _tokenizer(src: Path, config: dict[str, Any]) -> dict[str, Any]:
    """GGUF's entries for the tokenizer of a folder; none, with a word why, where they cannot be."""
    if is_gguf(src) or not (src / "tokenizer.json").exists():
        return {}
    try:
        import transformers

        tokenizer = transformers.AutoTokenizer.from_pretrained(src)
        return tokenizer_entries(tokenizer, config["vocab_size"])
    except (ImportError, CheckpointError) as error:
        print(f"no tokenizer is written: {error}")
        return {}


def _quantize(arguments: argparse.Namespace) -> None:
    try:
        import transformers

        from torch_onebit.transformers import OneBitConfig
    except ImportError as error:
        raise ImportError(
            "float models are read by transformers: pip install torch_onebit[transformers]"
        ) from error
    config = OneBitConfig(
        group_size=arguments.group_size,
        method=arguments.method,
        symmetric=arguments.symmetric,
        modules_to_not_convert=arguments.keep,
    )
    options = {} if arguments.dtype is None else {"dtype": getattr(torch, arguments.dtype)}
    try:
        model = transformers.AutoModelForCausalLM.from_pretrained(
            arguments.src, quantization_config=config, use_safetensors=True, **options
        )
    except RuntimeError as error:  # tensors of other shapes than the config says
        raise CheckpointError(f"{arguments.src}: {error}") from error
    if arguments.dst.suffix == ".gguf":
        entries = _tokenizer(arguments.src, model.config.to_dict())
        export_gguf(model, arguments.dst, metadata=entries)
    else:
        save_checkpoint(model, arguments.dst)

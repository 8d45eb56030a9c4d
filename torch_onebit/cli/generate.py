"""Write on from a prompt with a 1-bit model, as the text comes, and say how fast it was.

PATH is a folder of MLX, one that save_pretrained wrote, or a GGUF file (its tokenizer is read by
the package gguf). A chat template of the tokenizer is applied, unless --raw.
"""

import argparse
import sys
import time
from pathlib import Path
from typing import Any

import torch
from torch import nn

from torch_onebit.checkpoint import CheckpointError
from torch_onebit.cli.inputs import DTYPES, TOKENIZER, is_gguf
from torch_onebit.loading import load_checkpoint, load_gguf

HELP = "text from a 1-bit model"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("path", type=Path, metavar="PATH")
    parser.add_argument("prompt", metavar="PROMPT")
    parser.add_argument("--max-tokens", type=int, default=200, help="default: 200")
    parser.add_argument("--temperature", type=float, default=0.0, help="0, the default: greedy")
    parser.add_argument("--seed", type=int, default=0, help="of sampling")
    parser.add_argument("--dtype", choices=DTYPES, default="float32", help="default: float32")
    parser.add_argument("--device", default="cpu", help="default: cpu")
    parser.add_argument("--raw", action="store_true", help="no chat template")


def run(arguments: argparse.Namespace) -> None:
    if arguments.max_tokens < 1 or not 0 <= arguments.temperature < float("inf"):
        raise CheckpointError(
            "--max-tokens must be at least 1 and --temperature 0 or more, "
            f"got {arguments.max_tokens} and {arguments.temperature}"
        )
    path = arguments.path
    if not path.exists():
        raise CheckpointError(f"PATH must exist, got {path}")
    tokenizer = _tokenizer(path)
    ids = _encoded(tokenizer, arguments)
    load = load_gguf if is_gguf(path) else load_checkpoint
    dtype = getattr(torch, arguments.dtype)
    model = load(path, dtype=dtype, device=arguments.device).to(arguments.device)
    torch.manual_seed(arguments.seed)
    count, seconds = _stream(model, tokenizer, ids.to(arguments.device), arguments)
    print(f"\n{count} tokens, {count / seconds:.1f} tokens per second", file=sys.stderr)


def _tokenizer(path: Path) -> Any:
    try:
        import transformers
    except ImportError as error:
        raise ImportError(
            "text needs transformers: pip install torch_onebit[transformers]"
        ) from error
    if is_gguf(path):
        try:
            return transformers.AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name)
        except (KeyError, NotImplementedError) as error:
            raise CheckpointError(f"{path} must hold a tokenizer, got {error!r}") from error
    if not any(file for pattern in TOKENIZER for file in path.glob(pattern)):
        raise CheckpointError(f"{path} must hold a tokenizer, got no file of one")
    try:
        return transformers.AutoTokenizer.from_pretrained(path, local_files_only=True)
    except (KeyError, OSError, ValueError) as error:
        raise CheckpointError(f"{path} must hold a tokenizer, got {error}") from error


def _encoded(tokenizer: Any, arguments: argparse.Namespace) -> torch.Tensor:
    if tokenizer.chat_template and not arguments.raw:
        text = tokenizer.apply_chat_template(
            [{"role": "user", "content": arguments.prompt}],
            add_generation_prompt=True,
            tokenize=False,
        )
        ids = tokenizer(text, add_special_tokens=False, return_tensors="pt").input_ids
    else:
        ids = tokenizer(arguments.prompt, return_tensors="pt").input_ids
    if not ids.numel():
        raise CheckpointError(f"PROMPT must have a token, got {arguments.prompt!r}")
    return ids


def _stream(
    model: nn.Module, tokenizer: Any, ids: torch.Tensor, arguments: argparse.Namespace
) -> tuple[int, float]:
    """Print the text as it comes; returns how many tokens and in what time."""
    from transformers import TextStreamer

    sampling = {"do_sample": False}
    if arguments.temperature:
        sampling = {"do_sample": True, "temperature": arguments.temperature}
    start = time.perf_counter()
    written = model.generate(
        ids,
        attention_mask=torch.ones_like(ids),
        streamer=TextStreamer(tokenizer, skip_prompt=True, skip_special_tokens=True),
        max_new_tokens=arguments.max_tokens,
        pad_token_id=tokenizer.pad_token_id or tokenizer.eos_token_id or 0,
        **sampling,
    )
    return written.shape[1] - ids.shape[1], time.perf_counter() - start

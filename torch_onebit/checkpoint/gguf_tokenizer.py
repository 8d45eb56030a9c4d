"""A tokenizer of byte-level BPE, as the package tokenizers describes it, in entries of GGUF."""

import json
from typing import Any

import numpy as np

from torch_onebit.checkpoint.source import CheckpointError

NORMAL, CONTROL, USER_DEFINED, UNUSED = 1, 3, 4, 5
SPECIAL = {"bos": "bos", "eos": "eos", "unk": "unknown", "pad": "padding"}

_WORDS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|"
_REST = r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
# What llama.cpp calls a way to cut text before the merges: steps of the package tokenizers.
CUTS = {
    "gpt-2": ["ByteLevel"],
    "smollm": ["Digits", "ByteLevel"],
    "qwen2": [_WORDS + r"\p{N}" + _REST, "bytes"],
    "llama-bpe": [_WORDS + r"\p{N}{1,3}" + _REST, "bytes"],
}


def tokenizer_entries(tokenizer: Any, rows: int) -> dict[str, Any]:
    """Entries of GGUF for a fast tokenizer of transformers.

    Args:
        tokenizer: with ``backend_tokenizer``.
        rows: of the embedding; those without a token get an unused one.
    Raises:
        CheckpointError: a tokenizer that is not byte-level BPE, cuts text in a way that llama.cpp
            has no name for, or has more tokens than the model.
    """
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        raise CheckpointError(
            f"tokenizer must be a fast one of transformers, got {type(tokenizer).__name__}"
        )
    described = json.loads(backend.to_str())
    model = described["model"]
    if model["type"] != "BPE" or model.get("byte_fallback"):
        raise CheckpointError(f"tokenizer must be byte-level BPE, got {model['type']}")
    normalizer = (described["normalizer"] or {"type": "NFC"})["type"]
    cut = _cut(described["pre_tokenizer"])
    if cut is None or normalizer != "NFC":  # llama.cpp takes text as it is: NFC nearly always
        raise CheckpointError(
            f"tokenizer must cut text in one of the ways that llama.cpp calls {', '.join(CUTS)}, "
            f"got {described['pre_tokenizer']} and {described['normalizer']}"
        )
    tokens = {index: (text, NORMAL) for text, index in model["vocab"].items()}
    for added in described["added_tokens"]:
        kind = CONTROL if added["special"] else USER_DEFINED
        tokens[added["id"]] = (added["content"], kind)
    if max(tokens, default=0) >= rows:
        raise CheckpointError(f"tokenizer must have at most {rows} tokens, got {max(tokens) + 1}")
    listed = [tokens.get(i, (f"[PAD{i}]", UNUSED)) for i in range(rows)]
    merges = [m if isinstance(m, str) else " ".join(m) for m in model["merges"]]
    bos = tokenizer.bos_token_id
    entries = {
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": cut,
        "tokenizer.ggml.tokens": [text for text, _ in listed],
        "tokenizer.ggml.token_type": np.array([kind for _, kind in listed], np.int32),
        "tokenizer.ggml.merges": merges,
        "tokenizer.ggml.add_bos_token": bos is not None and tokenizer("a").input_ids[0] == bos,
    }
    for ours, theirs in SPECIAL.items():
        index = getattr(tokenizer, f"{ours}_token_id")
        if index is not None:
            entries[f"tokenizer.ggml.{theirs}_token_id"] = index
    if isinstance(tokenizer.chat_template, str):
        entries["tokenizer.chat_template"] = tokenizer.chat_template
    return entries


def _cut(step: dict[str, Any] | None) -> str | None:
    """llama.cpp's name for a pre-tokenizer; None if it has none."""
    steps = step["pretokenizers"] if step and step["type"] == "Sequence" else [step]
    names = [_step(s) for s in steps if s]
    return next((name for name, known in CUTS.items() if known == names), None)


def _step(step: dict[str, Any]) -> str | None:
    kind = step["type"]
    if kind == "ByteLevel" and not step["add_prefix_space"]:
        return "ByteLevel" if step.get("use_regex", True) else "bytes"
    if kind == "Digits" and step["individual_digits"]:
        return "Digits"
    if kind == "Split" and step["behavior"] == "Isolated" and not step["invert"]:
        return step["pattern"].get("Regex")
    return None

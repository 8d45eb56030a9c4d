"""Load a 1-bit folder of MLX through transformers, packed, and let it write on.

    python examples/load_mlx.py FOLDER "Once upon a time"

Without a folder a tiny random Qwen3 is made, saved as one and loaded: its text means nothing.
"""

import argparse
import tempfile
from pathlib import Path

import torch
import transformers

import torch_onebit
import torch_onebit.transformers  # from_pretrained knows the folders from here on
from torch_onebit.nn import OneBitModule


def make_folder(path: Path) -> None:
    config = transformers.Qwen3Config(
        hidden_size=256,
        intermediate_size=512,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=64,
        vocab_size=1000,
    )
    model = transformers.AutoModelForCausalLM.from_config(config)
    torch_onebit.save_checkpoint(torch_onebit.quantize_(model), path)


def describe(model: torch.nn.Module) -> str:
    layers = [m for m in model.modules() if isinstance(m, OneBitModule)]
    weights = sum(m.weight.numel() * 32 for m in layers)
    size = sum(p.numel() * p.element_size() for m in layers for p in m.state_dict().values())
    return f"{len(layers)} 1-bit layers, {weights:,} weights in {size:,} bytes"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("folder", nargs="?", type=Path)
    parser.add_argument("prompt", nargs="?", default="Once upon a time")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        folder = args.folder or Path(scratch) / "tiny"
        if args.folder is None:
            make_folder(folder)
        model = transformers.AutoModelForCausalLM.from_pretrained(folder)
        print(describe(model))
        if args.folder is None:
            ids = torch.tensor([[1, 2, 3]])
            print(model.generate(ids, max_new_tokens=8, do_sample=False, pad_token_id=0).tolist())
        else:
            tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
            ids = tokenizer(args.prompt, return_tensors="pt")
            print(tokenizer.decode(model.generate(**ids, max_new_tokens=100)[0]))


if __name__ == "__main__":
    main()

"""A float model to 1 bit, to MLX, to GGUF and back: the same bits everywhere.

    python examples/convert.py [--folder out/convert]

On the command line: python -m torch_onebit convert SRC DST.
"""

import argparse
from pathlib import Path

import torch
import transformers

import torch_onebit


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--folder", type=Path, default=Path("out/convert"))
    folder = parser.parse_args().folder
    config = transformers.Qwen3Config(
        hidden_size=256,
        intermediate_size=512,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=64,
        vocab_size=1000,
    )
    model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float16).eval()
    # GGUF's Q1_0 holds groups of 128 weights of plus and minus one float16 number.
    torch_onebit.quantize_(model, group_size=128, symmetric=True)
    print(torch_onebit.report(model))

    torch_onebit.save_checkpoint(model, folder / "mlx")  # for mlx-lm
    torch_onebit.export_gguf(model, folder / "model.gguf")  # for llama.cpp
    for loaded in (
        torch_onebit.load_checkpoint(folder / "mlx", symmetrize=True),
        torch_onebit.load_gguf(folder / "model.gguf", dtype=torch.float16, symmetrize=True),
    ):
        before, after = model.state_dict(), loaded.state_dict()
        assert before.keys() == after.keys()
        assert all(torch.equal(before[name], after[name]) for name in before)
    print(f"written and read back, bit for bit: {folder / 'mlx'}, {folder / 'model.gguf'}")


if __name__ == "__main__":
    main()

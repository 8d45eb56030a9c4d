"""Damage checkpoints at random; a reader may refuse a file in its own words, and nothing else.

    python tests/fuzz_readers.py --reader gguf --count 1000000 --seed 0

Prints the first input that ends in another exception, or takes more than a second, and saves it.
"""

import argparse
import json
import math
import random
import resource
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from tqdm import tqdm

import torch_onebit
from torch_onebit.checkpoint import (
    CheckpointError,
    GGUFCheckpoint,
    MLXCheckpoint,
    Packed,
    Source,
    save_gguf,
    save_mlx,
)

SECONDS = 1.0  # a file of some kilobytes takes a millisecond
BYTES = 1 << 30  # of address space beside what the process has before
EXTREMES = [0, 1, 2**31, 2**32 - 1, 2**60, 2**63 - 1, 2**63, 2**64 - 1]
TOKENS = [
    "-1",
    "1e999",
    "18446744073709551616",
    "null",
    "[]",
    "{}",
    '"../x"',
    "true",
    '"F32"',
    "NaN",
]


def layer(rows: int, columns: int) -> Packed:
    packed, scales, _ = torch_onebit.quantize(torch.randn(rows, columns).half(), 128)
    return Packed(packed, scales, None, 128)


def write_samples(folder: Path) -> dict[str, tuple[list[Path], Callable[[], Source]]]:
    """A small checkpoint for each reader: its files, and how to open it."""
    torch.manual_seed(0)
    block = "model.layers.0"
    layers = [("model.embed_tokens", layer(4, 128)), (f"{block}.mlp.down_proj", layer(128, 128))]
    tensors = [
        ("model.norm.weight", torch.ones(128)),
        (f"{block}.self_attn.q_proj.bias", torch.ones(4)),
    ]
    config = {
        "model_type": "llama",
        "hidden_size": 128,
        "intermediate_size": 128,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "num_key_value_heads": 2,
        "vocab_size": 4,
        "max_position_embeddings": 8,
        "rms_norm_eps": 1e-6,
    }
    tokens = {"tokenizer.ggml.model": "none", "tokenizer.ggml.tokens": list("abcd")}
    save_gguf(folder / "a.gguf", config, layers, tensors, tokens)
    flat = layer(4, 128)
    stack = Packed(*(t.unflatten(0, (2, 2)) for t in (flat.weight, flat.scales)), None, 128)
    layers.append((f"{block}.mlp.switch_mlp.up_proj", stack))
    save_mlx(folder / "mlx", config, layers, tensors, max_shard_bytes=3000)
    names = ["config.json", "model.safetensors.index.json", "model-00001-of-00002.safetensors"]
    return {
        "gguf": ([folder / "a.gguf"], lambda: GGUFCheckpoint(folder / "a.gguf")),
        "mlx": ([folder / "mlx" / n for n in names], lambda: MLXCheckpoint(folder / "mlx")),
    }


def damaged(data: bytes, rng: random.Random) -> bytes:
    """One to four of: other bytes, an extreme number, another JSON value, a cut, a repeat."""
    out = bytearray(data)
    # Most of what a reader trusts is at the beginning.
    limit = rng.choice([64, 512, len(data), len(data)])
    for _ in range(rng.randint(1, 4)):
        at = rng.randrange(max(1, min(limit, len(out))))
        kind = rng.randrange(6)
        if kind == 0:
            out[at : at + 1] = bytes([rng.randrange(256)])
        elif kind == 1:
            size = rng.choice([4, 8])
            out[at : at + size] = (rng.choice(EXTREMES) % 2 ** (8 * size)).to_bytes(size, "little")
        elif kind == 2:
            del out[at:]
        elif kind == 3:
            end = at + rng.randrange(1, 64)
            out[at:at] = out[at:end] * rng.choice([1, 1, 100])
        elif kind == 4:
            end = out.find(rng.choice([b",", b"}", b"]"]), at)
            start = out.rfind(b":", 0, at) + 1
            if 0 < start < end:
                out[start:end] = rng.choice(TOKENS).encode()
        else:
            del out[at : at + rng.randrange(1, 32)]
    return bytes(out)


def read_all(source: Source) -> None:
    for path in source.paths:
        described = source.layer(path)
        if described.one_bit:
            source.packed(path)
        elif math.prod(described.shape) < 1 << 20:
            source.dequantized(path, described)
    for name in source.names:
        source.tensor(name).sum()
    json.dumps(source.config, default=str)


def fuzz(reader: str, count: int, seed: int, folder: Path) -> Iterator[tuple[int, bool]]:
    """Yields the number of each input and whether it was read; raises at the first bad one."""
    files, open_ = write_samples(folder)[reader]
    originals = [path.read_bytes() for path in files]
    read_all(open_())
    for number in range(count):
        rng = random.Random(f"{seed}:{number}")
        chosen = rng.randrange(len(files))
        data = damaged(originals[chosen], rng)
        files[chosen].unlink()  # an open map keeps the old file
        files[chosen].write_bytes(data)
        start = time.process_time()  # not the clock: others may have the processor
        try:
            read_all(open_())
            accepted = True
        except CheckpointError:
            accepted = False
        except Exception as error:
            raise AssertionError(f"{reader}, seed {seed}, input {number}: {error!r}") from error
        seconds = time.process_time() - start
        if seconds > SECONDS:
            raise AssertionError(f"{reader}, seed {seed}, input {number}: {seconds:.1f} s")
        files[chosen].unlink()
        files[chosen].write_bytes(originals[chosen])
        yield number, accepted


def limit_memory() -> None:
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    most = pages * resource.getpagesize() + BYTES
    resource.setrlimit(resource.RLIMIT_AS, (most, most))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--reader", choices=("gguf", "mlx"), required=True)
    parser.add_argument("--count", type=int, default=10_000)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        limit_memory()
        read = 0
        try:
            work = fuzz(args.reader, args.count, args.seed, Path(folder))
            for _, accepted in tqdm(work, total=args.count, mininterval=1):
                read += accepted
        except AssertionError as error:
            sys.exit(str(error))
    print(f"{args.reader}: {args.count} inputs of seed {args.seed}, {read} read, the rest refused")


if __name__ == "__main__":
    main()

"""Whole models beside llama.cpp: the same random 1-bit weights, the same number of threads.

    python benchmarks/bench_llama.py --shape 1.7B

A Qwen3 of random weights is packed in groups of 128 and exported as Q1_0; transformers runs our
copy (prepacked, bfloat16 activations, a static cache, compiled), ``llama-cpp-python`` the file. It
must be installed: from its source package, so that it is built for this machine. In turns: a
prompt of 512 tokens, then single tokens after it.
"""

import argparse
import statistics
import tempfile
import time
from pathlib import Path

import torch
import torch.nn.functional as F
import transformers
from torch import Tensor
from transformers.masking_utils import sdpa_mask

import torch_onebit
from torch_onebit.bench.limits import measure_limits
from torch_onebit.bench.measure import SPIN

PROMPT = 512
# layers, hidden, intermediate, heads, heads of keys
SHAPES = {
    "0.6B": (28, 1024, 3072, 16, 8),
    "1.7B": (28, 2048, 6144, 16, 8),
    "8B": (36, 4096, 12288, 32, 8),
}
ROWS = 151936


def random_model(shape: str, layers: int | None) -> torch.nn.Module:
    """Of that shape, packed, its head not tied; no dense weights are ever made."""
    count, hidden, intermediate, heads, kv_heads = SHAPES[shape]
    config = transformers.Qwen3Config(
        vocab_size=ROWS,
        hidden_size=hidden,
        intermediate_size=intermediate,
        num_hidden_layers=layers or count,
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        head_dim=128,
        tie_word_embeddings=False,
        max_position_embeddings=2048,
    )
    torch.set_default_dtype(torch.bfloat16)
    model = transformers.AutoModelForCausalLM.from_config(config).eval()
    torch.set_default_dtype(torch.float32)
    return torch_onebit.quantize_(model, group_size=128, symmetric=True, skip=[], progress=False)


def by_key_head(module, query, key, value, attention_mask, scaling=None, **_):
    """One token: query heads that share keys are rows of one product; nothing is repeated."""
    batch, heads, tokens, size = query.shape
    if tokens > 1:
        y = F.scaled_dot_product_attention(
            query, key, value, attention_mask, scale=scaling, enable_gqa=True
        )
    else:
        rows = query.view(batch, key.shape[1], -1, size)
        y = F.scaled_dot_product_attention(rows, key, value, attention_mask, scale=scaling)
    return y.reshape(batch, heads, tokens, size).transpose(1, 2), None


transformers.AttentionInterface.register("by_key_head", by_key_head)
transformers.AttentionMaskInterface.register("by_key_head", sdpa_mask)


class Ours:
    """A transformers model that keeps its cache between calls."""

    def __init__(self, model: torch.nn.Module, length: int):
        torch_onebit.prepack_(model)
        model.set_attn_implementation("by_key_head")
        self.model, self.length = model, length
        self.step = torch.compile(model.forward, fullgraph=True)
        self.cache = transformers.StaticCache(config=model.config, max_cache_len=length)

    def eval(self, ids: Tensor, start: int) -> Tensor:
        """Logits after the last of ``ids``, which stand at ``start`` and after it."""
        run = self.step if len(ids) == 1 else self.model
        if start == 0:
            self.cache.reset()
        return run(
            ids[None],
            past_key_values=self.cache,
            position_ids=torch.arange(start, start + len(ids))[None],
            logits_to_keep=1,
        ).logits[0, -1]


class LlamaCpp:
    def __init__(self, path: Path, length: int, threads: int):
        import llama_cpp

        self.model = llama_cpp.Llama(
            str(path),
            n_ctx=length,
            n_batch=PROMPT,
            n_ubatch=PROMPT,
            n_threads=threads,
            n_threads_batch=threads,
            verbose=False,
        )

    def eval(self, ids: Tensor, start: int) -> None:
        self.model.n_tokens = start
        self.model.eval(ids.tolist())


def seconds(call) -> float:
    SPIN()
    begin = time.perf_counter()
    call()
    return time.perf_counter() - begin


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--shape", choices=SHAPES, default="1.7B")
    parser.add_argument("--layers", type=int, help="fewer, to try this program")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--tokens", type=int, default=16, help="single tokens a round")
    args = parser.parse_args()
    threads, length = torch.get_num_threads(), PROMPT + 64
    with tempfile.TemporaryDirectory() as folder, torch.inference_mode():
        model = random_model(args.shape, args.layers)
        path = Path(folder) / "model.gguf"
        torch_onebit.export_gguf(model, path)
        print(f"{args.shape}: {path.stat().st_size / 1e6:.0f} MB, {threads} threads", flush=True)
        linear = sum(
            t.nbytes
            for m in model.modules()
            if isinstance(m, torch_onebit.OneBitLinear)
            for t in m.state_dict().values()
        )
        sides = {"ours": Ours(model, length), "llama.cpp": LlamaCpp(path, length, threads)}
        ids = torch.randint(ROWS, (length,))
        prefill = {name: [] for name in sides}
        decode = {name: [] for name in sides}
        for lap in range(args.rounds + 1):
            for name, side in sides.items():
                first = seconds(lambda side=side: side.eval(ids[:PROMPT], 0))
                each = [
                    seconds(lambda side=side, i=i: side.eval(ids[i : i + 1], i))
                    for i in range(PROMPT, PROMPT + args.tokens)
                ]
                if lap > 0:  # the first compiles
                    prefill[name].append(first)
                    decode[name].append(statistics.median(each))
        limit = linear / measure_limits(5)["read_bytes_per_second"]
    for what, times, per in (("prefill", prefill, PROMPT), ("decode", decode, 1)):
        median = {name: statistics.median(t) for name, t in times.items()}
        for name, s in median.items():
            print(f"{what}, {name}: {per / s:.1f} tokens/s ({s * 1e3:.1f} ms)")
        ratios = [b / a for a, b in zip(times["ours"], times["llama.cpp"], strict=True)]
        print(f"{what}: ours is {statistics.median(ratios):.2f} times as fast")
    share = limit / statistics.median(decode["ours"])
    print(f"decode, ours: {share:.2f} of a stream read of the {linear / 1e6:.0f} MB of its linears")


if __name__ == "__main__":
    main()

"""Whole models beside llama.cpp: the same random 1-bit weights, the same number of threads.

    python benchmarks/bench_llama.py --shape 1.7B

A Qwen3 of random weights is packed in groups of 128 and exported as Q1_0; transformers runs our
copy (prepacked, bfloat16 activations, a static cache, compiled with a wrapper in C++, its guards
not asked again), ``llama-cpp-python`` the file. It must be installed: from its source package, so
that it is built for this machine. In turns: a prompt of 512 tokens, single tokens after it, and a
stream read of as many bytes as our linear layers have.
"""

import argparse
import statistics
import tempfile
from pathlib import Path

import torch
import torch.nn.functional as F
import transformers
from torch import Tensor
from transformers.masking_utils import sdpa_mask

import torch_onebit
from torch_onebit.bench.measure import time_once
from torch_onebit.bench.model import Shape

PROMPT = 512
SHAPES = {
    "0.6B": Shape(hidden=1024, intermediate=3072),
    "1.7B": Shape(),
    "8B": Shape(layers=36, hidden=4096, intermediate=12288, heads=32),
}


def random_model(shape: Shape, layers: int | None) -> torch.nn.Module:
    """Of that shape, or with fewer layers, packed; its head is not tied."""
    config = transformers.Qwen3Config(
        vocab_size=shape.vocabulary,
        hidden_size=shape.hidden,
        intermediate_size=shape.intermediate,
        num_hidden_layers=layers or shape.layers,
        num_attention_heads=shape.heads,
        num_key_value_heads=shape.kv_heads,
        head_dim=shape.head_dim,
        tie_word_embeddings=False,
        max_position_embeddings=shape.context,
    )
    with torch.device("meta"):
        model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).eval()
    model.model.rotary_emb = type(model.model.rotary_emb)(config)
    # layer by layer: the float weights of 8B would leave no memory for the rest
    for part in (*model.model.layers, model.model.norm, model.model.embed_tokens, model.lm_head):
        part.to_empty(device="cpu")
        for name, weight in part.named_parameters():
            if "norm" in name or part is model.model.norm:
                torch.nn.init.ones_(weight)
            else:
                torch.nn.init.normal_(weight, std=config.initializer_range)
        if part in model.model.layers:
            quantize_all(part)
    return quantize_all(model)


def quantize_all(module: torch.nn.Module) -> torch.nn.Module:
    return torch_onebit.quantize_(module, group_size=128, symmetric=True, skip=[], progress=False)


def grouped_keys(module, query, key, value, attention_mask, scaling=None, **_):
    """Keys and values as they are; transformers' "sdpa" repeats them for their query heads."""
    y = F.scaled_dot_product_attention(
        query, key, value, attention_mask, scale=scaling, enable_gqa=True
    )
    return y.transpose(1, 2), None


transformers.AttentionInterface.register("grouped_keys", grouped_keys)
transformers.AttentionMaskInterface.register("grouped_keys", sdpa_mask)


class Ours:
    """A transformers model that keeps its cache between calls."""

    def __init__(self, model: torch.nn.Module, length: int):
        torch_onebit.prepack_(model)
        model.set_attn_implementation("grouped_keys")
        self.model = model
        options = torch_onebit.compile_options() | {"cpp_wrapper": True}
        self.step = torch.compile(model.forward, fullgraph=True, options=options)
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


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--shape", choices=SHAPES, default="1.7B")
    parser.add_argument("--layers", type=int, help="fewer, to try this program")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--tokens", type=int, default=16, help="single tokens a round")
    args = parser.parse_args()
    threads, length = torch.get_num_threads(), PROMPT + 64
    with tempfile.TemporaryDirectory() as folder, torch.inference_mode():
        shape = SHAPES[args.shape]
        model = random_model(shape, args.layers)
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
        ids = torch.randint(shape.vocabulary, (length,))
        prefill = {name: [] for name in sides}
        decode = {name: [] for name in sides}
        memory, stream = torch.zeros(linear // 4), []

        def read() -> None:
            torch.ops.onebit_bench.read_memory(memory)

        for lap in range(args.rounds + 1):
            for name, side in sides.items():
                first = time_once(lambda side=side: side.eval(ids[:PROMPT], 0))
                each = [
                    time_once(lambda side=side, i=i: side.eval(ids[i : i + 1], i))
                    for i in range(PROMPT, PROMPT + args.tokens)
                ]
                if lap > 0:  # the first compiles
                    prefill[name].append(first)
                    decode[name].append(statistics.median(each))
            stream.append(statistics.median(time_once(read) for _ in range(5)))
            # The graph is for these shapes; asking whether they still hold is a tenth of a token.
            torch.compiler.set_stance("default", skip_guard_eval_unsafe=True)
    for what, times, per in (("prefill", prefill, PROMPT), ("decode", decode, 1)):
        median = {name: statistics.median(t) for name, t in times.items()}
        for name, s in median.items():
            print(f"{what}, {name}: {per / s:.1f} tokens/s ({s * 1e3:.1f} ms)")
        ratios = [b / a for a, b in zip(times["ours"], times["llama.cpp"], strict=True)]
        print(f"{what}: ours is {statistics.median(ratios):.2f} times as fast")
    shares = [s / t for s, t in zip(stream[1:], decode["ours"], strict=True)]
    share = statistics.median(shares)
    print(f"decode, ours: {share:.2f} of a stream read of the {linear / 1e6:.0f} MB of its linears")


if __name__ == "__main__":
    main()

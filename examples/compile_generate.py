"""Generate with packed weights, a static cache and torch.compile: one graph for every token.

    python examples/compile_generate.py

The model is a tiny Llama with random weights: the two ways give the same tokens.
"""

import argparse
import time

import torch
from texts import tiny_llama

import torch_onebit

TOKENS = 64


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--backend", default="inductor", help="of torch.compile")
    backend = parser.parse_args().backend
    model = torch_onebit.quantize_(tiny_llama().eval(), group_size=64)
    if torch.ops.onebit.can_prepack():
        torch_onebit.prepack_(model)  # for the few rows of decoding, on CPUs with AVX-512
    prompt = torch.tensor([list(b"The Zen of Python")])
    options = {"max_new_tokens": TOKENS, "do_sample": False, "pad_token_id": 0}
    options["cache_implementation"] = "static"

    def generate() -> torch.Tensor:
        start = time.perf_counter()
        tokens = model.generate(prompt, disable_compile=True, **options)
        seconds = time.perf_counter() - start
        print(f"{TOKENS / seconds:6.0f} tokens per second")
        return tokens

    print("eager")
    generate()
    expected = generate()
    model.forward = torch.compile(model.forward, fullgraph=True, backend=backend)
    print("compiled: the first time with compiling")
    generate()
    assert torch.equal(generate(), expected)
    print("the same tokens")


if __name__ == "__main__":
    main()

"""Whole models on a GPU: one graph for a step of decoding, training, export, vmap."""

import copy
import sys
from pathlib import Path

import pytest
import torch
from helpers import make_weights

import torch_onebit

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))
sys.path.insert(0, str(Path(__file__).parents[2] / "examples"))
import byte_lm
import decoder

ops = torch.ops.onebit
pytestmark = pytest.mark.cuda
SMALL = decoder.Shape(512, 2, 8, 2, 64, 1024, 1000)


@pytest.mark.parametrize("batch", [1, 12])
@pytest.mark.parametrize("compiled", [False, True])
def test_a_step_of_decoding_is_one_graph(batch, compiled):
    model = decoder.Decoder(SMALL, decoder.packed_layers(group_size=64)).requires_grad_(False)
    if compiled:
        torch._dynamo.reset()
        model.compile_layers()
    decoding = decoder.Decoding(model, batch, 64)

    def tokens(step) -> torch.Tensor:
        decoding.ids.zero_()
        decoding.position.zero_()
        found = []
        for _ in range(8):
            step()
            found.append(decoding.ids.clone())
        return torch.cat(found, 1)

    assert torch.equal(tokens(decoding.graph.replay), tokens(decoding.step))


def test_decoding_with_a_cache_equals_the_whole_sequence():
    layers = decoder.packed_layers(torch.float32, group_size=64)
    model = decoder.Decoder(SMALL, layers).requires_grad_(False)
    ids, rope = torch.randint(1000, (2, 6), device="cuda"), model.rope(64)
    caches = [tuple(t.float() for t in pair) for pair in model.caches(2, 64)]
    with torch.no_grad():
        at = [torch.tensor([i], device="cuda") for i in range(6)]
        steps = [model(ids[:, i : i + 1], rope, caches, at[i]) for i in range(6)]
        torch.testing.assert_close(torch.cat(steps, 1), model(ids, rope), rtol=1e-3, atol=1e-3)


TRAINED = {
    "1-bit training": lambda m: torch_onebit.prepare_qat_(m, group_size=32, progress=False),
    "levels train": lambda m: torch_onebit.thaw_levels_(
        torch_onebit.quantize_(m, group_size=64, progress=False)
    ),
}


@pytest.mark.parametrize("change", TRAINED)
def test_training_steps_of_the_demo_equal_the_cpu(change):
    model = TRAINED[change](byte_lm.ByteLM(byte_lm.Config(width=64, layers=2, context=32)))
    ids = torch.randint(256, (4, 33))

    def losses(model, ids) -> list[float]:
        optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
        found = []
        for _ in range(4):
            logits = model(ids[:, :-1])
            loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten())
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            found.append(loss.item())
        return found

    gpu = losses(copy.deepcopy(model).cuda(), ids.cuda())
    cpu = losses(model, ids)
    assert cpu[-1] < cpu[0]
    assert gpu == pytest.approx(cpu, rel=1e-3)  # a bit that rounding flips is a larger difference


def packed_model() -> torch.nn.Module:
    model = torch.nn.Sequential(
        torch.nn.Embedding(40, 512), torch.nn.Linear(512, 512), torch.nn.GELU()
    )
    return torch_onebit.quantize_(model, progress=False).cuda().requires_grad_(False)


@pytest.mark.parametrize("rows", [1, 9])
def test_exported_models_agree(rows):
    model, ids = packed_model(), torch.randint(40, (rows,), device="cuda")
    length = torch.export.Dim("rows", min=1, max=1024)
    example = torch.randint(40, (5,), device="cuda")
    program = torch.export.export(model, (example,), dynamic_shapes=({0: length},))
    torch.testing.assert_close(program.module()(ids), model(ids))


def test_vmap_is_one_call_with_the_same_numbers():
    weights = make_weights(3, 70, 512, device="cuda")
    x = torch.randn(3, 5, 512, device="cuda")
    each = [ops.qmm(x[i], *(t[i] for t in weights), 128) for i in range(3)]
    over_both = torch.vmap(lambda x, *w: ops.qmm(x, *w, 128))(x, *weights)
    torch.testing.assert_close(over_both, torch.stack(each), rtol=1e-4, atol=1e-4)
    over_x = torch.vmap(lambda x: ops.qmm(x, *(t[0] for t in weights), 128))(x)
    expected = torch.stack([ops.qmm(t, *(w[0] for w in weights), 128) for t in x])
    torch.testing.assert_close(over_x, expected, rtol=1e-4, atol=1e-4)

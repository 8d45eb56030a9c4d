"""Other packages' results at few bits on the models of bench_models.py, as float weights.

Installed only for this: ``pip install hqq gptqmodel`` in an environment of their own, for they want
other versions of torch and transformers; rows of those that cannot be imported are left out.
"""

import importlib.util
import itertools
from collections.abc import Callable

import torch
from models import Subject
from torch import Tensor, nn

from torch_onebit.surgery import chosen_layers


def rows_of(subject: Subject) -> dict[str, Callable[[nn.Module], float]]:
    """What changes a model in place and returns its weights' bytes, by name."""
    found = {}
    if importlib.util.find_spec("hqq"):
        found["HQQ, 1 bit"] = lambda model: _hqq(model, subject)
    if importlib.util.find_spec("gptqmodel"):  # refuses 1 bit
        found["GPTQModel, 2 bits"] = lambda model: _gptq(model, subject, bits=2)
    return found


def _layers(model: nn.Module, subject: Subject) -> list[nn.Linear]:
    return chosen_layers(model, nn.Module, lambda m, _: isinstance(m, nn.Linear), subject.skip)


def _bytes(layers: list[nn.Linear], bits: int, group_size: int) -> float:
    """Of packed words, and for each group a 16-bit scale and a zero of 16 bits."""
    return sum(layer.weight.numel() * (bits / 8 + 4 / group_size) for layer in layers)


@torch.no_grad()
def _hqq(model: nn.Module, subject: Subject) -> float:
    from hqq.core.quantize import Quantizer

    layers = _layers(model, subject)
    for layer in layers:
        packed, meta = Quantizer.quantize(
            layer.weight.detach().float(),
            nbits=1,
            group_size=subject.group_size,
            axis=1,
            device="cpu",
            compute_dtype=torch.float32,
        )
        layer.weight.copy_(Quantizer.dequantize(packed, meta))
    return _bytes(layers, 1, subject.group_size)


@torch.no_grad()
def _gptq(model: nn.Module, subject: Subject, bits: int) -> float:
    """Block by block, each given what the blocks before it make of the batches."""
    from gptqmodel.quantization import QuantizeConfig
    from gptqmodel.quantization.gptq import GPTQ

    config = QuantizeConfig(bits=bits, group_size=subject.group_size, sym=False, desc_act=False)
    chosen = set(_layers(model, subject))
    layers = {name: module for name, module in model.named_modules() if module in chosen}
    for _, names in itertools.groupby(layers, key=_block):
        solvers = {name: GPTQ(layers[name], config) for name in names}
        for solver in solvers.values():
            solver.quantizer.configure(perchannel=True)
        hooks = [
            layers[name].register_forward_hook(
                lambda layer, x, y, solver=solver: solver.add_batch(_batch(x[0]), y)
            )
            for name, solver in solvers.items()
        ]
        for batch in subject.batches:
            model(**batch)
        for hook in hooks:
            hook.remove()
        for name, solver in solvers.items():
            layers[name].weight.copy_(solver.quantize()[0])
            solver.free()
    return _bytes(list(layers.values()), bits, subject.group_size)


def _block(name: str) -> str:
    """The block that a layer belongs to: its name up to the first number."""
    parts = name.split(".")
    numbers = [i for i, part in enumerate(parts) if part.isdigit()]
    return ".".join(parts[: numbers[0] + 1]) if numbers else name


def _batch(x: Tensor) -> Tensor:
    return x if x.dim() == 3 else x.unsqueeze(0)

"""calibrate_: quantize a whole model layer by layer, each against the float model's outputs.

Layer by layer in the order they run, with x_0 the layer's input in the float model and x_q the one
in the model whose earlier layers are 1-bit already: choose w_hat so that ``w_hat x_q`` comes close
to ``w x_0``. With ``H = E[x_q x_q^T]`` and ``C = E[x_0 x_q^T]`` that is the calibration of
``w C H^-1`` with moments H: later layers make up for the errors of earlier ones.
"""

import copy
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from tqdm.auto import tqdm

from torch_onebit import ops
from torch_onebit.calibration.moments import Moments, collect
from torch_onebit.calibration.passes import Call, Passes, as_call, find_chains, run
from torch_onebit.calibration.report import CalibrationReport, CalibrationRow
from torch_onebit.calibration.solver import (
    Options,
    damped,
    quantize_calibrated,
    solving_device,
)
from torch_onebit.methods import check_method, quantize_weight
from torch_onebit.nn import OneBitEmbedding, OneBitLinear, OneBitModule, tie
from torch_onebit.surgery import FilterFn, layer_options, obstacle, places
from torch_onebit.training import LoRALinear


def calibrate_(
    model: nn.Module,
    batches: Iterable[Any],
    *,
    group_size: int = 128,
    symmetric: bool = False,
    filter_fn: FilterFn | None = None,
    lora_rank: int = 0,
    options: Options | None = None,
    checkpoint: str | Path | None = None,
    progress: bool = True,
) -> CalibrationReport:
    """Quantize a model to 1 bit in place so that its outputs on batches change least.

    nn.Linear layers are calibrated in the order they run; a layer with a bias also corrects the
    mean of its outputs in it. nn.Embedding, linear layers that share their weight and those that
    batches never reach are quantized by method "optimal" first. Deterministic.

    A few dozen batches are enough. Time per layer: per batch, a forward pass of two models up to
    it, and the solver's cost (``quantize_calibrated``). Where blocks run as a chain, as in most
    transformers, the pass is that of one block; the report names the chains. A cache of keys and
    values passed on from block to block breaks them: switch it off (``use_cache=False``). Memory: a
    second copy of the model, the moments of one layer, 8 k (n + k) bytes, and for all batches the
    inputs of one block of both models.

    Args:
        model: on any device the operators run on; evaluated in eval mode, its mode is kept.
        batches: inputs, each a tensor, a tuple of arguments or a dict of keyword arguments.
        group_size: weights that share a scale: 32, 64 or 128.
        symmetric: store no biases; weights are ``±scale / 2``.
        filter_fn: ``filter_fn(module, name)`` is false to leave the layer, true to quantize it, or
            a dict of ``group_size`` and ``symmetric`` for this layer.
        lora_rank: put a low-rank product of this rank beside every calibrated layer
            (``LoRALinear``) that makes up for most of the error left; 0 for none.
        options: rounds, sweeps and damping of the solver.
        checkpoint: a folder for finished layers; a run that was cut short goes on from there.
        progress: show a progress bar.
    Returns:
        the report: per layer the weight error, the output error and seconds.
    Raises:
        ValueError: no batches, an option or group size that is not allowed, or a checkpoint of
            another model or other options.
    """
    check_method("calibrated", symmetric)
    if isinstance(model, nn.Linear | nn.Embedding):
        raise ValueError(
            f"model must contain the layers to swap, got {type(model).__name__} itself"
        )
    if isinstance(batches, Tensor | dict | str) or not isinstance(batches, Iterable):
        raise ValueError(
            f"batches must be an iterable of batches, such as a list, got {type(batches).__name__}"
        )
    calls = [as_call(batch) for batch in batches]
    if not calls:
        raise ValueError("batches must hold at least one batch, got none")
    if lora_rank < 0:
        raise ValueError(f"lora_rank must be 0 or more, got {lora_rank}")
    options = options or Options()
    report = CalibrationReport()
    jobs = _jobs(model, filter_fn, {"group_size": group_size, "symmetric": symmetric}, report)
    training = model.training
    model.eval()
    reference = copy.deepcopy(model)
    order = _order_of_use(model, calls[0])
    report.chains = find_chains(model, calls[0])
    passes = [
        Passes(m, calls, [m.get_submodule(name) for name in report.chains])
        for m in (reference, model)
    ]
    # Layers without inputs of their own come first: what they do is what the others make up for.
    data_free = [job for job in jobs if job.reason(order)]
    calibrated = sorted(
        (job for job in jobs if not job.reason(order)), key=lambda job: order[id(job.layer)]
    )
    store = _Store(checkpoint, options, len(calls), lora_rank)
    bar = tqdm(total=len(jobs), desc="calibrate", unit="layer", disable=None if progress else True)
    for index, job in enumerate(data_free + calibrated):
        bar.set_postfix_str(job.name, refresh=False)
        saved = store.load(index, job)
        if saved is None:
            start = time.perf_counter()
            if index < len(data_free):
                result = _optimal(job, job.reason(order))
            else:
                twin = reference.get_submodule(job.name)
                moments = collect(passes[0], twin, passes[1], job.layer)
                result = _calibrate(job, moments, options, lora_rank)
            result.seconds = time.perf_counter() - start
            store.save(index, job, result)
        else:
            result = saved
        report.layers.append(result.row(job))
        job.install(result)
        bar.update()
    bar.close()
    _tie_all(jobs)
    model.train(training)
    return report


class _Job:
    """A layer to quantize, and everywhere it is used."""

    def __init__(self, name: str, layer: nn.Module, options: dict[str, Any], shared: bool):
        self.name = name
        self.layer = layer
        self.group_size = options["group_size"]
        self.symmetric = options["symmetric"]
        self.shared = shared  # its weight is another layer's too
        self.places: list[tuple[nn.Module, str]] = []
        self.new: OneBitModule | None = None

    def reason(self, order: dict[int, int]) -> str:
        """Why this layer cannot be calibrated; empty when it can."""
        if isinstance(self.layer, nn.Embedding):
            return "embedding"
        if self.shared:
            return "shared weight"
        return "" if id(self.layer) in order else "not reached by batches"

    def install(self, result: "_Result") -> None:
        """Put the 1-bit layer everywhere the float one was."""
        layer = self.layer
        levels = result.packed, result.scales, result.biases
        options = {"group_size": self.group_size}
        if isinstance(layer, nn.Embedding):
            self.new = OneBitEmbedding.from_packed(*levels, layer.padding_idx, **options)
        else:
            if result.bias is not None:
                with torch.no_grad():
                    layer.bias.copy_(result.bias)
            self.new = OneBitLinear.from_packed(*levels, layer.bias, **options)
        new: nn.Module = self.new
        if result.lora_a is not None:
            new = LoRALinear(self.new, rank=len(result.lora_a))
            with torch.no_grad():
                new.lora_a.copy_(result.lora_a)
                new.lora_b.copy_(result.lora_b)
        for parent, attribute in self.places:
            setattr(parent, attribute, new.train(layer.training))


class _Result:
    """What one layer became; the fields a checkpoint keeps."""

    def __init__(self, packed: Tensor, scales: Tensor, biases: Tensor | None, **rest: Any):
        self.packed, self.scales, self.biases = packed, scales, biases
        self.bias: Tensor | None = rest.get("bias")
        self.lora_a: Tensor | None = rest.get("lora_a")
        self.lora_b: Tensor | None = rest.get("lora_b")
        self.weight_error: float = rest["weight_error"]
        self.output_error: float | None = rest.get("output_error")
        self.note: str = rest.get("note", "")
        self.seconds: float = rest.get("seconds", 0.0)

    def row(self, job: _Job) -> CalibrationRow:
        shape = tuple(job.layer.weight.shape)
        return CalibrationRow(
            job.name, shape, self.weight_error, self.output_error, self.seconds, self.note
        )


@torch.no_grad()
def _optimal(job: _Job, note: str) -> _Result:
    w = job.layer.weight
    levels = quantize_weight(w, "optimal", job.group_size, symmetric=job.symmetric)
    w_hat = ops.dequantize(*levels, job.group_size)
    return _Result(*levels, weight_error=_relative(w_hat - w, w), note=note)


@torch.no_grad()
def _calibrate(job: _Job, moments: Moments, options: Options, rank: int) -> _Result:
    home, bias = job.layer.weight.device, job.layer.bias
    w = job.layer.weight.to(solving_device(home))
    centred = bias is not None  # means can only be corrected where there is a bias
    h, tx, tt = moments.second(centred)
    # The same damping on both sides: inputs that agree leave w as it is.
    damping = damped(h, options.damping) - h
    target = torch.linalg.solve(h + damping, (tx + w.double() @ damping).t(), left=True).t()
    levels = quantize_calibrated(
        target.to(w.dtype), h, job.group_size, symmetric=job.symmetric, options=options
    )
    w_hat = ops.dequantize(*levels, job.group_size).double()
    lora_a = lora_b = None
    if rank:
        lora_a, lora_b = _low_rank(target - w_hat, h + damping, rank)
        w_hat += lora_b @ lora_a
    mean_x, mean_t = moments.means()
    # E|t - w_hat x|^2 = E|t|^2 - 2 tr(E[t x^T] w_hat^T) + tr(w_hat H w_hat^T)
    energy = float(tt.sum())
    difference = energy - 2 * float((tx * w_hat).sum()) + float(((w_hat @ h) * w_hat).sum())

    def back(t: Tensor | None, dtype: torch.dtype = w.dtype) -> Tensor | None:
        return None if t is None else t.to(dtype).to(home)

    return _Result(
        back(levels[0], torch.int32),
        back(levels[1]),
        back(levels[2]),
        lora_a=back(lora_a),
        lora_b=back(lora_b),
        bias=None if bias is None else back(mean_t - w_hat @ mean_x, bias.dtype),
        weight_error=_relative(w_hat - w, w),
        output_error=difference / energy if energy > 0 else 0.0,
    )


def _low_rank(error: Tensor, h: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """a ``[r, k]``, b ``[n, r]`` of least ``tr((error - b a) h (error - b a)^T)``, nearly.

    By subspace iteration: ``n k (r + 8)`` multiply-adds 16 times, where an SVD would take longer
    than the bits. Rows of a are as long as those a ``LoRALinear`` starts with.
    """
    rank = min(rank, *error.shape)
    root = torch.linalg.cholesky(h)
    scaled = error @ root
    generator = torch.Generator().manual_seed(0)  # any start will do
    start = torch.randn(len(h), rank + 8, generator=generator, dtype=h.dtype)
    basis = start.to(h.device)
    for _ in range(8):
        basis = torch.linalg.qr(scaled.t() @ (scaled @ basis))[0]
    _, _, inner = torch.linalg.svd(scaled @ basis, full_matrices=False)
    v = basis @ inner[:rank].t()  # the leading right singular vectors
    a = torch.linalg.solve_triangular(root.t(), v, upper=True).t()
    length = a.norm(dim=1, keepdim=True) * 3**0.5
    return a / length, scaled @ v * length.t()


def _relative(difference: Tensor, w: Tensor) -> float:
    norm = _energy(w)
    return _energy(difference) / norm if norm else 0.0


def _energy(t: Tensor) -> float:
    return float(t.detach().to(solving_device(t.device)).double().square().sum())


def _jobs(
    model: nn.Module,
    filter_fn: FilterFn | None,
    defaults: dict[str, Any],
    report: CalibrationReport,
) -> list[_Job]:
    found = list(places(model, lambda module: type(module) in (nn.Linear, nn.Embedding)))
    owners: dict[int, set[int]] = {}  # layers by the identity of their weight
    for _, _, _, layer in found:
        owners.setdefault(id(layer.weight), set()).add(id(layer))
    jobs: dict[int, _Job] = {}
    for name, parent, attribute, layer in found:
        options = layer_options(filter_fn, layer, name, defaults)
        if options is None:
            continue
        reason = obstacle(layer, options["group_size"])
        if reason:
            report.skipped.append((name, reason))
            continue
        shared = len(owners[id(layer.weight)]) > 1
        job = jobs.setdefault(id(layer), _Job(name, layer, options, shared))
        job.places.append((parent, attribute))
    return list(jobs.values())


def _order_of_use(model: nn.Module, call: Call) -> dict[int, int]:
    """The order in which linear layers first run, by identity."""
    order: dict[int, int] = {}

    def hook(module: nn.Module, args: Any, output: Any) -> None:
        order.setdefault(id(module), len(order))

    layers = [module for module in model.modules() if type(module) is nn.Linear]
    handles = [layer.register_forward_hook(hook) for layer in layers]
    try:
        run(model, call)
    finally:
        for handle in handles:
            handle.remove()
    return order


def _tie_all(jobs: list[_Job]) -> None:
    first: dict[int, OneBitModule] = {}
    for job in jobs:
        owner = first.setdefault(id(job.layer.weight), job.new)
        if owner is not job.new:
            tie(owner, job.new)


class _Store:
    """Finished layers on disk, one file each, written whole or not at all."""

    def __init__(
        self, folder: str | Path | None, options: Options, batches: int, lora_rank: int
    ) -> None:
        self.folder = None if folder is None else Path(folder)
        self.run = {"options": vars(options).copy(), "batches": batches, "lora_rank": lora_rank}
        if self.folder is not None:
            self.folder.mkdir(parents=True, exist_ok=True)

    def _key(self, job: _Job) -> dict[str, Any]:
        return {
            **self.run,
            "name": job.name,
            "shape": list(job.layer.weight.shape),
            "group_size": job.group_size,
            "symmetric": job.symmetric,
            "norm": _energy(job.layer.weight),
        }

    def load(self, index: int, job: _Job) -> _Result | None:
        if self.folder is None or not (self.folder / f"{index:05}.pt").exists():
            return None
        saved = torch.load(self.folder / f"{index:05}.pt", map_location=job.layer.weight.device)
        if saved.pop("key") != self._key(job):
            raise ValueError(
                f"checkpoint must hold layers of this model with these options, got another "
                f"{self.folder / f'{index:05}.pt'}"
            )
        return _Result(**saved)

    def save(self, index: int, job: _Job, result: _Result) -> None:
        if self.folder is None:
            return
        path = self.folder / f"{index:05}.pt"
        partial = path.with_suffix(".partial")
        torch.save({"key": self._key(job), **vars(result)}, partial)
        partial.replace(path)

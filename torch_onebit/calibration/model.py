"""calibrate_: quantize a whole model layer by layer, each against the float model's outputs."""

import copy
import time
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from torch import nn
from tqdm.auto import tqdm

from torch_onebit.calibration.batches import as_calls
from torch_onebit.calibration.checkpoint import Store
from torch_onebit.calibration.collect import Collector
from torch_onebit.calibration.experts import calibrate_experts
from torch_onebit.calibration.jobs import Job, find_jobs, install, put
from torch_onebit.calibration.layer import Normal, Result, calibrate_layer, without_data
from torch_onebit.calibration.running import multiply_in_bfloat16
from torch_onebit.calibration.survey import Survey, survey
from torch_onebit.checks import check_count, check_kind
from torch_onebit.methods import check_method
from torch_onebit.reports import CalibrationReport
from torch_onebit.solver import CalibrationOptions
from torch_onebit.surgery import FilterFn

# Damping of a layer in a loop, in units of the others'. Its inputs will not be those of the float
# model that it is fitted to, but have the error of all loops before: damping is what independent
# errors of that size would add to their moments (docs/which_method.md has figures of an ALBERT).
LOOPED = 3000


def calibrate_(
    model: nn.Module,
    batches: Iterable[Any],
    *,
    group_size: int = 128,
    symmetric: bool = False,
    filter_fn: FilterFn | None = None,
    skip: Iterable[str] | None = None,
    lora_rank: int = 0,
    options: CalibrationOptions | None = None,
    checkpoint: str | Path | None = None,
    progress: bool = True,
) -> nn.Module:
    """Quantize a model to 1 bit in place so that its outputs on batches change least.

    nn.Linear layers, and experts of transformers' mixtures, are calibrated in the order they run; a
    layer with a bias also corrects the mean of its outputs in it. A layer that is called several
    times is fitted to all its calls, every expert to the rows that the router gives it.
    nn.Embedding, linear layers that share their weight and whatever batches never reach are
    quantized by method "optimal" first. Deterministic. All or nothing: after an error or an
    interrupt the model is as it was.

    Give it ten inputs or more for each column of a layer. Time per layer: the sums over them, the
    solver's cost (``quantize_calibrated``) and its share of the passes: where blocks run as a
    chain, as in most transformers, both models run one block at a time; the report names the
    chains. A cache of keys and values passed on from block to block breaks them: switch it off
    (``use_cache=False``).
    Memory: copies of the model without the weights of its layers, the moments of one layer, 12 k
    (n + k) bytes, up to 2 GiB of layer outputs, and for all batches the inputs of one block of both
    models.

    Args:
        model: on any device the operators run on; evaluated in eval mode. Modes are kept.
        batches: an iterable of batches. A tensor is the model's first argument; a tuple or list
            positional arguments; a mapping, such as a dict or BatchEncoding, keyword arguments.
            Arguments that the model does not take are left out, such as labels; of a tuple from a
            DataLoader also those that it does not require. What was made of them is in the report.
        group_size: weights that share a scale: 32, 64 or 128.
        symmetric: store no biases; weights are ``±scale / 2``.
        filter_fn: ``filter_fn(module, name)`` is false to leave the layer, true to quantize it, or
            a dict of ``group_size`` and ``symmetric`` for this layer.
        skip: patterns of names to leave, as in ``quantize_``.
        lora_rank: put a low-rank product of this rank beside every calibrated layer
            (``LoRALinear``) that makes up for most of the error left; 0 for none. Experts have
            none.
        options: rounds, sweeps and damping of the solver.
        checkpoint: a folder for finished layers; a run with the same model, batches and options
            that was cut short goes on from there.
        progress: show a progress bar.
    Returns:
        model. Errors and seconds of each layer, and what was made of batches, are in
        ``report(model)``.
    Raises:
        TypeError: an argument of the wrong kind.
        ValueError: no batches or only empty ones, batches that do not say which arguments they
            are, an option or group size that is not allowed, NaN or Inf in a weight or in what
            batches give a layer, or a checkpoint of another run.
    """
    check_method("calibrated", symmetric)
    check_count("lora_rank", lora_rank)
    options = CalibrationOptions() if options is None else options
    check_kind("options", options, CalibrationOptions, "CalibrationOptions")
    defaults = {"group_size": group_size, "symmetric": symmetric}
    plan, jobs = find_jobs(model, filter_fn, skip, defaults)
    calls, batches_taken = as_calls(model, batches)
    reference = _eval_copy(model, jobs)
    candidates = {job.name: reference.get_submodule(job.name) for job in jobs if not job.reason}
    for layer in candidates.values():
        multiply_in_bfloat16(layer)
    seen = survey(reference, calls, candidates)
    store = Store(checkpoint)
    visits = _visits(jobs, seen)
    ordered = [job for group in visits for job in group]
    store.open(model, ordered, calls, options, lora_rank)
    working = _eval_copy(model, jobs)
    collector = Collector(reference, working, calls, seen)
    bar = _Bar({job.name: _cost(job, seen, options) for job in ordered}, progress)
    new: dict[Job, nn.Module] = {}
    for group in visits:
        bar.start(group)
        results = [store.load(len(new) + i, job.weights[0].device) for i, job in enumerate(group)]
        todo = [job for job, result in zip(group, results, strict=True) if result is None]
        later = ordered[len(new) + len(group) :]
        upcoming = [job for job in later if not (job.reason or job.experts)]
        made = dict(_quantize(todo, upcoming, collector, options, lora_rank))
        for job, saved in zip(group, results, strict=True):
            result = saved or made[job]
            if not saved:
                store.save(len(new), result)
                job.swap.note = result.note
            job.swap.figures = {
                "weight_error": result.weight_error,
                "output_error": result.output_error,
                "seconds": result.seconds,
            }
            new[job] = job.make(result)
            layer = job.make(result).eval()
            multiply_in_bfloat16(layer)
            if job.reason:
                put(working, job.names, layer)
            else:
                collector.installed(job, layer)
            bar.finish(job, fresh=not saved)
    bar.close()
    report = install(plan, new)
    report.calibration = CalibrationReport(batches_taken, tuple(seen.chains))
    return model


def _quantize(
    group: list[Job],
    upcoming: list[Job],
    collector: Collector,
    options: CalibrationOptions,
    rank: int,
) -> Iterator[tuple[Job, Result]]:
    """Results of layers that are given the same inputs."""
    if not group:
        return
    start = time.perf_counter()
    first = group[0]
    if first.experts:
        routed = None if first.reason else collector.routed(first)
        result = calibrate_experts(first.layer, routed, first.group_size, first.symmetric, options)
        result.note = result.note or first.reason
        _, result.seconds = _lap(start)
        yield first, result
        return
    if first.reason:
        for job in group:
            result = without_data(job.layer, job.group_size, job.symmetric, job.reason)
            start, result.seconds = _lap(start)
            yield job, result
        return
    inputs, outputs, note = collector.collect(group, upcoming)
    start, shared = _lap(start)
    normals: dict[bool, Normal] = {}
    damping = options.damping * (LOOPED if collector.seen.uses[first.name].loops else 1)
    for job in group:
        centred = job.layer.bias is not None  # means can only be corrected where there is a bias
        if centred not in normals:
            normals[centred] = Normal(inputs, centred, damping)
        result = calibrate_layer(
            job.layer,
            normals[centred],
            outputs[job.name],
            job.group_size,
            job.symmetric,
            options,
            rank,
        )
        calls = max(collector.seen.uses[job.name].counts)
        times = [f"called {calls} times"] if calls > 1 else []
        result.note = ", ".join([*times, *[note] * bool(note)])
        start, seconds = _lap(start)
        result.seconds = seconds + shared / len(group)
        yield job, result


def _lap(start: float) -> tuple[float, float]:
    now = time.perf_counter()
    return now, now - start


def _visits(jobs: list[Job], seen: Survey) -> list[list[Job]]:
    """Jobs in the order they are worked on, in groups that are given the same inputs."""
    for job in jobs:
        if not job.reason and not (job.name in seen.uses and seen.uses[job.name].rows):
            job.reason = "not reached by batches"
    # Layers without inputs of their own come first: what they do is what the others make up for.
    groups = [[job] for job in jobs if job.reason]
    by_name = {job.name: job for job in jobs if not job.reason}
    for name in seen.uses:
        if name not in by_name:
            continue
        job, last = by_name[name], groups[-1] if groups else []
        same = [other.name for other in last if not (other.reason or other.experts)]
        if seen.follows.get(name) in same and not job.experts:
            last.append(job)
        else:
            groups.append([job])
    return groups


def _eval_copy(model: nn.Module, jobs: list[Job]) -> nn.Module:
    """A copy in eval mode that shares the weights to be quantized."""
    shared = {id(weight): weight for job in jobs for weight in job.weights}
    result = copy.deepcopy(model, shared).eval()
    for module in result.modules():
        if isinstance(module, nn.TransformerEncoder):  # nested tensors have no rows to sum over
            module.use_nested_tensor = module.enable_nested_tensor = False
    return result


def _cost(job: Job, seen: Survey, options: CalibrationOptions) -> float:
    """Multiply-adds of a layer, counted as often as they take longer than those of the passes."""
    *count, n, k = job.swap.shape
    if count:  # experts: as if each were given its share of the rows, twice
        n *= count[0]
    if job.reason:
        return 50.0 * n * k
    rows, groups = seen.uses[job.name].rows, k / job.group_size
    passes = 3 * rows * n * k + rows * k * (k / 2 + n)
    solver = options.rounds * n * (6 * k * k + 3 * (2 * groups) ** 3)
    return passes + solver + k**3


class _Bar:
    """A progress bar whose estimate counts layers by what they cost."""

    def __init__(self, costs: dict[str, float], shown: bool) -> None:
        self.costs = costs
        self.bar = tqdm(
            total=sum(costs.values()),
            desc="calibrate",
            disable=None if shown else True,
            smoothing=0,
            bar_format="{desc}: {percentage:3.0f}%|{bar}| {elapsed} < {remaining} {postfix}",
        )

    def start(self, group: list[Job]) -> None:
        self.bar.set_postfix_str(group[0].name, refresh=True)

    def finish(self, job: Job, fresh: bool) -> None:
        cost = self.costs[job.name]
        if not fresh:  # loaded, which says nothing of the time the others take
            self.bar.total -= cost
        else:
            self.bar.update(cost)

    def close(self) -> None:
        self.bar.close()

"""What batches do in a model: which layers they reach, in what order, how often, along what way."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from torch_onebit.calibration.batches import Call
from torch_onebit.calibration.chains import BlockRun, Route, containers, identity, is_chain
from torch_onebit.calibration.running import input_of, run
from torch_onebit.linear_algebra import not_finite


@dataclass
class Use:
    """How batches use a layer."""

    counts: list[int]  # calls, per batch
    spans: list[tuple[int, int]]  # positions of its first and last call among all, per batch
    rows: int = 0  # of its inputs, over all batches
    route: Route | None = None  # what all its calls go through
    loops: bool = False  # what it gives in one call changes what it is given in another

    def before(self, other: "Use", batch: int) -> bool:
        """Whether all calls of this layer come before all those of another."""
        return self.spans[batch][1] < other.spans[batch][0]


@dataclass
class Survey:
    """What ``survey`` saw."""

    uses: dict[str, Use] = field(default_factory=dict)  # of layers reached, as they first ran
    chains: list[str] = field(default_factory=list)
    # Layers that were always given the very tensor that the layer before was given, and that one.
    follows: dict[str, str] = field(default_factory=dict)


def survey(model: nn.Module, calls: list[Call], layers: Mapping[str, nn.Module]) -> Survey:
    """Run model once over all batches and see how they use layers.

    Raises:
        ValueError: a layer's inputs or outputs are not finite, or batches are all empty.
    """
    found = Survey()
    chains = dict(containers(model))
    previous: dict[str, set[str]] = {}
    for batch, call in enumerate(calls):
        watcher = _Watcher(found, batch, len(calls), previous)
        run_watched(model, chains, layers, watcher, call)
        chains = {
            name: chain
            for name, chain in chains.items()
            if is_chain([watcher.runs[name, i] for i in range(len(chain))])
        }
    found.chains = list(chains)
    for name, use in found.uses.items():
        use.route = tuple(step for step in use.route or () if step[0] in chains)
        if previous[name] - {""} == previous[name] and len(previous[name]) == 1:
            found.follows[name] = next(iter(previous[name]))
        repeated = [batch for batch, count in enumerate(use.counts) if count > 1]
        if repeated:
            use.loops = _feeds_itself(model, layers[name], calls[repeated[0]])
    if found.uses and not any(use.rows for use in found.uses.values()):
        raise ValueError(f"batches must hold inputs, got {len(calls)} that are all empty")
    return found


class _Watcher:
    """Notes what happens to one batch."""

    def __init__(
        self, found: Survey, batch: int, batches: int, previous: dict[str, set[str]]
    ) -> None:
        self.found, self.batch, self.batches, self.previous = found, batch, batches, previous
        self.position = 0
        self.inside: list[tuple[str, int]] = []  # blocks that are running
        self.runs: dict[tuple[str, int], list[BlockRun]] = {}
        self.last: tuple[str, Tensor | None] = ("", None)  # the layer called last and its input
        self.last_identity: Any = None

    def layer(self, name: str, x: Tensor, output: Tensor) -> None:
        _check_finite(x, name, self.batch, "inputs")
        _check_finite(output, name, self.batch, "outputs")
        if name not in self.found.uses:
            empty = [(-1, -1)] * self.batches
            self.found.uses[name] = Use([0] * self.batches, empty)
        use, route = self.found.uses[name], tuple(self.inside)
        first = use.spans[self.batch][0] if use.counts[self.batch] else self.position
        use.spans[self.batch] = first, self.position
        use.counts[self.batch] += 1
        use.rows += x.numel() // x.shape[-1] if x.shape[-1] else 0
        shared = route if use.route is None else use.route
        use.route = tuple(step for step in shared if step in route)
        now = identity(x)
        alone = use.counts[self.batch] == 1
        same = self.last[0] if alone and now == self.last_identity else ""
        self.previous.setdefault(name, set()).add(same)
        if not alone:
            self.previous[name].add("")
        self.last, self.last_identity = (name, x), now
        self.position += 1


def run_watched(
    model: nn.Module,
    chains: Mapping[str, nn.Module],
    layers: Mapping[str, nn.Module],
    watcher: _Watcher,
    call: Call,
) -> None:
    """Run model on call with hooks that tell the watcher."""
    handles = []
    for name, chain in chains.items():
        for i, block in enumerate(chain):
            step = name, i
            watcher.runs[step] = []

            def before(block: nn.Module, args: Any, kwargs: Any, step: Any = step) -> None:
                watcher.inside.append(step)
                watcher.runs[step].append(BlockRun(args, kwargs))

            def after(block: nn.Module, args: Any, output: Any, step: Any = step) -> None:
                watcher.inside.pop()
                watcher.runs[step][-1].end(output)

            handles.append(block.register_forward_pre_hook(before, with_kwargs=True))
            handles.append(block.register_forward_hook(after, prepend=True))
    for name, layer in layers.items():

        def called(
            layer: nn.Module, args: Any, kwargs: Any, output: Tensor, name: str = name
        ) -> None:
            watcher.layer(name, input_of(args, kwargs), output)

        # Before the hooks of a chain: a layer may be a block itself, and runs inside it.
        handles.append(layer.register_forward_hook(called, with_kwargs=True, prepend=True))
    try:
        run(model, call)
    finally:
        for handle in handles:
            handle.remove()


def _feeds_itself(model: nn.Module, layer: nn.Module, call: Call) -> bool:
    """Whether inputs of a layer change with its own outputs."""

    def inputs(change: float) -> list[Tensor]:
        seen: list[Tensor] = []

        def hook(layer: nn.Module, args: Any, kwargs: Any, output: Tensor) -> Tensor:
            seen.append(input_of(args, kwargs).clone())
            return output + change

        handle = layer.register_forward_hook(hook, with_kwargs=True)
        try:
            run(model, call)
        finally:
            handle.remove()
        return seen

    pairs = zip(inputs(0.0), inputs(1.0), strict=False)
    return not all(torch.equal(before, after) for before, after in pairs)


def _check_finite(t: Tensor, name: str, batch: int, what: str) -> None:
    # A finite sum is the proof in a tenth of the time; finite values can have one that is not.
    if not (torch.isfinite(t.sum()) or torch.isfinite(t).all()):
        raise ValueError(
            f"batches must give every layer finite {what}, got {not_finite(t)} from batch "
            f"{batch} at layer '{name}'"
        )

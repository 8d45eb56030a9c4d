"""What calibrate_ did, layer by layer."""

from dataclasses import dataclass, field


@dataclass(frozen=True)
class CalibrationRow:
    """One layer. Errors are squared and relative to what they are errors of: of the weights, and
    of the outputs, ``E|y - t|^2 / E|t|^2`` over all calls in all batches, t what the layer aimed
    at: 0 when outputs are right, 1 when they might as well be 0. None when the layer was quantized
    without its inputs, for the reason in ``note``."""

    name: str
    shape: tuple[int, int]
    weight_error: float
    output_error: float | None
    seconds: float
    note: str = ""


@dataclass
class CalibrationReport:
    """Layers in the order they were calibrated. ``print(report)`` shows a table.

    What stayed float, and why, is in ``torch_onebit.report(model)``, with these figures.
    """

    layers: list[CalibrationRow] = field(default_factory=list)
    chains: list[str] = field(default_factory=list)  # run block by block, not from the start
    batches: str = ""  # what was made of them

    @property
    def seconds(self) -> float:
        return sum(row.seconds for row in self.layers)

    def __str__(self) -> str:
        width = max([len(row.name) for row in self.layers] + [5])
        lines = [f"{'layer':{width}}  {'shape':>13}  weight err  output err  seconds"]
        for row in self.layers:
            shape = f"{row.shape[0]} x {row.shape[1]}"
            output = "-" if row.output_error is None else f"{row.output_error:.4f}"
            line = (
                f"{row.name:{width}}  {shape:>13}  {row.weight_error:>10.4f}  {output:>10}"
                f"  {row.seconds:>7.2f}  {row.note}"
            )
            lines.append(line.rstrip())
        lines.append(f"{len(self.layers)} layers, {self.seconds:.1f} s")
        lines.append(self.batches)
        if self.chains:
            names = [name or "the whole model" for name in self.chains]
            lines.append(f"ran one block at a time: {', '.join(names)}")
        else:
            lines.append(
                "ran the whole model for every layer: it has no list of blocks of which each gets "
                "just what the one before returned (slower, results are the same; a cache of keys "
                "and values is a common reason: use_cache=False)"
            )
        return "\n".join(lines)

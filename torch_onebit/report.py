"""What quantize_ did: a table of layers, bits per weight and bytes."""

from dataclasses import dataclass, field

from torch import Tensor, nn

from torch_onebit.nn import OneBitModule


@dataclass(frozen=True)
class LayerRow:
    """One swapped layer; bytes count its weight, scales and biases (a tied one: 0)."""

    name: str
    kind: str
    shape: tuple[int, int]
    group_size: int
    bytes_before: int
    bytes_after: int


@dataclass
class QuantizeReport:
    """Layers swapped and layers left, with reasons. ``print(report)`` shows it as a table."""

    layers: list[LayerRow] = field(default_factory=list)
    skipped: list[tuple[str, str]] = field(default_factory=list)  # name, reason

    def add(self, name: str, before: nn.Module, after: OneBitModule, *, shared: bool) -> None:
        levels = [after.weight, after.scales, after.biases]
        self.layers.append(
            LayerRow(
                name,
                type(after).__name__,
                tuple(before.weight.shape),
                after.group_size,
                0 if shared else _bytes(before.weight),
                0 if shared else sum(_bytes(t) for t in levels if t is not None),
            )
        )

    def skip(self, name: str, reason: str) -> None:
        self.skipped.append((name, reason))

    @property
    def bytes_before(self) -> int:
        return sum(row.bytes_before for row in self.layers)

    @property
    def bytes_after(self) -> int:
        return sum(row.bytes_after for row in self.layers)

    @property
    def bits_per_weight(self) -> float:
        """Bits stored per weight, scales and biases included; 0 when nothing was swapped."""
        weights = sum(row.shape[0] * row.shape[1] for row in self.layers if row.bytes_after)
        return 8 * self.bytes_after / weights if weights else 0.0

    def __str__(self) -> str:
        rows = [("layer", "kind", "shape", "group", "bytes before", "after")]
        for row in self.layers:
            rows.append(
                (
                    row.name,
                    row.kind,
                    f"{row.shape[0]} x {row.shape[1]}",
                    str(row.group_size),
                    f"{row.bytes_before:,}" if row.bytes_before else "tied",
                    f"{row.bytes_after:,}" if row.bytes_after else "tied",
                )
            )
        widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
        lines = [
            "  ".join(
                cell.ljust(width) if column < 2 else cell.rjust(width)
                for column, (cell, width) in enumerate(zip(row, widths, strict=True))
            )
            for row in rows
        ]
        lines.append(
            f"{len(self.layers)} layers, {self.bits_per_weight:.3f} bits per weight, "
            f"{self.bytes_before:,} -> {self.bytes_after:,} bytes"
        )
        lines += [f"left as it was: {name} ({reason})" for name, reason in self.skipped]
        return "\n".join(lines)


def _bytes(t: Tensor) -> int:
    return t.numel() * t.element_size()

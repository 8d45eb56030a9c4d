"""Say what a checkpoint holds: formats, layers, bits and bytes; nothing is loaded.

PATH is a folder of MLX or a GGUF file. A GGUF file with tensors that are not read here is shown
too, type by type.
"""

import argparse
import math
from collections import defaultdict
from pathlib import Path

from torch_onebit.checkpoint import CheckpointError, MLXCheckpoint
from torch_onebit.checkpoint.gguf import GGUFFile, type_name
from torch_onebit.cli.inputs import is_gguf

HELP = "what a checkpoint holds"
SIZES = {"F64": 8, "F32": 4, "F16": 2, "BF16": 2, "U32": 4, "I32": 4, "I64": 8, "U8": 1, "I8": 1}
Row = tuple[str, str, tuple[int, ...], int | None]  # name, type, shape, bytes


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("path", type=Path, metavar="PATH")
    parser.add_argument("--tensors", action="store_true", help="a line for each tensor")


def run(arguments: argparse.Namespace) -> None:
    path = arguments.path
    if not path.exists():
        raise CheckpointError(f"PATH must exist, got {path}")
    title, rows = _gguf(path) if is_gguf(path) else _mlx(path)
    print(title)
    if arguments.tensors:
        for name, kind, shape, _ in rows:
            print(f"  {name}  {kind}  {' x '.join(map(str, shape)) or 'scalar'}")
    totals: dict[str, list[int]] = defaultdict(lambda: [0, 0, 0])
    for _, kind, shape, size in rows:
        total = totals[kind]
        total[0] += 1
        total[1] += math.prod(shape)
        total[2] += size or 0
    width = max((len(kind) for kind in totals), default=0)
    for kind, (count, weights, size) in sorted(totals.items()):
        bits = f"{8 * size / weights:6.3f} bits each" if weights and size else ""
        print(f"{kind:<{width}}  {count:>6,} tensors  {weights:>15,} weights  {bits}")
    print(f"{sum(size or 0 for *_, size in rows):,} bytes of tensors")


def _mlx(path: Path) -> tuple[str, list[Row]]:
    source = MLXCheckpoint(path)
    rows: list[Row] = []
    for layer_path in source.paths:
        layer = source.layer(layer_path)
        names = [f"{layer_path}.{entry}" for entry in ("weight", "scales", "biases")]
        size = sum(_bytes(source, n) for n in names if source.has(n))
        rows.append((layer_path, str(layer), layer.shape, size))
    for name in source.names:
        rows.append((name, source.dtype(name), source.shape(name), _bytes(source, name)))
    return f"MLX, {source.config.get('model_type', 'of no model_type')}", rows


def _bytes(source: MLXCheckpoint, name: str) -> int:
    return math.prod(source.shape(name)) * SIZES.get(source.dtype(name), 1)


def _gguf(path: Path) -> tuple[str, list[Row]]:
    file = GGUFFile(path)
    rows = [(t.name, type_name(t.kind), t.shape, t.size) for t in file.tensors.values()]
    return f"GGUF, {file.metadata.get('general.architecture', 'of no architecture')}", rows

"""``python -m torch_onebit bench``: the kernels against torch, MLX and the machine's own limits."""

from torch_onebit.bench.cli import add_arguments, run

__all__ = ["add_arguments", "run"]

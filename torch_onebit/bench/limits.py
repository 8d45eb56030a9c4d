"""What this machine can do at most, measured in the same run as everything else."""

import torch

from torch_onebit.bench.measure import interleave

READ_BYTES = 512 << 20
FMA_STEPS = 1 << 21


def measure_limits(rounds: int) -> dict[str, float]:
    """Bytes per second read from memory, float32 multiply-adds per second; all threads."""
    memory = torch.zeros(READ_BYTES // 4)
    count = torch.ops.onebit_bench.multiply_adds(FMA_STEPS)
    times = interleave(
        {
            "read": lambda: torch.ops.onebit_bench.read_memory(memory),
            "fma": lambda: torch.ops.onebit_bench.multiply_adds(FMA_STEPS),
        },
        rounds,
    )
    return {
        "read_bytes_per_second": READ_BYTES / times["read"].median,
        "macs_per_second": count / times["fma"].median,
    }

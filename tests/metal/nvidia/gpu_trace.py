"""Writes down what the emulated Metal does in the selftest, and the shaders for an NVIDIA GPU.

``python tests/metal/nvidia/gpu_trace.py build/metal_trace``; then, where there is such a GPU,
``python tests/metal/nvidia/replay.py build/metal_trace``.
"""

import json
import os
import sys
from collections.abc import Callable
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import gpu_build
import host_build
import toolchain

from torch_onebit import selftest

HERE = Path(__file__).resolve().parent


def recorder(folder: Path) -> Path:
    library = folder / "record.so"
    flags = ["-std=c++17", "-O1", "-fPIC", "-shared", "-Wall"]
    toolchain.run(["g++", *flags, str(HERE / "record.cpp"), "-o", str(library)])
    return library


def record(folder: Path, run: Callable[[], None]) -> None:
    """Into folder/dispatches goes what `run` makes the emulated Metal do."""
    host_build.load()
    os.environ["ONEBIT_RECORDED"] = os.environ["ONEBIT_EMULATOR"]
    os.environ["ONEBIT_RECORD"] = str(folder / "dispatches")
    os.environ["ONEBIT_EMULATOR"] = str(recorder(folder).resolve())
    run()


def check_every_kernel() -> None:
    for gpu in host_build.GPUS:
        os.environ["ONEBIT_FAKE_GPU"] = gpu
        failed = [str(row) for row in selftest.rows("mps") if not row.passed]
        assert not failed, "\n".join(failed)


def main() -> None:
    folder = Path(sys.argv[1])
    folder.mkdir(parents=True, exist_ok=True)
    record(folder, check_every_kernel)
    text, names, constants = gpu_build.source()
    program = gpu_build.compile_for("sm_90", text)
    (folder / "names.json").write_text(json.dumps({"kernels": names, "constants": constants}))
    (folder / "shaders.cubin").write_bytes(program.code)


if __name__ == "__main__":
    main()

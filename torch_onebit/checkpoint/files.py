"""Reading small files with a bound, staying inside a folder, replacing a folder at once."""

import contextlib
import ctypes
import json
import os
import shutil
import stat
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from torch_onebit.checkpoint.source import CheckpointError

# A config is kilobytes; the index of 90,000 tensors 9 MB. Python's objects take some 20 bytes for a
# byte of hostile JSON, so this is also the bound on memory.
MAX_JSON_BYTES = 32 << 20


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object from a file.

    Raises:
        CheckpointError: not a regular file, too large, not JSON, or not an object.
    """
    check_regular(path)
    with path.open("rb") as file:
        data = file.read(MAX_JSON_BYTES + 1)
    if len(data) > MAX_JSON_BYTES:
        raise CheckpointError(f"{path} must be at most {MAX_JSON_BYTES} bytes, got more")
    try:
        value = json.loads(data)
    except (ValueError, RecursionError) as error:  # UnicodeDecodeError is a ValueError
        raise CheckpointError(f"{path} must be JSON, got {error}") from error
    if not isinstance(value, dict):
        raise CheckpointError(f"{path} must be a JSON object, got {type(value).__name__}")
    return value


def check_regular(path: Path) -> None:
    """Raise unless path leads to a regular file: opening a pipe waits, a device has no end."""
    try:
        mode = path.stat().st_mode
    except OSError as error:
        raise CheckpointError(f"{path} must exist, got {error.strerror}") from error
    if not stat.S_ISREG(mode):
        raise CheckpointError(f"{path} must be a regular file, got another kind")


def file_in(folder: Path, name: Any) -> Path:
    """The file of this name in a folder, where a checkpoint's own text gives the name.

    A symbolic link may stay in the folder or lead to the ``blobs`` of the Hugging Face cache that
    the folder is part of, and nowhere else.

    Raises:
        CheckpointError: a name that is not one plain component, or leads outside, or to something
            that is not a regular file.
    """
    if not isinstance(name, str) or not name or "\0" in name or name != Path(name).name:
        raise CheckpointError(f"{folder}: a file must be named without folders, got {name!r}")
    path = folder / name
    check_regular(path)
    target, home = path.resolve(), folder.resolve()
    if target.parent != home and target.parent != home.parent.parent / "blobs":
        raise CheckpointError(f"{path} must stay in its folder, got a link to {target}")
    return path


@contextlib.contextmanager
def replaced_folder(path: Path, old: Callable[[str], bool]) -> Iterator[Path]:
    """A folder to write into, which takes the place of ``path`` at once when the block ends well.

    Files of ``path`` for which ``old(name)`` is false are kept (linked where that is possible).
    Killed at any moment, ``path`` is as it was or as it shall be; what a killed process leaves
    behind is named ``.<name>.*.partial`` and lies beside it.

    Raises:
        CheckpointError: path is something else than a folder.
    """
    path = path.resolve()
    if path.exists() and not path.is_dir():
        raise CheckpointError(f"{path} must be a folder, got a file")
    path.parent.mkdir(parents=True, exist_ok=True)
    draft = Path(tempfile.mkdtemp(prefix=f".{path.name}.", suffix=".partial", dir=path.parent))
    try:
        if path.exists():
            shutil.copytree(
                path,
                draft,
                symlinks=True,
                copy_function=_link_or_copy,
                dirs_exist_ok=True,
                ignore=lambda folder, names: (
                    [n for n in names if old(n)] if Path(folder) == path else []
                ),
            )
        else:
            mask = os.umask(0)
            os.umask(mask)
            draft.chmod(0o777 & ~mask)  # mkdtemp's is for its owner only
        yield draft
        for file in draft.iterdir():
            if file.is_file() and not file.is_symlink():
                _sync(file)
        _sync(draft)
        if path.exists():
            exchange(draft, path)
        else:
            draft.rename(path)
        _sync(path.parent)
    finally:
        shutil.rmtree(draft, ignore_errors=True)  # the draft, or what it has replaced


@contextlib.contextmanager
def replaced_file(path: Path) -> Iterator[Path]:
    """As ``replaced_folder``, for one file."""
    path = path.resolve()
    if path.is_dir():
        raise CheckpointError(f"{path} must be a file, got a folder")
    path.parent.mkdir(parents=True, exist_ok=True)
    draft = path.with_name(f".{path.name}.{os.getpid()}.partial")
    try:
        yield draft
        _sync(draft)
        draft.replace(path)
        _sync(path.parent)
    finally:
        draft.unlink(missing_ok=True)


def exchange(first: Path, second: Path) -> None:
    """Swap two folders: in one step where the system can (Linux, macOS), else by three renames."""
    if not _exchange_at_once(first, second):
        aside = first.with_name(first.name + ".old")
        second.rename(aside)
        first.rename(second)
        aside.rename(first)


def _exchange_at_once(first: Path, second: Path) -> bool:
    """renameat2(RENAME_EXCHANGE) or renamex_np(RENAME_SWAP); false where there is no such call or
    the file system refuses it."""
    names = os.fsencode(first), os.fsencode(second)
    library = ctypes.CDLL(None, use_errno=True) if os.name == "posix" else None
    if sys.platform == "linux" and hasattr(library, "renameat2"):
        here = -100  # AT_FDCWD
        return library.renameat2(here, names[0], here, names[1], 2) == 0
    if sys.platform == "darwin" and hasattr(library, "renamex_np"):
        return library.renamex_np(*names, 2) == 0
    return False


def _link_or_copy(source: str, target: str) -> None:
    try:
        os.link(source, target, follow_symlinks=False)
    except OSError:  # another file system, or one without links
        shutil.copy2(source, target, follow_symlinks=False)


def _sync(path: Path) -> None:
    """Have the system write a file, or the names in a folder, to the disk."""
    if path.is_dir() and os.name != "posix":
        return
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)

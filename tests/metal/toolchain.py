"""Compilers and the cache of what they made, keyed by content."""

import hashlib
import os
import subprocess
from pathlib import Path

HERE = Path(__file__).parent
ROOT = HERE.parent.parent
SHADERS = ROOT / "metal"


def cache_directory() -> Path:
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    path = Path(base) / "torch_onebit"
    path.mkdir(parents=True, exist_ok=True)
    return path


def zig() -> str:
    """The compiler inside the `ziglang` wheel: clang for every target, no system package needed."""
    import ziglang

    return str(Path(ziglang.__file__).parent / "zig")


def zig_include() -> str:
    import ziglang

    return str(Path(ziglang.__file__).parent / "lib" / "include")


class CompileError(Exception):
    """A compiler refused; the message is its own."""


def run(command: list[str]) -> None:
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise CompileError(f"{' '.join(command)}\n{done.stderr[:8000]}")


def digest(*parts: str | bytes) -> str:
    h = hashlib.sha256()
    for part in parts:
        h.update(part.encode() if isinstance(part, str) else part)
        h.update(b"\0")
    return h.hexdigest()[:20]


def put(path: Path, text: str) -> Path:
    """Write a file whose name tells its content; whole at once, for other processes do the same."""
    if not path.exists():
        scratch = path.with_name(f"{path.name}.{os.getpid()}")
        scratch.write_text(text)
        scratch.rename(path)
    return path


def object_file(source: Path, compiler: list[str], inputs: list[Path], suffix: str = ".o") -> Path:
    """Compiles `source` unless the cache has it; `inputs` are the headers it includes."""
    key = digest(source.read_bytes(), *compiler, *(p.read_bytes() for p in sorted(inputs)))
    target = cache_directory() / f"{source.stem}-{key}{suffix}"
    if not target.exists():
        scratch = target.with_name(f"{target.name}.{os.getpid()}")
        run([*compiler, "-c", str(source), "-o", str(scratch)])
        scratch.rename(target)
    return target

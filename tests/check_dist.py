"""What a wheel and an sdist hold, and what they must not: `python tests/check_dist.py dist`."""

import sys
import tarfile
import zipfile
from pathlib import Path

ROOT = Path(__file__).parent.parent


def tree(*folders: str) -> set[str]:
    files = (p for folder in folders for p in (ROOT / folder).rglob("*") if p.is_file())
    return {str(p.relative_to(ROOT)) for p in files if "__pycache__" not in p.parts}


def python_files() -> set[str]:
    return {name for name in tree("torch_onebit") if name.endswith((".py", ".typed"))}


def faults_of_wheel(names: set[str]) -> list[str]:
    wanted = python_files() | {"torch_onebit/_C.abi3.so"}
    inside = {name for name in names if ".dist-info/" not in name}
    return [
        *(f"lacks {name}" for name in sorted(wanted - inside)),
        *(f"holds {name}" for name in sorted(inside - wanted)),
    ]


def faults_of_sdist(names: set[str]) -> list[str]:
    """Of the names without the top folder."""
    wanted = tree("csrc", "metal") | python_files() | {"setup.py", "pyproject.toml", "LICENSE"}
    folders = ("tests/", "benchmarks/", "examples/", "build/")
    return [
        *(f"lacks {name}" for name in sorted(wanted - names)),
        *(f"holds {n}" for n in sorted(names) if n.startswith(folders) or n.endswith(".so")),
    ]


def main(folder: Path) -> int:
    (wheel,), (sdist,) = folder.glob("*.whl"), folder.glob("*.tar.gz")
    with zipfile.ZipFile(wheel) as archive:
        faults = {wheel.name: faults_of_wheel(set(archive.namelist()))}
    with tarfile.open(sdist) as archive:
        files = {m.name.partition("/")[2] for m in archive.getmembers() if m.isfile()}
    faults[sdist.name] = faults_of_sdist(files)
    for archive, found in faults.items():
        size = (folder / archive).stat().st_size
        print(f"{archive}: {size:,} bytes" + "".join(f"\n  {fault}" for fault in found))
    return any(faults.values())


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1])))

"""Who may include whom, and where an operator lives: docs/architecture.md, read off the sources."""

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
ISAS = [p.name for p in sorted((ROOT / "csrc/cpu/kernels").iterdir()) if p.is_dir()]
BACKENDS = [
    p.name
    for p in sorted((ROOT / "csrc").iterdir())
    if p.is_dir() and p.name not in ("ops", "bench", "__pycache__")
]

# a room of the C++ house: the rooms besides itself whose headers it may include
ROOMS = {
    "csrc/format.h": [],  # shaders read it too
    "csrc/mps/params.h": ["csrc/format.h"],
    "metal": ["csrc/format.h", "csrc/mps/params.h"],
    "csrc/bench": [],
    "csrc/ops": ["csrc/format.h"],
    "csrc/ops/codec": ["csrc/ops"],
    "csrc/ops/product": ["csrc/ops"],
    "csrc/ops/levels": ["csrc/ops", "csrc/ops/codec"],  # quantize_levels has the shapes of quantize
    "csrc/ops/moments": ["csrc/ops"],
    **{
        f"csrc/{backend}": ["csrc/ops", "csrc/format.h", "csrc/mps/params.h"]
        + [f"csrc/ops/{room}" for room in ("codec", "product", "levels", "moments")]
        for backend in BACKENDS
    },
    "csrc/cpu/kernels": ["csrc/format.h"],
    **{f"csrc/cpu/kernels/{isa}": ["csrc/format.h", "csrc/cpu/kernels"] for isa in ISAS},
}
ROOMS["csrc/cpu"].append("csrc/cpu/kernels")
# files: system headers they must not include, why
HEADERS = {
    "metal/*": (r"torch|ATen|c10", "shaders know no torch"),
    "csrc/mps/launch_plan.h": (
        r"torch|ATen|c10|Metal/|Foundation|string$",
        "plans are plain C++",
    ),
    "csrc/cuda/launch_plan.h": (r"torch|ATen|c10|cuda|string$", "plans are plain C++"),
    "csrc/cuda/kernels/*": (r".", "NVRTC has no headers"),
    "csrc/cpu/kernels/**/*": (r"torch|ATen|c10", "kernels compile without torch"),
    "csrc/**/*": (r"torch/extension\.h|ATen/ATen\.h|torch/all\.h", "narrow headers only"),
}
# Python files: names they must not use, why
NAMES = {
    "torch_onebit/nn/*.py": (r"torch\.ops\.onebit|<<|>>", "modules call torch_onebit.ops"),
    "torch_onebit/checkpoint/*.py": (
        r"torch_onebit\.nn|pickle|torch\.load$|^eval$",
        "formats do not know modules, and files run no code",
    ),
    "tests/reference.py": (r"torch", "the reference is independent"),
}


def includes(path: Path) -> tuple[list[str], list[str]]:
    """The "local" and the <system> headers that a C++ file names."""
    lines = re.findall(r'^\s*#\s*(?:include|import)\s+(["<])([^">]+)', path.read_text(), re.M)
    return [n for mark, n in lines if mark == '"'], [n for mark, n in lines if mark == "<"]


def files_of(pattern: str) -> list[Path]:
    other = (".py", ".pyc", "")
    return [p for p in sorted(ROOT.glob(pattern)) if p.is_file() and p.suffix not in other]


def room_of(path: Path) -> str | None:
    """The room with the longest name that a file is in."""
    name = path.relative_to(ROOT).as_posix()
    rooms = [r for r in ROOMS if name == r or name.startswith(r + "/")]
    return max(rooms, key=len, default=None)


@pytest.mark.parametrize("room", ROOMS)
def test_a_room_includes_only_the_rooms_below_it(room):
    pattern = room if room.endswith(".h") else f"{room}/**/*"
    files = [p for p in files_of(pattern) if room_of(p) == room]
    assert files
    for path in files:
        for name in includes(path)[0]:
            if name == "shader_source.h" or name.startswith(("kernel_source", "generated/")):
                continue  # written by the build
            target = (path.parent / name).resolve()
            assert target.is_file(), f"{path}: {name}"
            assert room_of(target) in (room, *ROOMS[room]), f"{path}: {name}"


@pytest.mark.parametrize("pattern", HEADERS)
def test_headers_that_a_file_must_not_include(pattern):
    never, why = HEADERS[pattern]
    files = files_of(pattern)
    assert files
    for path in files:
        for name in includes(path)[1]:
            assert not re.search(never, name), f"{path}: {name}: {why}"


def names_used(path: Path) -> set[str]:
    """Modules imported, dotted names and shifts of a Python file."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            found |= {f"{node.module}.{alias.name}" for alias in node.names}
        elif isinstance(node, ast.Attribute | ast.Name):
            found.add(ast.unparse(node))
        elif isinstance(node, ast.LShift | ast.RShift):
            found.add("<<" if isinstance(node, ast.LShift) else ">>")
    return found


@pytest.mark.parametrize("pattern", NAMES)
def test_names_that_a_python_file_must_not_use(pattern):
    never, why = NAMES[pattern]
    files = sorted(ROOT.glob(pattern))
    assert files
    for path in files:
        broken = [name for name in names_used(path) if re.search(never, name)]
        assert not broken, f"{path}: {broken}: {why}"


def places_of_operators() -> dict[str, set[str]]:
    """By operator: the folders of csrc that declare or implement it."""
    places: dict[str, set[str]] = {}
    texts = {
        path: path.read_text()
        for path in sorted((ROOT / "csrc").rglob("*.*"))
        if path.suffix in (".h", ".cpp")
    }
    said_once = {}  # by name of its struct
    for path, text in texts.items():
        if path.parts[-3] == "ops":
            said_once |= dict(re.findall(r'struct (\w+) {\n.*kName = "onebit::(\w+)"', text))
    for path, text in texts.items():
        if "TORCH_LIBRARY(onebit_bench" in text:
            continue
        names = re.findall(r'm\.(?:impl\(|def\(\s*)"(\w+)', text)
        if path.suffix == ".cpp":
            names += [said_once[name] for name in re.findall(r"\bdefine\w*<(\w+)[,>]", text)]
        for name in names:
            places.setdefault(name, set()).add(path.parent.relative_to(ROOT / "csrc").as_posix())
    return places


def test_an_operator_touches_one_folder_of_the_front_and_one_of_each_backend():
    """Those that only a backend has (names of its kernels, its limits) touch that one."""
    places = places_of_operators()
    names = {"qmm", "gather_qmm", "linear", "affine_grad", "quantize", "fake_quantize"}
    assert names <= places.keys()
    assert {"cpu", "cuda", "mps", "ops/product"} == places["qmm"]
    for name, folders in places.items():
        front = folders - set(BACKENDS)
        assert len(front) == 1 or (not front and len(folders) == 1), f"{name}: {folders}"


def test_operators_of_benchmarks_have_a_namespace_of_their_own():
    production = places_of_operators()
    used_by = {"bench": set(), "others": set()}
    for path in sorted((ROOT / "torch_onebit").rglob("*.py")):
        user = "bench" if "bench" in path.parts else "others"
        used_by[user] |= set(re.findall(r"torch\.ops\.onebit_bench\.(\w+)", path.read_text()))
    assert used_by["bench"] == {"read_memory", "multiply_adds"} and not used_by["others"]
    assert not used_by["bench"] & production.keys()


def test_the_table_of_what_a_change_touches_names_what_there_is():
    text = (ROOT / "docs/architecture.md").read_text()
    row = next(line for line in text.splitlines() if line.startswith("| operator |"))
    names = re.findall(r"`((?:csrc|torch_onebit)/[\w/.]*)`", row)
    assert len(names) == 2  # one per language
    for name in names:
        assert (ROOT / name).exists(), name


def test_every_path_that_the_page_names_is_there():
    text = (ROOT / "docs/architecture.md").read_text()
    rooms = "csrc|metal|torch_onebit|tests|benchmarks"
    names = set(re.findall(rf"\b(?:{rooms})/[\w/.*-]*[\w*/]", text))
    assert len(names) > 40
    assert [name for name in sorted(names) if not list(ROOT.glob(name))] == []


def test_rooms_form_no_circle():
    left = {room: set(below) for room, below in ROOMS.items()}
    while free := {room for room, below in left.items() if not below & left.keys()}:
        left = {room: below for room, below in left.items() if room not in free}
    assert not left


def test_what_host_and_kernels_share_is_declared_once():
    names = re.findall(r"^enum class (\w+)", (ROOT / "csrc/format.h").read_text(), re.M)
    assert names == ["DType", "Rule"]
    for path in [*files_of("csrc/**/*"), *files_of("metal/*")]:
        again = re.findall(r"\benum\s+(?:class\s+)?(\w+)", path.read_text())
        assert path.name == "format.h" or not set(names) & set(again), path


def imports_of_modules() -> dict[str, set[str]]:
    """By module of the package: the others that it imports, anywhere."""
    files = sorted((ROOT / "torch_onebit").rglob("*.py"))
    names = {p: ".".join(p.relative_to(ROOT).with_suffix("").parts) for p in files}
    names = {p: name.removesuffix(".__init__") for p, name in names.items()}
    modules = set(names.values())
    found: dict[str, set[str]] = {}
    for path, module in names.items():
        imported: set[str] = set()
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Import):
                imported |= {alias.name for alias in node.names}
            elif isinstance(node, ast.ImportFrom):
                inner = {f"{node.module}.{alias.name}" for alias in node.names}
                imported |= inner & modules or {node.module}
        found[module] = (imported & modules) - {module}
    return found


def imports_of_parts() -> dict[str, set[str]]:
    """By part of the package, a module or a folder of it: the others that it imports."""
    found: dict[str, set[str]] = {}
    for module, imported in imports_of_modules().items():
        if module.count(".") and module != "torch_onebit.__main__":
            part = module.split(".")[1]
            parts = {name.split(".")[1] for name in imported if name.count(".")}
            found.setdefault(part, set()).update(parts - {part})
    return found


@pytest.mark.parametrize("imports", [imports_of_modules, imports_of_parts])
def test_no_circle_of_imports(imports):
    left = imports()
    assert len(left) > 20 and any(left.values())
    while free := {name for name, imported in left.items() if not imported & left.keys()}:
        left = {name: imported for name, imported in left.items() if name not in free}
    circle = {name: sorted(imported & left.keys()) for name, imported in left.items()}
    assert not circle, circle


def test_the_table_of_cpu_kernels_names_what_there_is():
    text = (ROOT / "docs/architecture.md").read_text()
    section = text.split("## Which file has the CPU kernel")[1].split("\n## ")[0]
    names = set(re.findall(r"`([\w/]+(?:-inl\.h|\.cpp))`", section))
    assert len(names) >= 8
    for name in names:
        found = list((ROOT / "csrc/cpu/kernels").rglob(Path(name).name))
        assert [p for p in found if p.as_posix().endswith(f"/{name}")], name
